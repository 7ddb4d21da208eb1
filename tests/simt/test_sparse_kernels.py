"""The CUDA sources of the sparse ops and of packing, run on the CPU by the emulator, against the float64 reference."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from m3kernels import offsets_from_lengths, packing
from m3kernels.sparse import reference
from tests.simt.emulated import load_kernels, needs_emulator
from tests.sparse.cases import Texts, texts

pytestmark = needs_emulator
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
few = settings(
    max_examples=int(os.environ.get("M3_SIMT_EXAMPLES", "25")),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="session")
def simt() -> Any:
    return load_kernels()


def ragged(lengths: list[int], distinct: int, seed: int = 0) -> Texts:
    ids = torch.randint(0, distinct, (sum(lengths),), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return Texts(ids, offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64)), (0, 3), seed)


def check_pool(simt: Any, case: Texts, dtype: torch.dtype) -> None:
    weights = case.integers(0, 4, case.rows).to(dtype)
    arguments = (case.token_ids, case.offsets, list(case.ignored_ids))
    result = simt.sparse_pool(weights, *arguments)
    expected = reference.sparse_pool(weights, *arguments)
    for value, wanted in zip(result, expected):
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)
    grad = case.integers(-3, 3, case.rows).to(dtype)
    by_formula = reference.sparse_pool_backward(grad, expected[3])
    torch.testing.assert_close(simt.sparse_pool_backward(grad, result[3]), by_formula, rtol=0, atol=0)


@few
@given(texts(), st.sampled_from(DTYPES))
def test_pool(simt: Any, case: Texts, dtype: torch.dtype) -> None:
    check_pool(simt, case, dtype)


@pytest.mark.parametrize("distinct", [2, 700, 1_000_000])
def test_pool_of_sequences_longer_than_a_tile_merges_in_global_memory(simt: Any, distinct: int) -> None:
    check_pool(simt, ragged([2048, 0, 2049, 1, 8192, 5000], distinct), torch.float32)


def test_pool_lets_a_nan_win(simt: Any) -> None:
    weights = torch.tensor([1.0, math.nan, -math.nan, 2.0, math.inf, 0.0])
    ids = torch.tensor([4, 4, 4, 4, 9, 1], dtype=torch.int32)
    pooled, out_ids, offsets, rows = simt.sparse_pool(weights, ids, torch.tensor([0, 6], dtype=torch.int32), [])
    assert out_ids[:2].tolist() == [4, 9]
    assert rows.tolist() == [1, 4, -1, -1, -1, -1]
    assert offsets.tolist() == [0, 2]
    assert pooled[0].isnan()


def check_embed(simt: Any, case: Texts, width: int, dtype: torch.dtype) -> None:
    hidden, weight = case.integers(-2, 2, case.rows, width), case.integers(-2, 2, width)
    grad = case.integers(-3, 3, case.rows)
    arguments = (case.token_ids, case.offsets, list(case.ignored_ids))
    bias = torch.ones(1)
    result = simt.sparse_embed(hidden.to(dtype), weight.to(dtype), bias.to(dtype), *arguments)
    expected = reference.sparse_embed(hidden, weight, bias.double(), *arguments)
    torch.testing.assert_close(result[0], expected[0].to(dtype), rtol=0, atol=0)
    for value, wanted in zip(result[1:], expected[1:]):
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)
    grads = simt.sparse_embed_backward(grad.to(dtype), hidden.to(dtype), weight.to(dtype), result[3])
    for value, wanted in zip(grads, reference.sparse_embed_backward(grad, hidden, weight, expected[3])):
        torch.testing.assert_close(value, wanted.to(dtype), rtol=0, atol=0)


@few
@given(texts(), st.sampled_from(DTYPES), st.sampled_from([1, 7, 8, 40]))
def test_embed(simt: Any, case: Texts, dtype: torch.dtype, width: int) -> None:
    check_embed(simt, case, width, dtype)


@pytest.mark.parametrize(("width", "dtype"), [(1024, torch.bfloat16), (1032, torch.float32), (300, torch.float16)])
def test_embed_of_wide_rows_in_several_column_tiles_and_parts(simt: Any, width: int, dtype: torch.dtype) -> None:
    check_embed(simt, ragged([70, 0, 30], 40), width, dtype)


def test_embed_of_rows_that_are_not_aligned(simt: Any) -> None:
    memory = torch.ones(6 * 8 + 1, dtype=torch.bfloat16)
    hidden = memory[1:].view(6, 8)
    assert hidden.data_ptr() % 16 != 0
    case = ragged([6], 20)
    weights = simt.sparse_embed(hidden, memory[:8].clone(), memory[:1].clone(), case.token_ids, case.offsets, [])[0]
    assert set(weights.tolist()) <= {9.0, 0.0}


def sides(case: Texts, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    weights = case.integers(0, 3, case.rows)
    pooled, ids, offsets, _ = reference.sparse_pool(weights, case.token_ids, case.offsets, case.ignored_ids)
    return ids, pooled.to(dtype), offsets


def check_scores(simt: Any, queries: Texts, passages: Texts, dtype: torch.dtype) -> None:
    arguments = (*sides(queries, dtype), *sides(passages, dtype))
    exact = [x.double() if x.is_floating_point() else x for x in arguments]
    scores = simt.sparse_scores(*arguments)
    torch.testing.assert_close(scores.double(), reference.sparse_scores(*exact), rtol=0, atol=0)
    grad = queries.integers(-2, 2, *scores.shape)
    grads = simt.sparse_scores_backward(grad.float(), *arguments)
    for value, wanted in zip(grads, reference.sparse_scores_backward(grad, *exact)):
        torch.testing.assert_close(value, wanted.to(dtype), rtol=0, atol=0)


@few
@given(texts(), texts(), st.sampled_from(DTYPES))
def test_scores(simt: Any, queries: Texts, passages: Texts, dtype: torch.dtype) -> None:
    check_scores(simt, queries, passages, dtype)


@pytest.mark.parametrize("swapped", [False, True])
def test_scores_of_texts_longer_than_a_table_and_of_many_passages(simt: Any, swapped: bool) -> None:
    long, many = ragged([2600, 5], 100_000, 1), ragged([3, 0, 9, 1700] + [2] * 66, 100_000, 2)
    check_scores(simt, *((many, long) if swapped else (long, many)), torch.float32)


PACKED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool)


@few
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5), st.sampled_from(PACKED_DTYPES), st.sampled_from([1, 3, 8, 40])
)
def test_pack_and_unpack(simt: Any, lengths: list[int], dtype: torch.dtype, width: int) -> None:
    offsets = offsets_from_lengths(torch.tensor(lengths))
    rows = torch.randint(0, 2, (sum(lengths), width)).to(dtype)
    padded = simt.unpack(rows, offsets, max(lengths) + 1)
    assert torch.equal(padded, packing.unpack(rows, offsets, max(lengths) + 1))
    assert torch.equal(simt.pack(padded, offsets, sum(lengths)), rows)


def test_packing_with_offsets_that_do_not_fit_stays_inside_the_tensors(simt: Any) -> None:
    beyond = torch.tensor([0, 2, 9], dtype=torch.int32)
    assert simt.pack(torch.ones(2, 3, 2), beyond, 6)[5].tolist() == [0, 0]
    assert simt.unpack(torch.ones(4, 2), beyond, 5)[1, :, 0].tolist() == [1, 1, 0, 0, 0]
