"""maxsim and maxsim_pairs on the CPU agree with the float64 reference: values, winners, ties, gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import m3kernels
from m3kernels import _library
from m3kernels.maxsim import reference
from tests.cpu_paths import ISAS, why_missing
from tests.maxsim.cases import (
    DTYPES,
    Batch,
    offsets_of,
    ragged_batch,
    ragged_batches,
    similarity_bound,
)

pytestmark = pytest.mark.skipif(
    _library.cpu_kernel("maxsim_forward") is None, reason="the compiled CPU kernels are missing"
)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if reason := why_missing(request.param):
        pytest.skip(f"this machine lacks {request.param}: {reason}")
    monkeypatch.setenv("M3_CPU_ISA", request.param)
    yield request.param


def forward(batch: Batch, floor: bool = False, mean: bool = True) -> tuple[Tensor, Tensor]:
    scores, argmax = torch.ops.m3.maxsim_forward(*batch.rows, batch.zero_floor if floor else None, mean, True, False)
    return scores, argmax


def assert_winners_are_maxima(batch: Batch, floor: bool, argmax: Tensor) -> None:
    """Each winner's similarity is within rounding of the best one in float64, and it is a row of its passage."""
    wide = batch.to(torch.float64)
    _, expected = reference.maxsim(*wide.rows, batch.zero_floor if floor else None)
    differ = (argmax != expected).nonzero().tolist()
    bound = 2 * similarity_bound(batch)
    for row, _passage in differ:
        pair = argmax[row, _passage], expected[row, _passage]
        values = [
            wide.queries[row] @ wide.passages[j] if j >= 0 else torch.zeros((), dtype=torch.float64) for j in pair
        ]
        assert abs(values[0] - values[1]) <= bound, (row, _passage, pair)


@settings(deadline=None, max_examples=60)
@given(batch=ragged_batches(), dtype=st.sampled_from(DTYPES), floor=st.booleans(), mean=st.booleans())
def test_scores_and_winners_agree_with_float64_on_ragged_batches(
    batch: Batch, dtype: torch.dtype, floor: bool, mean: bool
) -> None:
    batch = batch.to(dtype)
    scores, argmax = forward(batch, floor, mean)
    expected, _ = reference.maxsim(*batch.to(torch.float64).rows, batch.zero_floor if floor else None, mean)
    rows = max([1, *batch.query_offsets.diff().tolist()])
    # Half an ulp of the float32 score comes on top of the errors of the similarities.
    bound = similarity_bound(batch) * (1 if mean else rows)
    torch.testing.assert_close(scores.double(), expected, atol=bound, rtol=torch.finfo(torch.float32).eps)
    assert_winners_are_maxima(batch, floor, argmax)


def test_every_instruction_set_agrees_with_float64(isa: str) -> None:
    for width in (8, 72, 1024):
        # Tails of passage tiles, panels of one vector and of two, and a group of panels larger than the cache share.
        batch = ragged_batch([1, 0, 37, 16, 90, 8], [13, 1, 0, 29, 6, 12], width)
        for dtype in DTYPES:
            narrow = batch.to(dtype)
            for floor in (False, True):
                scores, argmax = forward(narrow, floor)
                expected, _ = reference.maxsim(*narrow.to(torch.float64).rows, batch.zero_floor if floor else None)
                torch.testing.assert_close(scores.double(), expected, atol=similarity_bound(narrow), rtol=1e-7)
                assert_winners_are_maxima(narrow, floor, argmax)


@settings(deadline=None, max_examples=40)
@given(batch=ragged_batches(), dtype=st.sampled_from(DTYPES), floor=st.booleans(), data=st.data())
def test_pairs_equal_the_entries_of_the_full_matrix(
    batch: Batch, dtype: torch.dtype, floor: bool, data: st.DataObject
) -> None:
    batch = batch.to(dtype)
    queries, passages = batch.query_offsets.shape[0] - 1, batch.passage_offsets.shape[0] - 1
    numbers = st.tuples(st.integers(0, max(queries - 1, 0)), st.integers(0, max(passages - 1, 0)))
    chosen = data.draw(st.lists(numbers, max_size=12)) if queries and passages else []
    pairs = torch.tensor(chosen, dtype=torch.int32).reshape(-1, 2)
    zero_floor = batch.zero_floor if floor else False
    scores = m3kernels.maxsim_pairs(*batch.rows, pairs, zero_floor=zero_floor)
    everything = m3kernels.maxsim(*batch.rows, zero_floor=zero_floor)
    # Bit for bit: a similarity does not depend on the tile that computes it.
    assert torch.equal(scores, everything[pairs[:, 0].long(), pairs[:, 1].long()])


