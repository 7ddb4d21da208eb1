"""The Triton MaxSim kernels, run by the checking interpreter, agree with the float64 reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from m3kernels import _tiles
from m3kernels.maxsim import reference, triton_kernels

QUERIES, PASSAGES = (5, 0, 1, 33), (20, 1, 0, 70, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def one_tile(block_m: int, block_n: int, block_k: int) -> _tiles.TileTable:
    tiles = {kernel: [block_m, block_n, block_k, 4, 1] for kernel in ("forward", "pairs_forward", "backward_p")}
    tiles["backward_q"] = [4, 64, 4, 1]
    entries = {
        kernel: {arithmetic: {"1024": tile} for arithmetic in ("16bit", "float32")} for kernel, tile in tiles.items()
    }
    return _tiles.TileTable(80, entries)


TILES = one_tile(32, 32, 32)


def offsets_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def inputs(
    width: int, dtype: torch.dtype, queries: tuple[int, ...] = QUERIES, passages: tuple[int, ...] = PASSAGES
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    rows = [torch.randn(sum(lengths), width, generator=generator).to(dtype) for lengths in (queries, passages)]
    return rows[0], rows[1], offsets_of(queries), offsets_of(passages)


def wide(rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (rows[0].double(), rows[1].double(), *rows[2:])


def check_scores(actual: Tensor, expected: Tensor, width: int) -> None:
    """Products of 16-bit numbers are exact in float32; E of them, with row norms of √E, add up in float32."""
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=2**-23 * width**0.5 * 8)


def check_gradients(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """16-bit gradients: one rounding of the result, and of the weights to tf32 on a GPU."""
    bound = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for name, value, truth in zip(("queries", "passages"), actual, expected):
        assert value.dtype == dtype
        error = float((value.double() - truth).norm() / truth.norm().clamp_min(1e-6))
        assert error <= bound, (name, error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "mean"), [(8, True), (72, False)])
def test_scores_winners_and_gradients_on_ragged_batches(width: int, mean: bool, dtype: torch.dtype) -> None:
    rows = inputs(width, dtype)
    scores, argmax = triton_kernels.forward(*rows, None, mean, True, False, TILES)
    expected, expected_argmax = reference.maxsim(*wide(rows), None, mean)
    check_scores(scores, expected, width)
    assert torch.equal(argmax, expected_argmax)
    grad = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    grads = triton_kernels.backward(grad, *rows, None, argmax, mean, False, TILES)
    check_gradients(grads, reference.maxsim_backward(grad.double(), *wide(rows), argmax, mean), dtype)


def test_zero_floor_and_an_argmax_computed_again() -> None:
    rows = inputs(16, torch.float32)
    rows[1].sub_(2 * rows[0][0])  # so that several maxima are negative
    floor = torch.tensor([True, True, True, False, True])
    scores, argmax = triton_kernels.forward(*rows, floor, True, True, False, TILES)
    expected, expected_argmax = reference.maxsim(*wide(rows), floor, True)
    check_scores(scores, expected, 64)
    assert torch.equal(argmax, expected_argmax)
    assert (argmax[:, 0] == -1).any() and (argmax[:, 3] >= 0).all()
    unsaved = triton_kernels.forward(*rows, floor, True, False, False, TILES)
    assert torch.equal(unsaved[0], scores) and unsaved[1].shape == (0, 5)
    grad = torch.ones_like(scores)
    saved = triton_kernels.backward(grad, *rows, floor, argmax, True, False, TILES)
    again = triton_kernels.backward(grad, *rows, floor, unsaved[1], True, False, TILES)
    assert all(torch.equal(a, b) for a, b in zip(saved, again))


def test_of_equal_similarities_the_lowest_row_wins() -> None:
    rows = inputs(8, torch.float32)
    rows[0].fill_(1.0)
    rows[1].fill_(0.5)
    _, argmax = triton_kernels.forward(*rows, None, True, True, False, TILES)
    begins = rows[3][:-1].clone()
    begins[2] = -1  # the empty passage
    assert torch.equal(argmax, begins.expand(argmax.shape[0], -1))


def test_infinities_and_nan_pass_through() -> None:
    rows = inputs(8, torch.float32, (3,), (5, 70, 4))
    rows[0].fill_(1.0)
    rows[1][2], rows[1][40], rows[1][75:] = torch.inf, torch.nan, -torch.inf
    scores, argmax = triton_kernels.forward(*rows, None, True, True, False, TILES)
    expected, expected_argmax = reference.maxsim(*rows, None, True)
    torch.testing.assert_close(scores, expected, equal_nan=True)
    assert scores[0, 0] == torch.inf and scores[0, 1].isnan() and scores[0, 2] == -torch.inf
    assert torch.equal(argmax, expected_argmax)
    pairs = torch.tensor([[0, 1], [0, 2]], dtype=torch.int32)
    listed = triton_kernels.pairs_forward(*rows, pairs, None, True, False, TILES)
    torch.testing.assert_close(listed, expected[0, 1:], equal_nan=True)


def test_pairs_with_empty_sides_and_a_pair_listed_twice() -> None:
    rows = inputs(24, torch.float32)
    pairs = torch.tensor([[3, 3], [0, 0], [1, 0], [3, 2], [2, 4], [3, 3]], dtype=torch.int32)
    floor = torch.tensor([True, False, False, True, False])
    for mean, zero_floor in ((True, None), (False, floor)):
        scores = triton_kernels.pairs_forward(*rows, pairs, zero_floor, mean, False, TILES)
        check_scores(scores, reference.maxsim_pairs(*wide(rows), pairs, zero_floor, mean), 24 * 33)
        grad = torch.arange(1.0, 7.0)
        grads = triton_kernels.pairs_backward(grad, *rows, pairs, zero_floor, mean, False, TILES)
        truth = reference.maxsim_pairs_backward(grad.double(), *wide(rows), pairs, zero_floor, mean)
        check_gradients(grads, truth, torch.float32)


def test_small_gradients_of_float16_rows_do_not_vanish() -> None:
    rows = inputs(16, torch.float16)
    scores, argmax = triton_kernels.forward(*rows, None, True, True, False, TILES)
    grad = torch.full_like(scores, 1e-4)
    grads = triton_kernels.backward(grad, *rows, None, argmax, True, False, TILES)
    assert all(x.any() for x in grads)


@pytest.mark.parametrize(("queries", "passages"), [((), (3,)), ((0,), (0, 0)), ((4,), ()), ((4, 0), (0,))], ids=str)
def test_nothing_on_a_side(queries: tuple[int, ...], passages: tuple[int, ...]) -> None:
    rows = inputs(8, torch.float32, queries, passages)
    scores, argmax = triton_kernels.forward(*rows, None, True, True, False, TILES)
    assert scores.shape == (len(queries), len(passages)) and not scores.any()
    grads = triton_kernels.backward(torch.ones_like(scores), *rows, None, argmax, True, False, TILES)
    assert not any(x.any() for x in grads)
    pairs = torch.zeros(0, 2, dtype=torch.int32)
    assert triton_kernels.pairs_forward(*rows, pairs, None, True, False, TILES).shape == (0,)


@pytest.mark.parametrize("architecture", sorted(_tiles.load("maxsim")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_the_tiles_that_each_architecture_uses(architecture: int, dtype: torch.dtype) -> None:
    tiles = _tiles.for_architecture("maxsim", architecture)
    rows = inputs(136, dtype, (100, 40), (150, 3))
    scores, argmax = triton_kernels.forward(*rows, None, True, True, False, tiles)
    expected, expected_argmax = reference.maxsim(*wide(rows), None, True)
    check_scores(scores, expected, 136)
    assert torch.equal(argmax, expected_argmax)
    grad = torch.ones_like(scores)
    grads = triton_kernels.backward(grad, *rows, None, argmax, True, False, tiles)
    check_gradients(grads, reference.maxsim_backward(grad.double(), *wide(rows), argmax, True), dtype)
