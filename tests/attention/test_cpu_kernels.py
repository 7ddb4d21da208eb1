"""The CPU kernels of attention against the float64 reference, on every path that the machine can run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m3kernels import _library, flash_attention, flash_attention_varlen, offsets_from_lengths
from m3kernels.attention import reference

pytestmark = pytest.mark.skipif(
    _library.cpu_kernel("flash_attention_forward") is None, reason="the compiled CPU kernels are missing"
)

RANDOM: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled": {"keep_probability": 0.4, "seed": 7},
    "dropout": {"dropout_p": 0.2, "seed": 2**40 + 5},
    "both": {"keep_probability": 1.0, "dropout_p": 0.1, "seed": 3},
}


def draw(lengths: list[int], heads: int, width: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths) + width)
    rows = [torch.randn(sum(lengths), heads, width, generator=generator).to(dtype) for _ in range(4)]
    return rows[:3], rows[3], offsets_from_lengths(torch.tensor(lengths))


def out_and_gradients(rows: list[Tensor], grad: Tensor, offsets: Tensor, random: dict[str, Any]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in rows]
    out = flash_attention_varlen(*leaves, offsets, **random)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def relative_errors(rows: list[Tensor], grad: Tensor, offsets: Tensor, random: dict[str, Any]) -> list[float]:
    """Largest error of out, dq, dk and dv, each relative to the largest entry of its float64 reference, or to 1, the
    size of the inputs' entries, where the reference is smaller: rows with a single key have dq = dk = 0 exactly, as
    the difference of two numbers of that size."""
    exact = [x.double().requires_grad_() for x in rows]
    options = {"keep_probability": None, "dropout_p": 0.0, "seed": 0, **random}
    out, _ = reference.flash_attention_varlen(*exact, offsets, rows[0].shape[2] ** -0.5, **options)
    expected = [out, *torch.autograd.grad(out, exact, grad.double())]
    actual = out_and_gradients(rows, grad, offsets, random)
    return [float((a - e).detach().abs().max() / e.abs().max().clamp_min(1.0)) for a, e in zip(actual, expected)]


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 5, 15, 16, 17, 47, 48, 49, 96, 97, 193, 250]), min_size=1, max_size=5),
    heads=st.integers(1, 3),
    width=st.sampled_from([1, 8, 24, 32, 40, 64, 128, 256]),
    random=st.sampled_from(list(RANDOM)),
)
def test_float32_equals_the_float64_reference(lengths: list[int], heads: int, width: int, random: str) -> None:
    errors = relative_errors(*draw([*lengths, 3], heads, width, torch.float32), RANDOM[random])
    bound = 2e-6 * math.sqrt(max(*lengths, 3) + width)
    assert max(errors) <= bound, f"errors {errors}, bound {bound}"


@pytest.mark.parametrize("random", RANDOM)
def test_every_instruction_set_of_the_machine_agrees(instruction_set: str, random: str) -> None:
    """513 and 515 rows: AMX takes float32 from 512 rows on."""
    errors = relative_errors(*draw([0, 1, 130, 513, 0, 207], 2, 64, torch.float32), RANDOM[random])
    assert max(errors) <= 2e-6 * math.sqrt(513), errors
    errors = relative_errors(*draw([515], 1, 24, torch.float32), RANDOM[random])
    assert max(errors) <= 2e-6 * math.sqrt(515), errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("random", RANDOM)
def test_narrow_dtypes_are_rounded_once(dtype: torch.dtype, random: str, instruction_set: str) -> None:
    """Sums run in float32: out is rounded once; its rounding enters the gradients through δ a second time."""
    errors = relative_errors(*draw([1, 130, 70], 2, 64, dtype), RANDOM[random])
    unit = torch.finfo(dtype).eps / 2
    assert errors[0] <= 2 * unit, errors
    assert max(errors[1:]) <= 8 * unit, errors


def test_products_of_bfloat16_parts_are_as_exact_as_multiply_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMX multiplies float32 in parts (csrc/cpu/micro/amx.h), also where magnitudes lie far apart."""
    kernel = _library.cpu_kernel("flash_attention_forward")
    assert kernel is not None
    rows, _, offsets = draw([3, 600, 77], 2, 64, torch.float32)
    spread = torch.exp2(torch.randint(-12, 12, (64,), generator=torch.Generator().manual_seed(3)).float())
    rows = [rows[0] * spread, rows[1] / spread, rows[2] * spread]
    exact, _ = reference.flash_attention_varlen(*(x.double() for x in rows), offsets, 64**-0.5)
    errors = {}
    for isa in ("avx512", "amx"):
        monkeypatch.setenv("M3_CPU_ISA", isa)
        try:
            out = flash_attention_varlen(*rows, offsets)
        except RuntimeError:
            pytest.skip(f"this machine has no {isa}")
        errors[isa] = float(((out - exact) / spread).abs().max())
    assert errors["amx"] <= 2 * errors["avx512"], errors


def test_numbers_near_the_largest_are_not_taken_for_infinities(instruction_set: str) -> None:
    """One key takes all the weight, so that no sum passes them."""
    rows, _, offsets = draw([1, 520], 1, 32, torch.float32)
    largest = torch.finfo(torch.float32).max
    rows[2][0, 0, 5] = rows[2][7, 0, 3] = largest
    rows[0][:] = 1.0
    rows[1][1:] = -10.0
    rows[1][7] = 100.0
    out = flash_attention_varlen(*rows, offsets)
    torch.testing.assert_close(out[0], rows[2][0])
    torch.testing.assert_close(out[1:], rows[2][7].expand(520, 1, 32))


