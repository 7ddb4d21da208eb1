"""On an NVIDIA GPU, maxsim and maxsim_pairs equal their CPU implementations, forward and backward."""

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

QUERIES, PASSAGES = (32, 0, 1, 200), (300, 1, 0, 128, 515)
PAIRS = [[0, 0], [3, 4], [1, 0], [3, 2], [3, 4], [2, 1]]


def inputs(width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Normal rows of unit length, as the model makes them."""
    generator = torch.Generator().manual_seed(width)
    tensors = []
    for lengths in (QUERIES, PASSAGES):
        rows = torch.nn.functional.normalize(torch.randn(sum(lengths), width, generator=generator), dim=1).to(dtype)
        tensors.append(rows.to(device))
    for lengths in (QUERIES, PASSAGES):
        tensors.append(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device))
    return tuple(tensors)


def run(tensors: tuple[Tensor, ...], kind: str) -> list[Tensor]:
    queries, passages = (x.detach().requires_grad_() for x in tensors[:2])
    rows = (queries, passages, *tensors[2:])
    if kind == "pairs":
        pairs = torch.tensor(PAIRS, dtype=torch.int32, device=queries.device)
        scores = m3kernels.maxsim_pairs(*rows, pairs, zero_floor=True)
    else:
        scores = m3kernels.maxsim(*rows, reduce="sum", recompute_argmax=kind == "recompute")
    grads = torch.autograd.grad(scores.sum(), (queries, passages))
    return [x.detach().cpu().float() for x in (scores, *grads)]


@pytest.mark.parametrize("kind", ["all", "recompute", "pairs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [8, 136, 1024])
def test_device_equals_cpu(width: int, dtype: torch.dtype, kind: str) -> None:
    actual, expected = run(inputs(width, dtype, "cuda"), kind), run(inputs(width, dtype, "cpu"), kind)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-4)
    # Two similarities that differ by less than a float32 sum rounds may swap winners; that moves few gradient rows.
    bound = 1e-3 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for value, truth in zip(actual[1:], expected[1:]):
        assert float((value - truth).norm() / truth.norm()) <= bound


def test_backward_is_bitwise_repeatable() -> None:
    tensors = inputs(1024, torch.bfloat16, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(run(tensors, "all"), run(tensors, "all")))