def gradients(batch: Batch, seed: int, pairs: Tensor | None = None, **options: object) -> tuple[Tensor, Tensor]:
    queries, passages = (x.detach().clone().requires_grad_() for x in (batch.queries, batch.passages))
    rows = (queries, passages, batch.query_offsets, batch.passage_offsets)
    scores = m3kernels.maxsim(*rows, **options) if pairs is None else m3kernels.maxsim_pairs(*rows, pairs, **options)  # type: ignore[arg-type]
    grad = torch.randn(scores.shape, generator=torch.Generator().manual_seed(seed))
    grads = torch.autograd.grad(scores, (queries, passages), grad.to(scores.dtype))
    return grads[0], grads[1]


def score_gradients(batch: Batch, seed: int) -> Tensor:
    shape = (batch.query_offsets.shape[0] - 1, batch.argmax_columns)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients_of_winners(batch: Batch, floor: bool, grad: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, of the winners that the kernel found: where two rows are closer than rounding, either may win."""
    _, argmax = forward(batch, floor)
    assert_winners_are_maxima(batch, floor, argmax)
    return reference.maxsim_backward(grad.double(), *batch.to(torch.float64).rows, argmax, True)


def assert_gradients_close(batch: Batch, actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Sums of at most Np (or Tq) products in float32, rounded once to the dtype of the rows."""
    terms = max(batch.argmax_columns, batch.queries.shape[0]) + 2
    for side, other, found, wanted in zip("qp", (batch.passages, batch.queries), actual, expected):
        largest = float(other.double().abs().max()) if other.numel() else 0.0
        bound = terms**1.5 * torch.finfo(torch.float32).eps * 4 * largest
        torch.testing.assert_close(
            found.double(),
            wanted.double(),
            atol=bound,
            rtol=torch.finfo(found.dtype).eps,
            msg=lambda m, side=side: f"{side}: {m}",
        )


@settings(deadline=None, max_examples=40)
@given(batch=ragged_batches(), dtype=st.sampled_from(DTYPES), floor=st.booleans(), recompute=st.booleans())
def test_gradients_agree_with_float64_on_ragged_batches(
    batch: Batch, dtype: torch.dtype, floor: bool, recompute: bool
) -> None:
    batch = batch.to(dtype)
    zero_floor = batch.zero_floor if floor else False
    actual = gradients(batch, 0, zero_floor=zero_floor, recompute_argmax=recompute)
    assert_gradients_close(batch, actual, gradients_of_winners(batch, floor, score_gradients(batch, 0)))


@settings(deadline=None, max_examples=30)
@given(batch=ragged_batches(), dtype=st.sampled_from(DTYPES), floor=st.booleans(), seed=st.integers(0, 99))
def test_gradients_of_pairs_agree_with_float64(batch: Batch, dtype: torch.dtype, floor: bool, seed: int) -> None:
    batch = batch.to(dtype)
    queries, passages = batch.query_offsets.shape[0] - 1, batch.passage_offsets.shape[0] - 1
    generator = torch.Generator().manual_seed(seed)
    count = 7 if queries and passages else 0
    columns = [torch.randint(0, max(n, 1), (count,), generator=generator) for n in (queries, passages)]
    pairs = torch.stack(columns, 1).to(torch.int32)
    zero_floor = batch.zero_floor if floor else False
    actual = gradients(batch, 1, pairs, zero_floor=zero_floor)
    of_pairs = torch.randn(count, generator=torch.Generator().manual_seed(1))
    grad = torch.zeros(queries, passages).index_put_((columns[0], columns[1]), of_pairs, accumulate=True)
    assert_gradients_close(batch, actual, gradients_of_winners(batch, floor, grad))


def test_gradients_agree_on_every_instruction_set(isa: str) -> None:
    batch = ragged_batch([5, 0, 33], [9, 1, 0, 17], 200)
    for dtype in DTYPES:
        narrow = batch.to(dtype)
        assert_gradients_close(narrow, gradients(narrow, 2), gradients(narrow.to(torch.float64), 2))


def test_first_of_equal_rows_wins_and_alone_gets_the_gradient(isa: str) -> None:
    row = torch.randn(64, generator=torch.Generator().manual_seed(0))
    # 40 copies of one row: whatever tile and tail a copy falls into, its similarity is the same number.
    batch = Batch(row.repeat(3, 1), row.repeat(40, 1), offsets_of([3]), offsets_of([0, 40]), torch.zeros(2) > 0)
    scores, argmax = forward(batch)
    assert argmax[:, 1].tolist() == [0, 0, 0]
    assert argmax[:, 0].tolist() == [-1, -1, -1]
    assert scores[0, 0] == 0
    _, grad = gradients(batch, 0)
    assert grad[0].abs().sum() > 0
    assert not grad[1:].any()


def test_zero_floor_lets_the_zero_vector_win_only_below_zero() -> None:
    width = 16
    query = torch.ones(1, width)
    passages = torch.stack([torch.zeros(width), -torch.ones(width), torch.full((width,), -2.0)])
    batch = Batch(query, passages, offsets_of([1]), offsets_of([1, 2]), torch.tensor([True, True]))
    scores, argmax = forward(batch, floor=True)
    # A real row that equals the zero vector wins; two rows below it lose and get no gradient.
    assert scores.tolist() == [[0.0, 0.0]]
    assert argmax.tolist() == [[0, -1]]
    grad_queries, grad_passages = gradients(batch, 0, zero_floor=True)
    assert not grad_passages[1:].any()
    assert not grad_queries.any()


def test_infinities_and_nan_pass_through(isa: str) -> None:
    infinity = float("inf")
    width = 8
    passages = torch.zeros(9, width)
    passages[:3, 0] = torch.tensor([-infinity, -infinity, -infinity])
    passages[3:6, 0] = torch.tensor([1.0, infinity, 2.0])
    passages[6:, 0] = torch.tensor([3.0, float("nan"), infinity])
    query = torch.zeros(1, width)
    query[0, 0] = 1
    # The other columns multiply 0 by 0: only the first column decides.
    batch = Batch(query, passages, offsets_of([1]), offsets_of([3, 3, 3]), torch.zeros(3) > 0)
    scores, argmax = forward(batch)
    assert scores[0, :2].tolist() == [-infinity, infinity]
    assert scores[0, 2].isnan()
    assert argmax[0, :2].tolist() == [0, 4]


def test_results_do_not_depend_on_threads_or_on_the_rest_of_the_batch() -> None:
    batch = ragged_batch([20, 3, 64, 31], [50, 7, 90, 33, 1], 96)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append((*forward(batch), *gradients(batch, 3), *gradients(batch, 3, recompute_argmax=True)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    alone = Batch(
        batch.queries[20:23], batch.passages[57:147], offsets_of([3]), offsets_of([90]), batch.zero_floor[2:3]
    )
    assert torch.equal(forward(alone)[0][0, 0], results[0][0][1, 2])


def test_rows_that_are_not_contiguous_are_read_right() -> None:
    batch = ragged_batch([4, 5], [6, 11], 32)
    wide = Batch(
        torch.cat([batch.queries, batch.queries], 1)[:, 32:],
        batch.passages.T.contiguous().T,
        batch.query_offsets,
        batch.passage_offsets,
        batch.zero_floor,
    )
    assert torch.equal(forward(wide)[0], forward(batch)[0])
    for found, wanted in zip(gradients(wide, 0), gradients(batch, 0)):
        assert torch.equal(found, wanted)


def test_no_argmax_is_saved_where_it_is_recomputed() -> None:
    batch = ragged_batch([4], [6, 11], 32)
    queries = batch.queries.clone().requires_grad_()
    rows = (queries, *batch.rows[1:])
    saved, recomputed = (m3kernels.maxsim(*rows, recompute_argmax=flag).grad_fn for flag in (False, True))
    elements = [sum(x.numel() for x in node.saved_tensors if x is not None) for node in (saved, recomputed)]  # type: ignore[union-attr]
    assert elements[0] - elements[1] == queries.shape[0] * 2


def test_an_unknown_or_missing_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M3_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match="M3_CPU_ISA is sse9; accepted: portable"):
        forward(ragged_batch([2], [3], 8))
