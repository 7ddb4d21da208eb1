"""Encoding into shards: the same embeddings as encode, resumed runs, refusals, damage, full disks, several ranks."""

from __future__ import annotations

import fcntl
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_folder

from m3model import M3Model
from m3model.retrieval import ExactIndex
from m3model.retrieval.streaming import ingest_shards
from m3model.shards import EncodedShards, ShardReport, encode_shards, files

WORDS = ["the", "river", "city", "bridge", "matrix", "vector", "eigenvalue", "north", "south"]
Documents = list[tuple[str, dict[str, object]]]


def collection(count: int = 25, seed: int = 0) -> Documents:
    """Texts of 0 to 11 words; ids and texts with characters of several bytes."""
    draw = np.random.default_rng(seed)
    texts = [" ".join(draw.choice(WORDS, size=draw.integers(0, 12))) for _ in range(count)]
    return [(f"ü{number}", {"text": f"{text} 東京", "number": number}) for number, text in enumerate(texts)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".lock")}


def check_equal(folder: Path, model: M3Model, documents: Documents) -> None:
    """Every document once, in order, with the embeddings that encode gives."""
    expected = model.encode([str(content["text"]) for _, content in documents])
    shards = EncodedShards(folder)
    ids, out = shards.read()
    assert ids == [name for name, _ in documents] and len(shards) == len(documents)
    stored = [segment.document(number) for segment in shards for number in range(len(segment))]
    assert stored == [content for _, content in documents]
    np.testing.assert_allclose(out.dense, expected.dense, atol=1e-5, rtol=1e-5)
    assert [list(ids) for ids in out.sparse.to_dicts()] == [list(ids) for ids in expected.sparse.to_dicts()]
    torch.testing.assert_close(out.multi_vector.rows, expected.multi_vector.rows, atol=1e-5, rtol=1e-5)
    assert torch.equal(out.multi_vector.offsets, expected.multi_vector.offsets)


class StopsAt:
    """Documents whose second reading ends in an error at one of them."""

    def __init__(self, documents: Documents, place: int) -> None:
        self.documents = documents
        self.place = place
        self.readings = 0

    def __iter__(self) -> Iterator[tuple[str, dict[str, object]]]:
        self.readings += 1
        for number, document in enumerate(self.documents):
            if self.readings == 2 and number == self.place:
                raise KeyboardInterrupt
            yield document


def test_shards_hold_what_encode_gives(model: M3Model, tmp_path: Path) -> None:
    documents = collection()
    report = encode_shards(model, documents, tmp_path / "e", shard_characters=100)
    assert report.texts == 25 and report.encoded == report.shards > 5
    check_equal(tmp_path / "e", model, documents)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_multi_vectors_in_half_precision_and_parts_left_out(model: M3Model, tmp_path: Path, dtype: torch.dtype) -> None:
    documents = collection(6)
    encode_shards(model, documents, tmp_path / "e", dense=False, sparse=False, multi_vector_dtype=dtype)
    _, out = EncodedShards(tmp_path / "e").read()
    expected = model.encode([str(content["text"]) for _, content in documents], multi_vector_dtype=dtype)
    assert out.dense is None and out.sparse is None
    assert torch.equal(out.multi_vector.rows, expected.multi_vector.rows)


def test_a_run_that_was_stopped_goes_on_and_leaves_what_is_done(model: M3Model, tmp_path: Path) -> None:
    documents = collection()
    with pytest.raises(KeyboardInterrupt):
        encode_shards(model, StopsAt(documents, 15), tmp_path / "e", shard_characters=100)
    done = contents(tmp_path / "e")
    with pytest.raises(ValueError, match=r"is not finished: .* shards are missing"):
        EncodedShards(tmp_path / "e")
    report = encode_shards(model, documents, tmp_path / "e")  # the size of shards is that of the first run
    assert 1 < report.encoded < report.shards and len(done) == report.shards - report.encoded + 1
    assert contents(tmp_path / "e").items() >= done.items()
    check_equal(tmp_path / "e", model, documents)
    whole = contents(tmp_path / "e")
    assert encode_shards(model, documents, tmp_path / "e").encoded == 0
    assert contents(tmp_path / "e") == whole


