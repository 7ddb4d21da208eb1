"""The corrected and the checking interpreter catch planted bugs, and report nothing on sound kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def product(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr = "ieee"):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, b, input_precision=PRECISION))


@triton.jit
def cast(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


@triton.jit
def square(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(y_ptr + tl.arange(0, BLOCK), x * x)


@triton.jit
def summed(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK))).to(tl.float32))


@triton.jit
def stores_past_the_end(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < count, other=0.0))


@triton.jit
def loads_past_the_end(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at), mask=at < count)


@triton.jit
def sums_masked_lanes(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + tl.program_id(0), tl.sum(tl.load(x_ptr + at, mask=at < 20)))


@triton.jit
def all_store_to_one_element(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.load(x_ptr + tl.program_id(0)))


@triton.jit
def reads_what_another_writes(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    tl.store(x_ptr + program, tl.load(x_ptr + (program + 1) % 4))


@triton.jit
def asserts_positive(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    tl.device_assert(tl.load(x_ptr + tl.arange(0, BLOCK)) > 0, "negative")


@triton.jit
def sound(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0)
    tl.store(y_ptr + at, x, mask=at < count)
    tl.atomic_add(y_ptr + count, tl.sum(x))


def launch(kernel: Any, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    x = -torch.rand(100, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.zeros(101)
    kernel[(4,)](x, y, 100, BLOCK=32)
    return x, y


@pytest.mark.parametrize(
    ("kernel", "report"),
    [
        (stores_past_the_end, "store out of bounds"),
        (loads_past_the_end, "load out of bounds"),
        (all_store_to_one_element, "a store of program .* meets a store of another"),
        (reads_what_another_writes, "meets a (store|load) of another"),
        (asserts_positive, "negative"),
    ],
)
def test_a_planted_memory_fault_is_reported(kernel: Any, report: str) -> None:
    with pytest.raises((InterpreterError, RuntimeError, AssertionError), match=report):
        launch(kernel)


def test_masked_lanes_without_other_are_poisoned() -> None:
    _, y = launch(sums_masked_lanes)
    assert y[:4].isnan().all()


def test_a_sound_kernel_is_not_reported() -> None:
    x, y = launch(sound)
    torch.testing.assert_close(y[:100], x, rtol=0, atol=0)
    torch.testing.assert_close(y[100], x.sum())


@pytest.mark.parametrize("kernel", [square, summed])
def test_arithmetic_on_bfloat16_is_refused(kernel: Any) -> None:
    with pytest.raises((InterpreterError, TypeError), match="convert to float32"):
        launch(kernel, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_those_of_torch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(32, 64, generator=generator).to(dtype), torch.randn(64, 16, generator=generator).to(dtype)
    out = torch.empty(32, 16)
    product[(1,)](a, b, out, M=32, N=16, K=64)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_tf32_products_leave_out_the_low_bits_of_float32() -> None:
    a, b, out = torch.full((32, 64), 1 + 2**-10 + 2**-11), torch.full((64, 16), 1 + 2**-12), torch.empty(32, 16)
    product[(1,)](a, b, out, M=32, N=16, K=64, PRECISION="tf32")
    assert (out == 64 * (1 + 2**-10)).all()
    product[(1,)](a.bfloat16(), b.bfloat16(), out, M=32, N=16, K=64, PRECISION="tf32")
    assert (out == 64).all()


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16])
def test_casts_round_to_nearest_even_as_torch_does(target: torch.dtype) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(2))
    x[:8] = torch.tensor([torch.inf, -torch.inf, 3.4e38, 1e-40, -0.0, 0.0, 1.0, 65519.0])
    y = torch.empty(4096, dtype=target)
    cast[(1,)](x, y, BLOCK=4096)
    assert torch.equal(y.view(torch.int16), x.to(target).view(torch.int16))
    back = torch.empty(4096)
    cast[(1,)](y, back, BLOCK=4096)
    assert torch.equal(back, y.float())
