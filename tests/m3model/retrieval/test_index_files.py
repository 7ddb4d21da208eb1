"""Index folders: what is saved is found again, saving is atomic, damaged files are refused with a reason."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dying_writer import killed_writer
from random_texts import random_texts

from m3model.retrieval import ExactIndex, storage


def same_answers(left: ExactIndex, right: ExactIndex) -> bool:
    queries = random_texts(4, 99)
    for first, second in zip(left.search(queries, 20), right.search(queries, 20)):
        if first.ids != second.ids or not np.array_equal(first.score, second.score):
            return False
    return True


def index_of(count: int, seed: int = 1, **options: object) -> ExactIndex:
    index = ExactIndex("abc", {"model": "somewhere"})
    index.add([f"d{n}" for n in range(count)], random_texts(count, seed, **options), [{"n": n} for n in range(count)])
    return index


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    index_of(12).save(tmp_path / "index")
    return tmp_path / "index"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_saved_index_answers_as_before(tmp_path: Path, dtype: torch.dtype) -> None:
    index = index_of(30, row_dtype=dtype)
    index.save(tmp_path / "deep" / "index")
    loaded = ExactIndex.load(tmp_path / "deep" / "index")
    assert same_answers(index, loaded)
    assert (loaded.fingerprint, loaded.metadata) == ("abc", {"model": "somewhere"})
    assert loaded.document("d7") == {"n": 7} and len(loaded) == 30


def test_an_empty_index_can_be_saved(tmp_path: Path) -> None:
    ExactIndex().save(tmp_path / "index")
    loaded = ExactIndex.load(tmp_path / "index")
    assert len(loaded) == 0 and loaded.parts == ()


def test_a_collection_without_a_single_row_or_weight_can_be_saved(tmp_path: Path) -> None:
    texts = random_texts(3, 1, longest=0).select([0, 1, 2])
    texts = texts.select([n for n in range(3) if texts.multi_vector.offsets.diff()[n] == 0])
    index = ExactIndex()
    index.add([f"d{n}" for n in range(len(texts))], texts)
    index.save(tmp_path / "index")
    assert same_answers(index, ExactIndex.load(tmp_path / "index"))


def test_arrays_are_mapped_and_the_files_are_not_changed_by_use(stored: Path) -> None:
    before = {path: path.read_bytes() for path in stored.rglob("*.npy")}
    loaded = ExactIndex.load(stored)
    dense = loaded._segments[0].segment.embeddings.dense
    assert isinstance(dense.base, np.memmap)
    loaded.search(random_texts(2, 5))
    dense[0] = 0
    assert before == {path: path.read_bytes() for path in stored.rglob("*.npy")}


def test_saving_again_writes_only_what_is_new(stored: Path) -> None:
    loaded = ExactIndex.load(stored)
    first = {path: path.stat().st_mtime_ns for path in stored.rglob("*.npy")}
    loaded.add(["new"], random_texts(1, 50))
    loaded.save(stored)
    assert first.items() <= {path: path.stat().st_mtime_ns for path in stored.rglob("*.npy")}.items()
    again = ExactIndex.load(stored)
    assert len(again) == 13 and same_answers(loaded, again)
    again.save(stored)
    assert same_answers(loaded, ExactIndex.load(stored))


def test_saving_another_index_replaces_the_old_one(stored: Path) -> None:
    other = index_of(5, seed=8)
    other.save(stored)
    assert same_answers(other, ExactIndex.load(stored))
    assert len([path for path in stored.iterdir() if path.is_dir()]) == 1


def test_two_writers_do_not_undo_each_other(stored: Path) -> None:
    one, two = ExactIndex.load(stored), ExactIndex.load(stored)
    one.add(["from one"], random_texts(1, 50))
    two.add(["from two"], random_texts(1, 51))
    one.save(stored)
    with pytest.raises(RuntimeError, match="changed by another process since it was loaded"):
        two.save(stored)
    assert "from one" in ExactIndex.load(stored)
    with storage._locked(stored), pytest.raises(RuntimeError, match="another process is writing"):
        one.save(stored)


@pytest.mark.parametrize("step", ["write_array", "fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_index(stored: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    before = ExactIndex.load(stored)
    changed = ExactIndex.load(stored)
    changed.add(["new"], random_texts(1, 50))

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format if step == "write_array" else os, step, fail)
        with pytest.raises(OSError, match="No space left"):
            changed.save(stored)
    assert same_answers(before, ExactIndex.load(stored)) and len(ExactIndex.load(stored)) == 12
    changed.save(stored)
    assert "new" in ExactIndex.load(stored)
    assert len([path for path in stored.iterdir() if path.is_dir()]) == 2


def test_a_process_killed_while_it_saves_leaves_the_old_or_the_new_index(stored: Path, tmp_path: Path) -> None:
    seen = set()
    for steps in (1, 6, 14, 21, 23, 100):
        copy = tmp_path / f"copy{steps}"
        shutil.copytree(stored, copy)
        code = killed_writer(copy, steps, "add", "new")
        loaded = ExactIndex.load(copy)
        assert len(loaded) == 12 + ("new" in loaded)
        if "new" not in loaded:
            loaded.add(["new"], random_texts(1, 50))
        loaded.save(copy)
        assert len(ExactIndex.load(copy)) == 13
        assert len([path for path in copy.iterdir() if path.is_dir()]) == 2
        seen.add((code, "new" in loaded))
    assert {code for code, _ in seen} == {0, -9}


def arrays(folder: Path) -> list[Path]:
    return sorted(folder.glob("segment-*/*.npy"))


def test_a_truncated_file_is_named(stored: Path) -> None:
    for path in arrays(stored):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(ValueError, match=rf"{path.name} is truncated or foreign: it has {len(content) - 1} bytes"):
            ExactIndex.load(stored)
        path.write_bytes(content)
    ExactIndex.load(stored)


def test_a_changed_byte_is_found(stored: Path) -> None:
    for path in arrays(stored):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path.name} is damaged: its checksum"):
            ExactIndex.load(stored)
        content[-1] ^= 1
        path.write_bytes(content)
    assert len(ExactIndex.load(stored, verify=False)) == 12


def test_a_missing_file_is_named(stored: Path) -> None:
    path = arrays(stored)[3]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path.name} is missing"):
        ExactIndex.load(stored)
    shutil.rmtree(path.parent)
    with pytest.raises(FileNotFoundError, match="is missing, although the index's manifest"):
        ExactIndex.load(stored)


def test_other_paths_are_no_index(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no index folder"):
        ExactIndex.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no manifest"):
        ExactIndex.load(tmp_path)
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match="is a file; an index is a folder"):
        ExactIndex.load(tmp_path / "file")
    with pytest.raises(FileExistsError, match="is a file"):
        index_of(2).save(tmp_path / "file")
    with pytest.raises(FileExistsError, match="is no index and holds"):
        index_of(2).save(tmp_path)


def rewrite(folder: Path, **entries: object) -> None:
    """Change the manifest and make its checksum fit."""
    values = json.loads((folder / "manifest.json").read_text())
    values.update(entries)
    values.pop("crc32")
    values["crc32"] = storage.zlib.crc32(storage._canonical(values))
    (folder / "manifest.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or truncated"),
        (b"{}", "no manifest of an index"),
        (b"[1, 2]", "no manifest of an index"),
        (b"\xff\xfe\x00binary", "damaged or truncated"),
    ],
)
def test_a_foreign_manifest_is_refused(stored: Path, content: bytes, message: str) -> None:
    (stored / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ExactIndex.load(stored)


def test_a_truncated_or_edited_manifest_is_refused(stored: Path) -> None:
    content = (stored / "manifest.json").read_text()
    (stored / "manifest.json").write_text(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged or truncated"):
        ExactIndex.load(stored)
    (stored / "manifest.json").write_text(content.replace('"abc"', '"abd"'))
    with pytest.raises(ValueError, match="its checksum does not fit its content"):
        ExactIndex.load(stored)


def test_another_version_is_refused(stored: Path) -> None:
    rewrite(stored, version=7)
    with pytest.raises(ValueError, match="is an index of version 7; this program reads version 2"):
        ExactIndex.load(stored)


def test_names_outside_the_folder_are_refused(stored: Path) -> None:
    segments = json.loads((stored / "manifest.json").read_text())["segments"]
    segments[0]["name"] = "../" + segments[0]["name"]
    rewrite(stored, segments=segments)
    with pytest.raises(ValueError, match="names files outside the index"):
        ExactIndex.load(stored)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("dense", np.zeros((12, 8)), "dense.npy has dtype <f8"),
        ("dense", np.zeros((11, 8), dtype=np.float32), "dense.npy has 11 rows; expected 12"),
        ("dense", np.zeros(12, dtype=np.float32), r"dense.npy has shape \(12,\)"),
        ("row_offsets", np.zeros(5, dtype=np.int32), "row_offsets.npy has 5 rows; expected 13"),
        ("inverted_place", np.zeros(3, dtype=np.uint8), "is damaged: .* of segment 0 has"),
        ("inverted_posting_begin", np.zeros(2, dtype=np.int32), "inverted_posting_begin.npy has dtype <i4"),
        ("deleted-1", np.array([12]), "has deletions outside its 12 documents"),
    ],
)
def test_a_file_that_does_not_fit_the_others_is_refused(
    stored: Path, name: str, array: np.ndarray, message: str
) -> None:
    segments = json.loads((stored / "manifest.json").read_text())["segments"]
    path = stored / segments[0]["name"] / f"{name}.npy"
    np.save(path, array)
    content = path.read_bytes()
    segments[0]["files"][path.name] = {"bytes": len(content), "crc32": storage.zlib.crc32(content)}
    rewrite(stored, segments=segments)
    with pytest.raises(ValueError, match=message):
        ExactIndex.load(stored)


def test_a_text_file_in_place_of_an_array_is_refused(stored: Path) -> None:
    segments = json.loads((stored / "manifest.json").read_text())["segments"]
    path = stored / segments[0]["name"] / "dense.npy"
    path.write_bytes(b"not an array")
    segments[0]["files"]["dense.npy"] = {"bytes": 12, "crc32": storage.zlib.crc32(b"not an array")}
    rewrite(stored, segments=segments)
    with pytest.raises(ValueError, match=r"dense\.npy is no \.npy file"):
        ExactIndex.load(stored)
    del segments[0]["files"]["dense.npy"], segments[0]["files"]["token_ids.npy"]
    rewrite(stored, segments=segments)
    with pytest.raises(ValueError, match="has the arrays"):
        ExactIndex.load(stored)
