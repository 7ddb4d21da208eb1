"""The Triton attention kernels, run by the checking interpreter, agree with the float64 reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from m3kernels import _tiles
from m3kernels.attention import reference
from m3kernels.attention.triton_kernels import HEAD_WIDTHS, Options, backward, forward

RAGGED = (37, 0, 1, 64, 70, 0, 2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = ("forward", "backward_q", "backward_kv")
ARITHMETICS = ("16bit", "float32", "tf32")
VARIANTS = {
    "plain": (None, 0.0),
    "sampled": (0.3, 0.0),
    "dropout": (None, 0.25),
    "sampled_dropout": (0.6, 0.1),
}


def one_tile(block_m: int, block_n: int) -> _tiles.TileTable:
    entries = {kernel: {a: {"128": [block_m, block_n, 4, 1]} for a in ARITHMETICS} for kernel in KERNELS}
    return _tiles.TileTable(80, entries)


def packed(
    lengths: tuple[int, ...], heads: int, width: int, dtype: torch.dtype, seed: int
) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    tensors = [torch.randn(rows, heads, width, generator=generator).to(dtype) for _ in range(4)]
    return tensors, torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def relative_error(actual: Tensor, expected: Tensor, incoming: Tensor) -> float:
    """Of norms. Where the truth cancels to nothing (gradients of a lone token), relative to the incoming tensor."""
    size, fallback = expected.norm(), incoming.norm()
    return float((actual.double() - expected).norm() / (size if size > 1e-3 * fallback else fallback))


def bounds(dtype: torch.dtype, longest: int) -> tuple[float, float]:
    """Of outputs and gradients. 16-bit: one unit for each rounding (weights, result; for gradients also out in δ)."""
    if dtype == torch.float32:
        return 2e-6 * longest**0.5, 2e-6 * longest**0.5
    unit = torch.finfo(dtype).eps / 2
    return 2 * unit, 4 * unit


def check(
    lengths: tuple[int, ...],
    heads: int,
    width: int,
    dtype: torch.dtype,
    tiles: _tiles.TileTable,
    variant: str = "plain",
    scale: float = 0.2,
) -> None:
    (q, k, v, grad_out), offsets = packed(lengths, heads, width, dtype, seed=width + sum(lengths))
    keep_probability, dropout_p = VARIANTS[variant]
    seed = 0x123456789ABCDEF
    options = Options(scale, keep_probability, dropout_p, seed, allow_tf32=False)
    out, log_sum_exp = forward(q, k, v, offsets, options, tiles)
    grads = backward(grad_out, q, k, v, out, log_sum_exp, offsets, options, tiles)

    wide = [x.double() for x in (q, k, v)]
    meaning = (scale, keep_probability, dropout_p, seed)
    expected, expected_sums = reference.flash_attention_varlen(*wide, offsets, *meaning)
    expected_grads = reference.flash_attention_varlen_backward(
        grad_out.double(), *wide, expected, expected_sums, offsets, *meaning
    )
    assert out.dtype == dtype
    output_bound, gradient_bound = bounds(dtype, max(lengths, default=1))
    assert torch.equal(log_sum_exp == -torch.inf, expected_sums == -torch.inf)
    reachable = expected_sums != -torch.inf
    torch.testing.assert_close(log_sum_exp[reachable].double(), expected_sums[reachable], rtol=1e-5, atol=1e-5)
    errors = {"out": (relative_error(out, expected, v.double()), output_bound)}
    for name, grad, expected_grad in zip("qkv", grads, expected_grads):
        assert grad.dtype == dtype
        errors[f"grad_{name}"] = (relative_error(grad, expected_grad, grad_out.double()), gradient_bound)
    print({name: f"{error:.1e}" for name, (error, _) in errors.items()})
    assert all(error <= bound for error, bound in errors.values()), errors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", HEAD_WIDTHS)
def test_every_width_and_dtype_on_a_ragged_batch(width: int, dtype: torch.dtype) -> None:
    check(RAGGED, 2, width, dtype, one_tile(64, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_sampled_attention_and_dropout_draw_what_the_reference_draws(variant: str, dtype: torch.dtype) -> None:
    check(RAGGED, 2, 32, dtype, one_tile(64, 32), variant)


@pytest.mark.parametrize(
    "lengths", [(1,), (0, 0, 1), (128,), (16, 16, 17), (129, 3), (1,) * 9, (0,) * 9 + (33,)], ids=str
)
@pytest.mark.parametrize("blocks", [(32, 32), (128, 64)], ids=str)
def test_any_cut_of_rows_into_sequences_and_tiles(lengths: tuple[int, ...], blocks: tuple[int, int]) -> None:
    check(lengths, 1, 32, torch.float32, one_tile(*blocks))
    check(lengths, 1, 32, torch.float32, one_tile(*blocks), "sampled")


@pytest.mark.parametrize("architecture", sorted(_tiles.load("attention")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_the_tiles_that_each_architecture_uses(architecture: int, dtype: torch.dtype) -> None:
    check((70, 0, 130), 1, 64, dtype, _tiles.for_architecture("attention", architecture), "sampled_dropout")


def test_no_sequences_and_no_rows() -> None:
    for lengths in ((), (0,), (0, 0)):
        (q, k, v, grad_out), offsets = packed(lengths, 2, 32, torch.float32, seed=0)
        options = Options(1.0, None, 0.0, 0, False)
        out, log_sum_exp = forward(q, k, v, offsets, options, one_tile(32, 32))
        grads = backward(grad_out, q, k, v, out, log_sum_exp, offsets, options, one_tile(32, 32))
        assert out.shape == (0, 2, 32) and log_sum_exp.shape == (2, 0)
        assert all(grad.shape == q.shape for grad in grads)


def test_rows_past_the_last_offset_are_neither_read_nor_waited_for() -> None:
    """flash_attention packs for a GPU into as many rows as there can be, not knowing how many there are."""
    (q, k, v, grad_out), offsets = packed((40, 0, 33), 2, 32, torch.float32, seed=5)
    options, tiles = Options(1.0, None, 0.0, 0, False), one_tile(32, 32)
    results = []
    for more in (0, 50):
        rows = [torch.cat([x, torch.full((more, 2, 32), torch.nan)]) for x in (grad_out, q, k, v)]
        out, log_sum_exp = forward(*rows[1:], offsets, options, tiles)
        results.append([x[:73] for x in (out, *backward(*rows, out, log_sum_exp, offsets, options, tiles))])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_a_row_that_attends_to_nothing_gives_zero_and_no_gradient() -> None:
    (q, k, v, grad_out), offsets = packed((1, 1), 1, 32, torch.float32, seed=3)
    options = Options(1.0, 0.5, 0.0, 1, False)
    out, log_sum_exp = forward(q, k, v, offsets, options, one_tile(32, 32))
    grads = backward(grad_out, q, k, v, out, log_sum_exp, offsets, options, one_tile(32, 32))
    assert not out.any() and (log_sum_exp == -torch.inf).all()
    assert not any(grad.any() for grad in grads)


def test_extreme_scores_neither_overflow_nor_hide_a_nan() -> None:
    (q, k, v, grad_out), offsets = packed((50, 30), 1, 32, torch.float32, seed=4)
    q = q * 300
    q[60] = torch.nan
    options = Options(1.0, None, 0.0, 0, False)
    tiles = one_tile(32, 32)
    out, log_sum_exp = forward(q, k, v, offsets, options, tiles)
    expected, expected_sums = reference.flash_attention_varlen(q.double(), k.double(), v.double(), offsets, 1.0)
    # Scores of a thousand carry an absolute error of about 1000 · eps into the exponent.
    torch.testing.assert_close(out.double(), expected, rtol=3e-3, atol=3e-3, equal_nan=True)
    torch.testing.assert_close(log_sum_exp.double(), expected_sums, rtol=1e-6, atol=1e-3, equal_nan=True)
    grads = backward(grad_out, q, k, v, out, log_sum_exp, offsets, options, tiles)
    assert all(grad[:50].isfinite().all() for grad in grads)
    assert grads[0][60].isnan().all()


def test_slices_of_a_fused_product_are_read_in_place() -> None:
    generator = torch.Generator().manual_seed(5)
    fused = torch.randn(40, 3, 2, 32, generator=generator)
    q, k, v = fused.unbind(1)
    offsets = torch.tensor([0, 25, 40], dtype=torch.int32)
    options = Options(0.2, None, 0.0, 0, False)
    tiles = one_tile(32, 32)
    out, log_sum_exp = forward(q, k, v, offsets, options, tiles)
    copies = [x.contiguous() for x in (q, k, v)]
    expected, expected_sums = forward(*copies, offsets, options, tiles)
    assert torch.equal(out, expected)
    grad_out = torch.randn(2, 40, 32, generator=generator).transpose(0, 1)
    grads = backward(grad_out, q, k, v, out, log_sum_exp, offsets, options, tiles)
    expected_grads = backward(grad_out.contiguous(), *copies, out, expected_sums, offsets, options, tiles)
    for grad, expected_grad in zip(grads, expected_grads):
        assert torch.equal(grad, expected_grad)


def test_a_width_that_the_kernels_do_not_have_is_refused() -> None:
    (q, k, v, _), offsets = packed((5,), 1, 48, torch.float32, seed=0)
    with pytest.raises(ValueError, match="head width 48"):
        forward(q, k, v, offsets, Options(1.0, None, 0.0, 0, False), one_tile(32, 32))