def test_ranks_share_the_shards_and_any_other_number_of_ranks_goes_on(model: M3Model, tmp_path: Path) -> None:
    documents = collection()
    first = encode_shards(model, documents, tmp_path / "e", shard_characters=50, rank=1, world_size=3)
    assert files.present_shards(tmp_path / "e") == list(range(1, first.shards, 3))
    encode_shards(model, documents, tmp_path / "e", rank=0, world_size=2)
    report = encode_shards(model, documents, tmp_path / "e", rank=1, world_size=2)
    assert files.present_shards(tmp_path / "e") == list(range(report.shards))
    check_equal(tmp_path / "e", model, documents)


def test_an_empty_input_is_an_empty_encoding(model: M3Model, tmp_path: Path) -> None:
    assert encode_shards(model, [], tmp_path / "e") == ShardReport(0, 0, 0)
    shards = EncodedShards(tmp_path / "e")
    assert list(shards) == [] and len(shards) == 0
    with pytest.raises(ValueError, match="empty input"):
        shards.read()


def test_another_model_option_or_input_is_refused_and_changes_nothing(
    folder: Path, model: M3Model, tmp_path: Path
) -> None:
    documents = collection()
    encode_shards(model, documents, tmp_path / "e", shard_characters=100)
    before = contents(tmp_path / "e")
    other = M3Model.from_pretrained(write_folder(tmp_path / "other", seed=1))
    with pytest.raises(ValueError, match="begun with another model"):
        encode_shards(other, documents, tmp_path / "e")
    for name, value in (("max_length", 8), ("role", "query"), ("dense", False), ("shard_characters", 50)):
        with pytest.raises(ValueError, match=f"begun with {name} .*, now it is {value}"):
            encode_shards(model, documents, tmp_path / "e", **{name: value})
    quantized = M3Model.from_pretrained(folder, quantize="bf16")
    with pytest.raises(ValueError, match="begun with quantization None, now it is bf16"):
        encode_shards(quantized, documents, tmp_path / "e")
    changed = [*documents[:20], ("ü20", {"text": "another text"}), *documents[21:]]
    for wrong in (documents[:-1], [*documents, documents[0]], documents[::-1], changed):
        with pytest.raises(ValueError, match="begun with another input: 25 texts"):
            encode_shards(model, wrong, tmp_path / "e")
    assert contents(tmp_path / "e") == before


def test_an_input_that_changes_under_the_run_is_noticed(model: M3Model, tmp_path: Path) -> None:
    class Growing:
        readings = 0

        def __iter__(self) -> Iterator[tuple[str, dict[str, object]]]:
            self.readings += 1
            return iter(collection(25, seed=self.readings))

    with pytest.raises(RuntimeError, match="the input changed while it was read: documents 0 to"):
        encode_shards(model, Growing(), tmp_path / "e", shard_characters=100)
    assert files.present_shards(tmp_path / "e") == []


@pytest.mark.parametrize("place", [0, 100, 0.5, -1])
def test_a_damaged_shard_is_noticed_wherever_the_damage_is(model: M3Model, tmp_path: Path, place: float) -> None:
    encode_shards(model, collection(), tmp_path / "e", shard_characters=100)
    path = tmp_path / "e" / "shard-00000002.safetensors"
    content = bytearray(path.read_bytes())
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00000002.safetensors is (damaged|not shard)"):
        EncodedShards(tmp_path / "e").read()


def test_a_truncated_or_exchanged_shard_is_refused_and_made_anew_once_deleted(model: M3Model, tmp_path: Path) -> None:
    documents = collection()
    encode_shards(model, documents, tmp_path / "e", shard_characters=100)
    before = contents(tmp_path / "e")
    path = tmp_path / "e" / "shard-00000002.safetensors"
    for wrong in (before[path.name][:-1], before["shard-00000001.safetensors"], b""):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"shard-00000002.safetensors is (damaged|not shard 2).* delete it"):
            encode_shards(model, documents, tmp_path / "e")
    path.unlink()
    assert encode_shards(model, documents, tmp_path / "e").encoded == 1
    assert contents(tmp_path / "e") == before


