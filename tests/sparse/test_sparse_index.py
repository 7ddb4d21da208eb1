"""The inverted index finds exactly what scoring every passage finds, in memory, in parts, and from a file."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from m3kernels import SparseBatch, SparseIndex, offsets_from_lengths, sparse_pool, sparse_scores

DICTS = st.lists(st.dictionaries(st.integers(0, 9), st.integers(1, 4).map(float), max_size=5), max_size=8)


def zipf_batch(texts: int, length: int, seed: int, vocabulary: int = 3000) -> SparseBatch:
    """Few frequent and many rare ids, as in text; weights with many ties."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, 2 * length, texts)
    ids = np.minimum(generator.zipf(1.3, lengths.sum()), vocabulary).astype(np.int32)
    weights = generator.integers(1, 40, lengths.sum()).astype(np.float32) / 16
    return sparse_pool(
        torch.from_numpy(weights), torch.from_numpy(ids), offsets_from_lengths(torch.from_numpy(lengths))
    )


def exhaustive(queries: SparseBatch, passages: SparseBatch, k: int) -> tuple[Tensor, Tensor]:
    scores = sparse_scores(queries, passages)
    best = torch.sort(scores, dim=1, descending=True, stable=True)
    padding = (0, max(0, k - scores.shape[1]))
    values = torch.nn.functional.pad(best.values[:, :k], padding)
    found = torch.nn.functional.pad(best.indices[:, :k], padding, value=-1)
    return values, found.masked_fill(values == 0, -1)


def check(index: SparseIndex, queries: SparseBatch, passages: SparseBatch, k: int) -> None:
    scores, found = exhaustive(queries, passages, k)
    result = index.search(queries, k)
    assert torch.equal(result.scores, scores)
    assert torch.equal(result.passages, found)


@given(DICTS, DICTS, st.integers(1, 10))
def test_search_equals_scoring_every_passage_with_ties_to_the_lowest(
    queries: list[dict[int, float]], passages: list[dict[int, float]], k: int
) -> None:
    batches = SparseBatch.from_dicts(queries), SparseBatch.from_dicts(passages)
    check(SparseIndex.build(batches[1]), *batches, k)


@pytest.mark.parametrize("k", [1, 10, 100, 5000])
def test_search_skips_no_passage_of_many_blocks(k: int) -> None:
    passages, queries = zipf_batch(4000, 40, 1), zipf_batch(50, 8, 2)
    check(SparseIndex.build(passages), queries, passages, k)


@given(st.lists(st.integers(0, 90), max_size=8), st.sampled_from(["float32", "float16"]))
def test_adding_in_parts_equals_building_at_once(sizes: list[int], precision: str) -> None:
    index = SparseIndex.build(SparseBatch.from_dicts([]), precision=precision)
    dicts = []
    for seed, size in enumerate(sizes):
        part = zipf_batch(size, 6, seed, vocabulary=50)
        dicts += part.to_dicts()
        index.add(part)
    assert len(index) == sum(sizes)
    check(index, zipf_batch(5, 6, 99, vocabulary=50), SparseBatch.from_dicts(dicts), 20)


def test_parts_are_merged_so_that_few_remain() -> None:
    index = SparseIndex.build(SparseBatch.from_dicts([]))
    for seed in range(200):
        index.add(zipf_batch(1, 5, seed))
    assert len(index) == 200
    assert len(index._segments) <= 8


@pytest.mark.parametrize("precision", ["float16", "uint8"])
def test_narrow_weights_are_close_and_the_search_is_exact_in_them(precision: str) -> None:
    passages, queries = zipf_batch(3000, 30, 3), zipf_batch(40, 8, 4)
    index = SparseIndex.build(passages, precision=precision)
    result = index.search(queries, 3000)
    exact = sparse_scores(queries, passages)
    # One rounding a weight: 2^-11 of it, or half of 1/255 of the largest weight of its id, which is at most 39/16.
    tops = sparse_scores(queries, passages._replace(weights=torch.ones_like(passages.weights))) * (39 / 16)
    bound = exact * 2**-11 if precision == "float16" else tops * 0.5 / 255
    for query in range(40):
        hits = result.passages[query][result.passages[query] >= 0]
        assert hits.shape[0] == int((exact[query] > 0).sum())
        error = (result.scores[query, : hits.shape[0]] - exact[query, hits]).abs()
        assert (error <= bound[query, hits] + 1e-5).all()
        assert (result.scores[query].diff() <= 0).all()
    few = index.search(queries, 25)
    assert torch.equal(few.scores, result.scores[:, :25])
    assert torch.equal(few.passages, result.passages[:, :25])


