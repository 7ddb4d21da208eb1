"""The sparse head: values, winners and gradients against dictionaries and the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from m3kernels import SparseBatch, offsets_from_lengths, sparse_embed, sparse_pool
from m3kernels.sparse import reference
from m3kernels.sparse.batch import NO_ID
from tests.sparse.cases import DTYPES, Texts, entries, pooled, texts


def check_capacity(batch: SparseBatch, rows: int) -> None:
    count = int(batch.offsets[-1])
    assert batch.token_ids.shape == batch.weights.shape == (rows,)
    assert (batch.token_ids[count:] == NO_ID).all()
    assert (batch.weights[count:] == 0).all()


@given(texts(), st.sampled_from(DTYPES), st.integers(0, 4))
def test_pool_equals_dictionaries_with_ties_and_zeros(case: Texts, dtype: torch.dtype, highest: int) -> None:
    weights = case.integers(0, highest, case.rows).to(dtype)
    batch = sparse_pool(weights, case.token_ids, case.offsets, case.ignored_ids)
    expected = pooled(weights, case.token_ids, case.offsets, case.ignored_ids)
    assert entries(batch) == [[(token, weight) for token, (weight, _) in text.items()] for text in expected]
    assert batch.weights.dtype == dtype
    check_capacity(batch, case.rows)


@given(texts(), st.sampled_from(DTYPES))
def test_pool_sends_each_gradient_to_the_first_of_equal_rows(case: Texts, dtype: torch.dtype) -> None:
    weights = case.integers(0, 2, case.rows).to(dtype).requires_grad_()
    batch = sparse_pool(weights, case.token_ids, case.offsets, case.ignored_ids)
    upstream = torch.arange(1, case.rows + 1).to(dtype)
    (grad,) = torch.autograd.grad(batch.weights, weights, upstream)
    expected = torch.zeros_like(grad)
    winners = [
        row
        for text in pooled(weights.detach(), case.token_ids, case.offsets, case.ignored_ids)
        for _, row in text.values()
    ]
    expected[winners] = upstream[: len(winners)]
    torch.testing.assert_close(grad, expected, rtol=0, atol=0)


@given(texts(), st.sampled_from(DTYPES), st.sampled_from([1, 8, 31, 32, 33, 100]))
def test_embed_equals_the_float64_reference_exactly_on_whole_numbers(
    case: Texts, dtype: torch.dtype, width: int
) -> None:
    hidden = case.integers(-2, 2, case.rows, width).to(dtype).requires_grad_()
    weight = case.integers(-2, 2, width).to(dtype).requires_grad_()
    bias = torch.ones(1, dtype=dtype, requires_grad=True)
    batch = sparse_embed(hidden, weight, bias, case.token_ids, case.offsets, case.ignored_ids)
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = reference.sparse_embed(*leaves, case.token_ids, case.offsets, case.ignored_ids)
    torch.testing.assert_close(batch.weights, expected[0].to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(batch.token_ids, expected[1], rtol=0, atol=0)
    torch.testing.assert_close(batch.offsets, expected[2], rtol=0, atol=0)
    check_capacity(batch, case.rows)
    upstream = case.integers(-3, 3, case.rows)
    grads = torch.autograd.grad(batch.weights, [hidden, weight, bias], upstream.to(dtype))
    expected_grads = torch.autograd.grad(expected[0], leaves, upstream)
    for grad, value in zip(grads, expected_grads):
        torch.testing.assert_close(grad, value.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embed_error_stays_within_float32_sums_and_one_rounding(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    lengths, width = [512, 0, 1, 1300], 1024
    rows = sum(lengths)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(width, generator=generator) / 32).to(dtype).requires_grad_()
    bias = torch.full((1,), 0.25, dtype=dtype, requires_grad=True)
    ids = torch.randint(0, 250_002, (rows,), generator=generator, dtype=torch.int32)
    offsets = offsets_from_lengths(torch.tensor(lengths))
    batch = sparse_embed(hidden, weight, bias, ids, offsets, (0, 1, 2, 3))
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = reference.sparse_embed(*leaves, ids, offsets, (0, 1, 2, 3))
    # 32 lanes of width / 32 terms, then 5 additions; a lane's rounding errors stay below its sum of absolute values.
    largest = float((leaves[0].detach().abs() @ leaves[1].detach().abs()).max())
    summed = (width / 32 + 6) * torch.finfo(torch.float32).eps * largest
    assert torch.equal(batch.token_ids, expected[1])
    torch.testing.assert_close(batch.weights.double(), expected[0], rtol=torch.finfo(dtype).eps, atol=summed)
    upstream = torch.randn(rows, generator=generator).to(dtype)
    grads = torch.autograd.grad(batch.weights, [hidden, weight, bias], upstream)
    expected_grads = torch.autograd.grad(expected[0], leaves, upstream.double())
    live = int(batch.offsets[-1])
    terms = upstream[:live].double().abs()
    for grad, value, size in zip(grads, expected_grads, (0.0, float(terms.sum()) * 5, float(terms.sum()))):
        bound = 2 * rows**0.5 * torch.finfo(torch.float32).eps * size
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        torch.testing.assert_close(grad.double(), value, rtol=torch.finfo(dtype).eps, atol=bound + smallest)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_weights_win_and_infinite_weights_stay(dtype: torch.dtype) -> None:
    weights = torch.tensor([1.0, math.nan, math.nan, 2.0, math.inf, 3.0, -math.inf], dtype=dtype, requires_grad=True)
    ids = torch.tensor([4, 4, 4, 4, 9, 9, 2], dtype=torch.int32)
    offsets = torch.tensor([0, 7], dtype=torch.int32)
    batch = sparse_pool(weights, ids, offsets)
    assert batch.token_ids[:2].tolist() == [4, 9]
    assert batch.offsets.tolist() == [0, 2]
    assert batch.weights[0].isnan()
    assert batch.weights[1] == math.inf
    (grad,) = torch.autograd.grad(batch.weights[:2].sum(), weights)
    assert grad.tolist() == [0, 1, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_in_the_hidden_states_shows_in_the_sparse_vector_and_in_the_gradients(dtype: torch.dtype) -> None:
    hidden = torch.ones(2, 8, dtype=dtype)
    hidden[1, 3] = math.nan
    weight = torch.ones(8, dtype=dtype, requires_grad=True)
    offsets = torch.tensor([0, 2], dtype=torch.int32)
    batch = sparse_embed(hidden, weight, torch.zeros(1, dtype=dtype), torch.tensor([3, 3]).int(), offsets)
    assert batch.weights[0].isnan()
    (grad,) = torch.autograd.grad(batch.weights.sum(), weight)
    assert grad.isnan().tolist() == [False] * 3 + [True] + [False] * 4


def test_weights_that_the_dtype_rounds_to_zero_are_left_out() -> None:
    hidden = torch.tensor([[2.0**-13], [1.0]], dtype=torch.float16)
    weight = torch.tensor([2.0**-13], dtype=torch.float16)
    offsets = torch.tensor([0, 2], dtype=torch.int32)
    batch = sparse_embed(hidden, weight, torch.zeros(1).half(), torch.tensor([1, 2]).int(), offsets)
    assert entries(batch) == [[(2, 2.0**-13)]]


def test_float16_values_widen_exactly() -> None:
    every = torch.arange(1, 0x7C01, dtype=torch.int32).to(torch.int16).view(torch.float16)
    ids = torch.arange(every.shape[0], dtype=torch.int32)
    offsets = torch.tensor([0, every.shape[0]], dtype=torch.int32)
    batch = sparse_pool(every, ids, offsets)
    assert torch.equal(batch.weights, every)
    embedded = sparse_embed(every[:, None], torch.ones(1).half(), torch.zeros(1).half(), ids, offsets)
    assert torch.equal(embedded.weights, every)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3000, 64, generator=generator, requires_grad=True)
    weight = torch.randn(64, generator=generator, requires_grad=True)
    ids = torch.randint(0, 500, (3000,), generator=generator, dtype=torch.int32)
    offsets = torch.tensor([0, 10, 2000, 2000, 3000], dtype=torch.int32)

    def run() -> list[Tensor]:
        batch = sparse_embed(hidden, weight, torch.zeros(1), ids, offsets)
        return [*batch, *torch.autograd.grad(batch.weights.square().sum(), [hidden, weight])]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(4)
        together = run()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


def test_non_contiguous_hidden_states_give_the_same() -> None:
    hidden = torch.randn(6, 9)[:, ::2].requires_grad_()
    ids = torch.tensor([1, 2, 1, 3, 3, 2], dtype=torch.int32)
    offsets = torch.tensor([0, 6], dtype=torch.int32)
    arguments = (torch.ones(5), torch.zeros(1), ids, offsets, [])
    torch.library.opcheck(torch.ops.m3.sparse_embed, (hidden, *arguments))
    strided = torch.ops.m3.sparse_embed(hidden, *arguments)
    dense = torch.ops.m3.sparse_embed(hidden.contiguous(), *arguments)
    assert all(torch.equal(a, b) for a, b in zip(strided, dense))


@pytest.mark.parametrize("token", [-1, NO_ID])
def test_token_ids_out_of_range_are_refused(token: int) -> None:
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"token_ids run from {token} to {token}; accepted: 0 to 2147483646"):
        sparse_pool(torch.ones(1), torch.tensor([token], dtype=torch.int32), offsets)


def test_more_rows_than_int32_offsets_can_number_are_refused() -> None:
    rows = torch.ones(1).expand(2**31)
    with pytest.raises(ValueError, match=r"there are 2147483648 rows; accepted: fewer than 2\*\*31"):
        sparse_pool(rows, torch.ones(1, dtype=torch.int32).expand(2**31), torch.zeros(2, dtype=torch.int32))