def test_strided_rows_of_a_fused_projection_are_read_in_place() -> None:
    fused = torch.randn(40, 3, 2, 32)
    offsets = offsets_from_lengths(torch.tensor([13, 27]))
    q, k, v = fused.unbind(1)
    expected = flash_attention_varlen(q.contiguous(), k.contiguous(), v.contiguous(), offsets)
    torch.testing.assert_close(flash_attention_varlen(q, k, v, offsets), expected, rtol=0, atol=0)
    column_major = q.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(flash_attention_varlen(column_major, k, v, offsets), expected, rtol=0, atol=0)


def test_padded_attention_equals_scaled_dot_product_attention_under_a_mask() -> None:
    lengths = torch.tensor([7, 0, 12])
    q, k, v = (torch.randn(3, 2, 12, 32) for _ in range(3))
    real = torch.arange(12) < lengths[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
    expected = torch.where(real[:, None, :, None], expected, 0.0)
    torch.testing.assert_close(flash_attention(q, k, v, lengths), expected, rtol=1e-5, atol=1e-6)


def test_a_nan_stays_in_its_sequence_and_head() -> None:
    rows, grad, offsets = draw([5, 60], 2, 32, torch.float32)
    clean = flash_attention_varlen(*rows, offsets)
    rows[1][20, 1, 3] = math.nan
    out, *grads = out_and_gradients(rows, grad, offsets, {})
    assert out[5:, 1].isnan().all()
    torch.testing.assert_close(out[:5], clean[:5], rtol=0, atol=0)
    torch.testing.assert_close(out[:, 0], clean[:, 0], rtol=0, atol=0)
    assert all(x[:5].isfinite().all() and x[:, 0].isfinite().all() for x in grads)


def test_large_similarities_neither_overflow_nor_vanish() -> None:
    rows, _, offsets = draw([50], 1, 32, torch.float32)
    out = flash_attention_varlen(rows[0] * 1e6, rows[1], rows[2], offsets)
    winner = (rows[0][:, 0].double() @ rows[1][:, 0].double().T).argmax(1)
    torch.testing.assert_close(out, rows[2][winner])


def test_one_token_attends_to_itself_and_under_sampling_to_nothing() -> None:
    rows, grad, offsets = draw([1, 0, 1], 2, 32, torch.float32)
    torch.testing.assert_close(flash_attention_varlen(*rows, offsets), rows[2])
    assert not any(x.any() for x in out_and_gradients(rows, grad, offsets, {"keep_probability": 0.5, "seed": 1}))
    sums = torch.ops.m3.flash_attention_forward(*rows, offsets, 1, 0.2, 0.5, 0.0, 1, False)[1]
    assert (sums == -math.inf).all()


def test_runs_repeat_bit_for_bit_and_other_thread_counts_agree() -> None:
    """The runs of keys that add to dq depend on the number of threads, and so does the order of its sums."""
    case = draw([3, 300, 0, 64], 3, 32, torch.float32)
    threads = torch.get_num_threads()
    several = out_and_gradients(*case, RANDOM["dropout"])
    torch.testing.assert_close(out_and_gradients(*case, RANDOM["dropout"]), several, rtol=0, atol=0)
    torch.set_num_threads(1)
    try:
        one = out_and_gradients(*case, RANDOM["dropout"])
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(one, several, rtol=1e-5, atol=1e-5)


def test_the_hash_is_uniform_and_rows_columns_and_heads_are_independent() -> None:
    length, probability = 512, 0.3
    first, second = (reference.kept(11, 0, head, length, probability, torch.device("cpu")).double() for head in (0, 1))
    deviation = math.sqrt(probability * (1 - probability))
    assert abs(first.mean() - probability) < 5 * deviation / length
    for axis in (0, 1):
        spread = first.mean(axis).std() / (deviation / math.sqrt(length))
        assert 0.85 < spread < 1.15, spread
    for product in (first * second, first[:, 1:] * first[:, :-1], first[1:] * first[:-1]):
        assert abs(product.mean() - probability**2) < 5 * deviation / length


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_the_hash_gives_pairs_of_rows_and_rectangles_no_pattern(probability: float) -> None:
    """Keys of rows and columns are added: entries (i, j), (i, l), (k, j), (k, l) share them, and must not show it."""
    length, device = 768, torch.device("cpu")
    others = ~torch.eye(length, dtype=torch.bool)
    for seed in range(3):
        decisions = reference.kept(seed, 0, 0, length, probability, device).double()
        standard = (decisions - probability) / math.sqrt(probability * (1 - probability))
        agreement = (standard @ standard.T / math.sqrt(length))[others]  # of independent rows nearly normal
        kurtosis = (probability**3 + (1 - probability) ** 3) / (probability * (1 - probability))
        assert abs(agreement.square().mean() - 1) < 0.03
        assert abs(agreement.pow(4).mean() - 3 - (kurtosis**2 - 3) / length) < 0.15
        assert agreement.abs().max() < 7.5
        for step in (1, 2, 3, 8, 64):
            upper, lower = standard[:-step], standard[step:]
            corners = upper[:, :-step] * upper[:, step:] * lower[:, :-step] * lower[:, step:]
            assert abs(corners.mean()) * (length - step) < 5
