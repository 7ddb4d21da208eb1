"""Multi-vectors kept in 8 bits or 1 bit: scored as quantize_rows says, saved, merged, refused where they do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from random_texts import random_texts

from m3kernels import maxsim_pairs, quantize_rows
from m3model.retrieval import ExactIndex

BITS = (8, 1)
COUNT = 40


def names(count: int, first: int = 0) -> list[str]:
    return [f"d{number}" for number in range(first, first + count)]


def coded(bits: int, *blocks: int, width: int = 64) -> ExactIndex:
    """COUNT documents added in so many blocks."""
    texts, index = random_texts(COUNT, 1, width=width), ExactIndex(row_bits=bits)
    bounds = [0, *blocks, COUNT]
    for first, last in zip(bounds, bounds[1:]):
        index.add(names(last - first, first), texts.select(range(first, last)))
    return index


def assert_same_answers(left: ExactIndex, right: ExactIndex, width: int = 64) -> None:
    queries = random_texts(5, 2, width=width)
    for head in ("multi_vector", "all"):
        for first, second in zip(left.search(queries, 9, head=head), right.search(queries, 9, head=head)):
            assert first.ids == second.ids
            np.testing.assert_array_equal(first.score, second.score)


@pytest.mark.parametrize("bits", BITS)
def test_scores_are_those_of_the_quantized_rows(bits: int) -> None:
    texts, queries = random_texts(COUNT, 1, width=64).multi_vector, random_texts(5, 2, width=64)
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(COUNT)).int()
    asked = queries.multi_vector
    expected = maxsim_pairs(asked.rows, quantize_rows(texts.rows, bits), asked.offsets, texts.offsets, pairs)
    for query, ranking in enumerate(coded(bits).search(queries, COUNT, head="multi_vector", rerank=None)):
        assert len(ranking.ids) == COUNT
        wanted = [float(expected.view(5, COUNT)[query, int(name[1:])]) for name in ranking.ids]
        np.testing.assert_array_equal(ranking.multi_vector, np.float32(wanted))


@pytest.mark.parametrize("bits", BITS)
def test_blocks_deletions_and_replacements_are_merged_saved_and_mapped(bits: int, tmp_path: Path) -> None:
    index, whole = coded(bits, 1, 3, 30), coded(bits)
    assert_same_answers(index, whole)
    for each in (index, whole):
        each.delete(names(5, 20))
        each.upsert(names(2), random_texts(2, 9, width=64))
    index.save(tmp_path / "index")
    loaded = ExactIndex.load(tmp_path / "index")
    assert loaded.row_bits == bits and loaded.parts == ("dense", "sparse", "multi_vector")
    assert_same_answers(loaded, whole)
    for each in (loaded, whole):
        each.add(["new"], random_texts(1, 4, width=64))
    loaded.save(tmp_path / "index")
    assert_same_answers(ExactIndex.load(tmp_path / "index"), whole)
    shared = ExactIndex.union([ExactIndex.load(tmp_path / "index")], parts=["dense", "multi_vector"])
    assert shared.parts == ("dense", "multi_vector")
    with pytest.raises(ValueError, match=r"has no colour"):
        ExactIndex.union([loaded], parts=["colour"])


def test_an_index_of_multi_vectors_alone(tmp_path: Path) -> None:
    texts, queries = (random_texts(n, n, width=64, parts=("multi_vector",)) for n in (6, 2))
    index = ExactIndex(row_bits=8)
    index.add(names(6), texts)
    index.save(tmp_path / "index")
    found = ExactIndex.load(tmp_path / "index").search(queries, 6, head="multi_vector")
    for ranking, expected in zip(found, index.search(queries, 6, head="multi_vector"), strict=True):
        assert ranking.ids == expected.ids and len(ranking.ids) == 6


def test_codes_take_the_bytes_they_should() -> None:
    texts = random_texts(COUNT, 1, width=64)
    tokens = len(texts.multi_vector.rows)
    exact = ExactIndex()
    exact.add(names(COUNT), texts)
    for bits, row in ((8, 64 + 4), (1, 64 / 8 + 4)):
        assert exact.nbytes - coded(bits).nbytes == tokens * (64 * 4 - row)


@pytest.mark.parametrize("bits", BITS)
def test_damaged_codes_are_named(bits: int, tmp_path: Path) -> None:
    coded(bits).save(tmp_path / "index")
    (path,) = (tmp_path / "index").glob(f"segment-*/row_codes_{bits}.npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"row_codes_{bits}.npy is damaged"):
        ExactIndex.load(tmp_path / "index")
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"row_codes_{bits}.npy is truncated"):
        ExactIndex.load(tmp_path / "index", verify=False)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="row_bits is 4; accepted: None, 8, 1"):
        ExactIndex(row_bits=4)
    with pytest.raises(ValueError, match="width 12; accepted: multiples of 8"):
        ExactIndex(row_bits=8).add(["a"], random_texts(1, 1, width=12))
    index = coded(8)
    with pytest.raises(ValueError, match=r"multi_vector of width 32 .*the index has.*of width 64 \(8 bits"):
        index.add(["a"], random_texts(1, 1, width=32))
    index.row_bits = None
    with pytest.raises(ValueError, match=r"float32\); the index has .*\(8 bits\)"):
        index.add(["a"], random_texts(1, 1, width=64))
    with pytest.raises(ValueError, match=r"an index has .*\(1 bits\), the ones before it .*\(8 bits\)"):
        other = ExactIndex(row_bits=1)
        other.add(["z"], random_texts(1, 1, width=64))
        ExactIndex.union([index, other])
