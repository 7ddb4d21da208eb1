"""On an NVIDIA GPU, flash_attention_varlen equals its CPU implementation, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import m3kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

LENGTHS = (300, 0, 1, 64, 1030, 2)
OPTIONS = {
    "plain": {},
    "sampled": {"keep_probability": 0.5, "seed": 2**40 + 3},
    "dropout": {"dropout_p": 0.1, "seed": 5},
}


def run(tensors: list[Tensor], offsets: Tensor, options: dict[str, float]) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    out = m3kernels.flash_attention_varlen(q, k, v, offsets, max(LENGTHS), **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])]


def inputs(width: int, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(width)
    shape = (sum(LENGTHS), 3, width)
    tensors = [torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(4)]
    return tensors, torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("variant", list(OPTIONS))
def test_device_equals_cpu(variant: str, width: int, dtype: torch.dtype) -> None:
    expected = run(*inputs(width, torch.float32, "cpu"), OPTIONS[variant])
    if dtype != torch.float32:
        tensors, offsets = inputs(width, dtype, "cpu")
        expected = run([x.float() for x in tensors], offsets, OPTIONS[variant])
    actual = run(*inputs(width, dtype, "cuda"), OPTIONS[variant])
    unit = torch.finfo(dtype).eps / 2
    # As under the interpreter: one unit for each 16-bit rounding on the way; float32 grows with the root of the length.
    bound = 2e-6 * max(LENGTHS) ** 0.5 if dtype == torch.float32 else 4 * unit
    for name, value, truth in zip(("out", "grad_q", "grad_k", "grad_v"), actual, expected):
        error = float((value.cpu().float() - truth).norm() / truth.norm())
        assert error <= bound, (name, error, bound)


def test_backward_is_bitwise_repeatable() -> None:
    tensors, offsets = inputs(64, torch.bfloat16, "cuda")
    first, second = (run(tensors, offsets, {}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_forward_and_backward_are_captured_in_a_cuda_graph() -> None:
    tensors, offsets = inputs(64, torch.bfloat16, "cuda")
    expected = run(tensors, offsets, {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(tensors, offsets, {})
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected))
