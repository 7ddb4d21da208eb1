"""Training rows: what is read, what is refused and how the refusal names its place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import multiprocessing
import os
import pickle
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from m3model.training import DataSource, TrainingDataError, TrainingDataset, TrainingRow, read_training_rows

GOOD = {"query": "what is a river", "pos": ["a river", "the north"], "neg": ["a matrix"]}
TEACHER = {**GOOD, "pos_scores": [2, 1.5], "neg_scores": [-3.0], "prompt": "find: ", "type": "only_1neg"}


def write(path: Path, rows: list[Any]) -> Path:
    text = "".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(pack(path, text.encode()))
    return path


def pack(path: Path, content: bytes) -> bytes:
    if path.suffix == ".zst":
        return bytes(pytest.importorskip("zstandard").compress(content))
    packers: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    return packers.get(path.suffix, bytes)(content)


def rows_of(path: Path) -> list[TrainingRow]:
    return list(read_training_rows(path))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary directory of this test alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".jsonl.zst"])
def test_rows_are_read_the_same_from_every_kind_of_file(tmp_path: Path, temporary: Path, ending: str) -> None:
    long = {"query": "东京  в", "pos": ["é" * 3_000_000], "neg": []}
    path = write(tmp_path / f"rows{ending}", [GOOD, "\n", TEACHER, "   \n", long, {"query": "q", "pos": ["p"]}])
    streamed = rows_of(path)
    assert [row.location for row in streamed] == [f"{path}:{line}" for line in (1, 3, 5, 6)]
    assert [row.index for row in streamed] == [0, 1, 2, 3]
    assert streamed[1] == TrainingRow(
        "what is a river", ("a river", "the north"), ("a matrix",), (2.0, 1.5), (-3.0,), "find: ", "only_1neg", 1,
        f"{path}:3",
    )  # fmt: skip
    assert (streamed[0].positive_scores, streamed[0].prompt, streamed[0].type) == (None, None, None)
    assert streamed[2].query == "东京  в" and len(streamed[2].positives[0]) == 3_000_000
    assert streamed[3].negatives == ()
    dataset = TrainingDataset([DataSource(path)])
    assert [dataset[number] for number in range(len(dataset))] == streamed
    assert dataset.character_lengths.tolist() == [15, 15, 3_000_000, 1]
    assert dataset.sources[0].name == "rows"


BAD: list[tuple[Any, str]] = [
    ("{broken\n", "not JSON"),
    ("[" * 100_000 + "\n", "not JSON"),
    ([GOOD], "expected a JSON object, got a list; one row a line"),
    ("12\n", "expected a JSON object, got 12"),
    ({"pos": ["p"], "neg": []}, "no 'query'; the row has 'pos', 'neg'"),
    ({"query": "q", "neg": []}, "no 'pos'"),
    ({"query": None, "pos": ["p"]}, "'query' must be a string, got null"),
    ({"query": " \t", "pos": ["p"]}, "'query' is empty"),
    ({"query": "q", "pos": "p"}, "'pos' must be a list of strings, got a string"),
    ({"query": "q", "pos": []}, "'pos' is empty"),
    ({"query": "q", "pos": ["p", ""]}, r"'pos'\[1\] is empty"),
    ({"query": "q", "pos": ["p"], "neg": ["n", 3]}, r"'neg'\[1\] must be a string, got 3"),
    ({**TEACHER, "pos_scores": [1.0]}, "'pos_scores' has 1 numbers, but 'pos' has 2 passages"),
    ({**TEACHER, "neg_scores": None}, "'neg_scores' is missing"),
    ({**TEACHER, "pos_scores": None}, "'pos_scores' is missing"),
    ({**TEACHER, "pos_scores": [1.0, True]}, r"'pos_scores'\[1\] must be a finite number, got True"),
    ({**TEACHER, "neg_scores": [float("nan")]}, r"'neg_scores'\[0\] must be a finite number, got nan"),
    ({**TEACHER, "neg_scores": 1}, "'neg_scores' must be a list of numbers, got 1"),
    ({**TEACHER, "prompt": 1}, "'prompt' must be a string, got 1"),
    ({**TEACHER, "type": ["a"]}, "'type' must be a string, got a list"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, bad: Any, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, "\n", bad, GOOD])
    with pytest.raises(TrainingDataError, match=f"rows.jsonl:3: {message}"):
        rows_of(path)
    with pytest.raises(TrainingDataError, match=f"rows.jsonl:3: {message}"):
        TrainingDataset([DataSource(write(tmp_path / "good.jsonl", [GOOD])), DataSource(path)])


def test_bytes_that_are_no_utf8_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b'\n{"query": "\xff", "pos": ["p"]}\n')
    with pytest.raises(TrainingDataError, match=r"rows.jsonl:2: not UTF-8"):
        rows_of(path)


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_rows_is_an_error(tmp_path: Path, temporary: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(pack(path, content))
    with pytest.raises(TrainingDataError, match="the file has no rows"):
        rows_of(path)
    with pytest.raises(TrainingDataError, match="the file has no rows"):
        TrainingDataset([DataSource(path)])


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_a_damaged_packed_file_is_an_error_and_leaves_nothing(tmp_path: Path, temporary: Path, ending: str) -> None:
    path = tmp_path / f"rows.jsonl{ending}"
    whole = pack(path, b"".join(json.dumps({**GOOD, "id": os.urandom(40).hex()}).encode() + b"\n" for _ in range(3000)))
    for damaged in (whole[: len(whole) // 2], b"no packed file\n" * 99):
        path.write_bytes(damaged)
        with pytest.raises(TrainingDataError, match=f"rows.jsonl{ending}: damaged"):
            rows_of(path)
        with pytest.raises(TrainingDataError, match=f"rows.jsonl{ending}: damaged"):
            TrainingDataset([DataSource(path)])
        assert not any(child.is_file() for child in temporary.rglob("*"))


def test_zst_without_the_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImportError, match=r"m3kernels\[zstd\]"):
        rows_of(path)


def test_a_packed_file_is_unpacked_once_for_each_of_its_states(tmp_path: Path, temporary: Path) -> None:
    path = write(tmp_path / "rows.jsonl.gz", [GOOD])
    TrainingDataset([DataSource(path)])
    (plain,) = temporary.rglob("*.jsonl")
    state = plain.stat()
    TrainingDataset([DataSource(path)])
    assert plain.stat().st_ino == state.st_ino and plain.parent.stat().st_mode & 0o077 == 0
    write(path, [GOOD, TEACHER])
    assert len(TrainingDataset([DataSource(path)])) == 2


def test_processes_may_unpack_a_file_at_the_same_time(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.jsonl.gz", [GOOD, TEACHER])
    others: list[Any] = []
    real = shutil.copyfileobj

    def overtaken(*arguments: Any) -> None:
        real(*arguments)
        if not others:
            others.append(None)
            others[0] = TrainingDataset([DataSource(path)])
            time.sleep(0.05)  # file systems tell times apart by some milliseconds

    monkeypatch.setattr(shutil, "copyfileobj", overtaken)
    late = TrainingDataset([DataSource(path)])
    assert others[0][1] == late[1]
    assert len(list(temporary.rglob("*.jsonl"))) == 1


def test_no_room_to_unpack_names_file_and_folder_and_leaves_nothing(tmp_path: Path, temporary: Path) -> None:
    path = write(tmp_path / "rows.jsonl.gz", [{**GOOD, "id": "x" * 300_000}])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # a write beyond it fails like one to a full disk
    try:
        with pytest.raises(OSError, match=rf"cannot unpack {path} into {temporary}"):
            TrainingDataset([DataSource(path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not any(child.is_file() for child in temporary.rglob("*"))
    assert len(TrainingDataset([DataSource(path)])) == 1


def test_sources_follow_each_other(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [GOOD, TEACHER])
    second = write(tmp_path / "b.jsonl", [{"query": "q", "pos": ["p"]}, GOOD])
    dataset = TrainingDataset([DataSource(first), DataSource(second, name="other", weight=2)])
    assert [dataset.source_of(number) for number in range(4)] == [0, 0, 1, 1]
    assert dataset[2].query == "q" and dataset[2].index == 2 and dataset.location(2) == f"{second}:1"
    assert dataset.negative_counts.tolist() == [1, 1, 0, 1]
    assert len(set(dataset.tasks.tolist())) == 3 and dataset.task_sources == (0, 0, 1)
    dataset.check_negatives(1)
    with pytest.raises(TrainingDataError, match=r"b.jsonl:1: the row has no negatives \(1 of 4 rows\)"):
        dataset.check_negatives(8)
    for index in (-1, 4):
        with pytest.raises(IndexError, match=r"rows 0 to 3"):
            dataset[index]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_rows_that_the_main_process_reads(tmp_path: Path, method: str) -> None:
    rows = [{"query": f"q{number}", "pos": ["p" * number]} for number in range(1, 60)]
    dataset = TrainingDataset([DataSource(write(tmp_path / "a.jsonl", rows))])
    expected = [dataset[number] for number in range(len(dataset))]
    context = multiprocessing.get_context(method)
    loader = DataLoader(dataset, batch_size=7, num_workers=2, collate_fn=list, multiprocessing_context=context)
    assert [row for batch in loader for row in batch] == expected
    assert pickle.loads(pickle.dumps(dataset))[5] == expected[5]


def test_a_file_changed_after_the_dataset_was_made_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD, GOOD])
    dataset = TrainingDataset([DataSource(path)])
    write(path, [GOOD])
    with pytest.raises(TrainingDataError, match="was changed since"):
        dataset[1]


def test_wrong_arguments_name_themselves(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sources is empty"):
        TrainingDataset([])
    with pytest.raises(TypeError, match="sources must hold DataSource"):
        TrainingDataset([str(tmp_path)])  # type: ignore[list-item]
    with pytest.raises(FileNotFoundError, match="no training file"):
        TrainingDataset([DataSource(tmp_path / "absent.jsonl")])
    with pytest.raises(IsADirectoryError, match="is a folder"):
        rows_of(tmp_path)
    for weight in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="weight is"):
            DataSource("a.jsonl", weight=weight)
    for size in (0, 1.5, True):
        with pytest.raises(ValueError, match="batch_size is"):
            DataSource("a.jsonl", batch_size=size)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="path must be"):
        DataSource(3)  # type: ignore[arg-type]
