"""What the ops allocate on an NVIDIA GPU, and addresses beyond 2**31 elements."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import m3kernels

pytestmark = pytest.mark.device
MIB = 1 << 20


def peak(call: Callable[[], object]) -> int:
    """Bytes that a call allocates at most beyond what is there before it; its results are counted."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_attention_allocates_its_results_and_two_numbers_a_row() -> None:
    length, heads = 8192, 16
    q, k, v = (
        torch.randn(length, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    offsets = torch.tensor([0, length], dtype=torch.int32, device="cuda")

    def step() -> None:
        out = m3kernels.flash_attention_varlen(q, k, v, offsets)
        torch.autograd.grad(out, (q, k, v), out.detach())

    # out and three gradients in bfloat16, log-sum-exp and δ in float32; scores would take 2 GiB in bfloat16.
    expected = 4 * q.numel() * 2 + 2 * length * heads * 4
    assert peak(step) <= expected + MIB


def test_late_interaction_never_holds_the_similarities() -> None:
    queries, rows, passages, length = 32, 32, 256, 512
    q = torch.randn(queries * rows, 1024, device="cuda", dtype=torch.bfloat16)
    p = torch.randn(passages * length, 1024, device="cuda", dtype=torch.bfloat16)
    offsets = [
        torch.arange(n + 1, dtype=torch.int32, device="cuda") * size
        for n, size in ((queries, rows), (passages, length))
    ]
    with torch.no_grad():
        # The best similarity and the winner of each query row in each passage; similarities would take 512 MiB.
        assert peak(lambda: m3kernels.maxsim(q, p, *offsets)) <= 8 * queries * rows * passages + MIB


def test_the_sparse_head_has_no_vocabulary_axis() -> None:
    texts, length = 64, 512
    total = texts * length
    hidden = torch.randn(total, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight, bias = (torch.randn(n, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (1024, 1))
    ids = torch.randint(4, 250_002, (total,), dtype=torch.int32, device="cuda")
    offsets = torch.arange(texts + 1, dtype=torch.int32, device="cuda") * length

    def step() -> None:
        batch = m3kernels.sparse_embed(hidden, weight, bias, ids, offsets)
        torch.autograd.grad(batch.weights, (hidden, weight, bias), batch.weights.detach())

    # The gradient to hidden, and a few words a token; [texts, vocabulary] alone would be another 32 MB in bfloat16.
    assert peak(step) <= 2 * hidden.numel() + 64 * total + 4 * MIB


def test_rows_beyond_two_to_the_31_elements_are_addressed() -> None:
    heads, width, short = 32, 128, 100
    total = 2**31 // (heads * width) + 4096
    needed = 5 * total * heads * width * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    q = torch.zeros(total, heads, width, device="cuda", dtype=torch.bfloat16)
    q[-short:].normal_()
    offsets = torch.tensor(
        [0, *range(1024, total - short, 1024), total - short, total], dtype=torch.int32, device="cuda"
    )
    out = m3kernels.flash_attention_varlen(q, q, q, offsets)
    last = q[-short:].clone()
    alone = m3kernels.flash_attention_varlen(
        last, last, last, torch.tensor([0, short], dtype=torch.int32, device="cuda")
    )
    torch.testing.assert_close(out[-short:], alone, rtol=1e-2, atol=1e-2)
    assert not out[: total - short].any()