def test_a_uint8_index_keeps_its_parts_and_the_smallest_weight() -> None:
    index = SparseIndex.build(SparseBatch.from_dicts([{1: 1000.0}, {1: 0.001}]), precision="uint8")
    index.add(SparseBatch.from_dicts([{1: 0.5}]))
    result = index.search(SparseBatch.from_dicts([{1: 1.0}]), 5)
    assert result.passages.tolist() == [[0, 1, 2, -1, -1]]
    assert result.scores[0].tolist() == pytest.approx([1000, 1000 / 255, 0.5, 0, 0])


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    index, queries = SparseIndex.build(zipf_batch(2000, 20, 5)), zipf_batch(30, 8, 6)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = index.search(queries, 50)
        torch.set_num_threads(4)
        together = index.search(queries, 50)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


@pytest.mark.parametrize("precision", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("parts", [0, 1, 3])
def test_a_saved_index_comes_back_mapped(tmp_path: Path, precision: str, parts: int) -> None:
    index = SparseIndex.build(SparseBatch.from_dicts([]), precision=precision)
    for seed in range(parts):
        index.add(zipf_batch(500 >> 2 * seed, 10, seed))
    path = tmp_path / "passages.m3sparse"
    index.save(path)
    loaded = SparseIndex.load(path, verify=True)
    queries = zipf_batch(20, 8, 7)
    assert all(torch.equal(a, b) for a, b in zip(loaded.search(queries, 30), index.search(queries, 30)))
    assert (len(loaded), loaded.precision, loaded.nbytes) == (len(index), precision, index.nbytes)
    loaded.add(zipf_batch(10, 5, 8))
    assert len(loaded) == len(index) + 10
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_saving_over_a_mapped_index_leaves_the_mapped_one_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "index"
    SparseIndex.build(SparseBatch.from_dicts([{1: 1.0}, {2: 2.0}])).save(path)
    mapped = SparseIndex.load(path)
    SparseIndex.build(SparseBatch.from_dicts([{2: 5.0}])).save(path)
    query = SparseBatch.from_dicts([{2: 1.0}])
    assert mapped.search(query, 1).scores.tolist() == [[2.0]]
    assert SparseIndex.load(path).search(query, 1).scores.tolist() == [[5.0]]


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index"
    index = SparseIndex.build(SparseBatch.from_dicts([{1: 1.0}]))
    index.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        SparseIndex.build(SparseBatch.from_dicts([{9: 1.0}])).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_damaged_and_foreign_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "index"
    SparseIndex.build(zipf_batch(50, 10, 9)).save(path)
    good = path.read_bytes()
    for content, reason in (
        (b"PK\x03\x04 something else", "is not a SparseIndex file"),
        (b"", "is not a SparseIndex file"),
        (good[:10], "was cut off: it has 10 bytes"),
        (good[:40], "was cut off: its header has 20 of"),
        (good[:-1], "it was cut off or written to"),
        (good + b"x", "it was cut off or written to"),
        (good[:8] + struct.pack("<I", 2) + good[12:], "has version 2 of the format; accepted: 1"),
        (good[:30] + b"?" + good[31:], "the checksum of the header differs"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            SparseIndex.load(path)
    path.write_bytes(good[:-70] + bytes([good[-70] ^ 1]) + good[-69:])
    with pytest.raises(ValueError, match="the checksum of weight in segment 0 differs"):
        SparseIndex.load(path, verify=True)


def test_what_an_index_does_not_take_is_named() -> None:
    good = SparseBatch.from_dicts([{1: 1.0}, {2: 1.0, 3: 2.0}])
    index = SparseIndex.build(good)
    with pytest.raises(ValueError, match="precision is 'int4'; accepted: float32, float16, uint8"):
        SparseIndex.build(good, precision="int4")
    with pytest.raises(ValueError, match="k is 0"):
        index.search(good, 0)
    with pytest.raises(TypeError, match="queries must be a SparseBatch"):
        index.search([{1: 1.0}])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="passages: text 1 has the weight nan; accepted: 0 to"):
        index.add(good._replace(weights=torch.tensor([1.0, 2.0, float("nan")])))
    with pytest.raises(ValueError, match="queries: text 0 has the weight -1"):
        index.search(good._replace(weights=torch.tensor([-1.0, 2.0, 1.0])))
    with pytest.raises(ValueError, match=r"text 1 has the weight 70000\.0; accepted: 0 to 65504"):
        SparseIndex.build(good._replace(weights=torch.tensor([1.0, 70000.0, 1.0])), precision="float16")
    with pytest.raises(ValueError, match=r"passages\.token_ids must increase"):
        index.add(good._replace(token_ids=torch.tensor([1, 3, 2], dtype=torch.int32)))