def test_a_damaged_manifest_is_refused(model: M3Model, tmp_path: Path) -> None:
    encode_shards(model, collection(3), tmp_path / "e")
    path = tmp_path / "e" / "manifest.json"
    values = json.loads(path.read_text())
    for wrong, message in (
        (path.read_text().replace('"texts": 3', '"texts": 2'), "checksum does not fit"),
        (path.read_text()[:-20], "damaged or truncated"),
        (json.dumps({**values, "version": 9}), "version 9"),
        ("{}", "no manifest of encoded shards"),
    ):
        path.write_text(wrong)
        for call in (lambda: EncodedShards(tmp_path / "e"), lambda: encode_shards(model, [], tmp_path / "e")):
            with pytest.raises(ValueError, match=message):
                call()


def test_two_processes_on_one_folder_are_refused(model: M3Model, tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    with open(tmp_path / "e" / ".lock-0", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another process encodes into"):
            encode_shards(model, collection(), tmp_path / "e")
        assert not (tmp_path / "e" / "manifest.json").exists()
    assert encode_shards(model, collection(), tmp_path / "e").encoded == 1


def test_a_full_disk_leaves_whole_shards_only(model: M3Model, tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes a write fail as a full disk does: some bytes are written, then comes an OSError."""
    documents: Documents = [*collection(), ("long", {"text": "river city " * 500})]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            encode_shards(model, documents, tmp_path / "e", shard_characters=100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [name for name in contents(tmp_path / "e") if name.endswith(".new")]
    assert len(files.present_shards(tmp_path / "e")) > 5
    assert encode_shards(model, documents, tmp_path / "e").encoded == 1
    check_equal(tmp_path / "e", model, documents)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_an_error(model: M3Model, tmp_path: Path) -> None:
    (tmp_path / "e").mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        encode_shards(model, collection(), tmp_path / "e")


def test_folders_with_other_things_and_bad_arguments_are_refused(model: M3Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        encode_shards(model, [], tmp_path / "file")
    with pytest.raises(FileExistsError, match="holds 'file', but no encoding"):
        encode_shards(model, [], tmp_path)
    with pytest.raises(TypeError, match="iterated only once"):
        encode_shards(model, iter(collection()), tmp_path / "e")
    with pytest.raises(ValueError, match="rank is 2 and world_size 2"):
        encode_shards(model, [], tmp_path / "e", rank=2, world_size=2)
    with pytest.raises(ValueError, match="shard_characters is 0"):
        encode_shards(model, [], tmp_path / "e", shard_characters=0)
    with pytest.raises(ValueError, match="all False"):
        encode_shards(model, [], tmp_path / "e", dense=False, sparse=False, multi_vector=False)
    assert not (tmp_path / "e").exists()
    with pytest.raises(ValueError, match="document 'a' has no \"text\""):
        encode_shards(model, [("a", {"body": "x"})], tmp_path / "e")
    with pytest.raises(FileNotFoundError, match="holds no encoded texts"):
        EncodedShards(tmp_path / "nowhere")


def test_an_index_is_built_from_shards_and_passes_over_what_it_holds(model: M3Model, tmp_path: Path) -> None:
    documents = collection()
    encode_shards(model, documents, tmp_path / "e", shard_characters=100)
    shards = EncodedShards(tmp_path / "e")
    index = ExactIndex(shards.fingerprint)
    next(ingest_shards(index, shards, str(tmp_path / "index")))
    index = ExactIndex.load(tmp_path / "index")
    assert 0 < len(index) < 25
    stored = [name for ids in ingest_shards(index, shards, str(tmp_path / "index")) for name in ids]
    assert stored == [name for name, _ in documents]
    index = ExactIndex.load(tmp_path / "index")
    assert len(index) == 25 and index.document("ü7") == documents[7][1]
    expected = ExactIndex(shards.fingerprint)
    embeddings = model.encode([str(content["text"]) for _, content in documents], multi_vector_dtype=torch.float16)
    expected.add([name for name, _ in documents], embeddings)
    queries = model.encode(["the river"], role="query")
    (found,), (wanted,) = index.search(queries), expected.search(queries)
    assert [hit.id for hit in found] == [hit.id for hit in wanted]
    encode_shards(model, documents, tmp_path / "q", role="query")
    with pytest.raises(ValueError, match="encoded with role query"):
        next(ingest_shards(index, EncodedShards(tmp_path / "q"), str(tmp_path / "index")))
