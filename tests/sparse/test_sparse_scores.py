"""Lexical scores of all pairs: values and gradients against dictionaries and the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from m3kernels import SparseBatch, offsets_from_lengths, sparse_pool, sparse_scores
from m3kernels.sparse import reference
from tests.sparse.cases import DTYPES, Texts, texts

SCORED_DTYPES = DTYPES[:3]


def batch_of(case: Texts, dtype: torch.dtype) -> SparseBatch:
    """With capacity above the entries, as the ops return it."""
    batch = sparse_pool(case.integers(0, 3, case.rows), case.token_ids, case.offsets, case.ignored_ids)
    return batch._replace(weights=batch.weights.to(dtype).requires_grad_())


def random_batch(lengths: list[int], vocabulary: int, seed: int) -> SparseBatch:
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    ids = torch.randint(0, vocabulary, (rows,), generator=generator, dtype=torch.int32)
    return sparse_pool(torch.rand(rows, generator=generator), ids, offsets_from_lengths(torch.tensor(lengths)))


@given(texts(), texts(), st.sampled_from(DTYPES))
def test_scores_equal_dictionaries(queries: Texts, passages: Texts, dtype: torch.dtype) -> None:
    left, right = batch_of(queries, dtype), batch_of(passages, dtype)
    expected = [[sum(w * p[i] for i, w in q.items() if i in p) for p in right.to_dicts()] for q in left.to_dicts()]
    scores = sparse_scores(left, right)
    assert scores.shape == (len(left.offsets) - 1, len(right.offsets) - 1)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert scores.tolist() == expected


@given(texts(), texts(), st.sampled_from(SCORED_DTYPES))
def test_gradients_equal_the_float64_reference_exactly_on_whole_numbers(
    queries: Texts, passages: Texts, dtype: torch.dtype
) -> None:
    left, right = batch_of(queries, dtype), batch_of(passages, dtype)
    scores = sparse_scores(left, right)
    upstream = queries.integers(-2, 2, *scores.shape)
    grads = torch.autograd.grad(scores, [left.weights, right.weights], upstream.to(scores.dtype))
    sides = [x.detach().double() if x.is_floating_point() else x for x in (*left, *right)]
    weights = [sides[1].requires_grad_(), sides[4].requires_grad_()]
    by_formula = reference.sparse_scores_backward(upstream, *sides)
    for grad, value in zip(grads, by_formula):
        torch.testing.assert_close(grad, value.to(dtype), rtol=0, atol=0)
    if upstream.numel():
        by_autograd = torch.autograd.grad(reference.sparse_scores(*sides), weights, upstream)
        torch.testing.assert_close(by_formula, by_autograd, rtol=0, atol=0)


@pytest.mark.parametrize(("query_length", "passage_length"), [(30, 400), (400, 30)])
def test_errors_stay_within_float32_sums_whichever_side_is_indexed(query_length: int, passage_length: int) -> None:
    left = random_batch([query_length, 0, 1, query_length] * 5, 1000, 1)
    right = random_batch([passage_length, 3, 0, passage_length] * 9, 1000, 2)
    for side in (left, right):
        side.weights.requires_grad_()
    scores = sparse_scores(left, right)
    sides = [x.detach().double() if x.is_floating_point() else x for x in (*left, *right)]
    weights = [sides[1].requires_grad_(), sides[4].requires_grad_()]
    expected = reference.sparse_scores(*sides)
    # Sums of n positive terms below 1: n rounding errors of half a unit in the last place of at most n.
    longest = max(int(left.offsets.diff().max()), int(right.offsets.diff().max()))
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(scores.double(), expected, rtol=longest * eps, atol=0)
    upstream = torch.randn(scores.shape, generator=torch.Generator().manual_seed(5))
    grads = torch.autograd.grad(scores, [left.weights, right.weights], upstream)
    grads_expected = torch.autograd.grad(expected, weights, upstream.double())
    for grad, value, terms in zip(grads, grads_expected, (scores.shape[1], scores.shape[0])):
        bound = terms * eps * float(upstream.abs().max()) * terms
        torch.testing.assert_close(grad.double(), value, rtol=eps, atol=bound)


def test_a_weight_that_is_not_finite_touches_only_pairs_that_share_its_id() -> None:
    queries = SparseBatch.from_dicts([{1: math.nan, 2: 1.0}, {2: math.inf}])
    passages = SparseBatch.from_dicts([{1: 2.0}, {2: 3.0}, {3: 1.0}])
    for scores in (sparse_scores(queries, passages), reference.sparse_scores(*queries, *passages)):
        assert scores.isnan().tolist() == [[True, False, False], [False, False, False]]
        assert scores[1].tolist() == [0, math.inf, 0]
        assert scores[0, 1:].tolist() == [3, 0]


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    left, right = random_batch([200] * 20, 300, 3), random_batch([150] * 50, 300, 4)

    def run() -> list[Tensor]:
        for side in (left, right):
            side.weights.requires_grad_()
        scores = sparse_scores(left, right)
        return [scores, *torch.autograd.grad(scores.square().sum(), [left.weights, right.weights])]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(4)
        together = run()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


def test_batches_that_are_not_sorted_or_do_not_fit_are_refused() -> None:
    good = SparseBatch.from_dicts([{1: 1.0, 2: 1.0}, {1: 1.0}])
    offsets = good.offsets
    with pytest.raises(ValueError, match=r"passages\.token_ids must increase within a text, got 2, 2 at entry 0"):
        sparse_scores(good, good._replace(token_ids=torch.tensor([2, 2, 1]).int()))
    with pytest.raises(ValueError, match=r"queries\.offsets ends at 4, but there are 3 entries"):
        sparse_scores(good._replace(offsets=offsets + torch.tensor([0, 1, 1]).int()), good)
    with pytest.raises(ValueError, match=r"queries\.offsets\[0\] is 1"):
        sparse_scores(good._replace(offsets=torch.tensor([1, 3]).int()), good)
