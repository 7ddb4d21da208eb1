"""No op asks a GPU for a value: on tensors that have none (fake CUDA tensors, meta tensors) all host code runs.

That is what a CUDA graph needs, too: a host that waits cannot be captured. Gradients are taken on meta tensors, because
torch's autograd needs a real CUDA for fake ones.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from m3kernels import _tiles, flash_attention, flash_attention_varlen, pack, varlen_attn


def rows(*shape: int, device: str = "cuda") -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device)


def integers(count: int, device: str = "cuda") -> Tensor:
    return torch.empty(count, dtype=torch.int32, device=device)


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_a_value_that_is_asked_for_is_noticed(device: str) -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError):
        pack(rows(3, 5, 2, device=device), integers(4, device))


def test_packed_rows() -> None:
    with FakeTensorMode():
        q, offsets = rows(9, 2, 32), integers(4)
        out = flash_attention_varlen(q, q, q, offsets, keep_probability=0.5, dropout_p=0.1, seed=3)
        again = varlen_attn(q, q, q, offsets, offsets, 5, 5)
        log_sum_exp = torch.empty(2, 9, device="cuda")
        options = (5, 0.2, None, 0.0, 0, False)
        grads = torch.ops.m3.flash_attention_backward(out, q, q, q, out, log_sum_exp, offsets, *options)
    for x in (out, again, *grads):
        assert x.device.type == "cuda" and x.shape == q.shape


def test_padded_rows_whose_lengths_are_on_the_gpu() -> None:
    with FakeTensorMode():
        q = rows(3, 2, 5, 32)
        out = flash_attention(q, q, q, integers(3))
    assert out.device.type == "cuda" and out.shape == q.shape


def test_autograd() -> None:
    q = rows(9, 2, 32, device="meta").requires_grad_()
    out = flash_attention_varlen(q, q, q, integers(4, "meta"), keep_probability=0.5, dropout_p=0.1, seed=3)
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad.device.type == "meta" and grad.shape == q.shape


def test_launches_of_the_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton.runtime.jit import JITFunction

    from m3kernels.attention import triton_kernels

    launched = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *_, grid, **__: launched.append((kernel.__name__, grid)))
    with FakeTensorMode():
        q, offsets, tiles = rows(900, 2, 64), integers(4), _tiles.for_architecture("attention", 90)
        options = triton_kernels.Options(0.125, 0.5, 0.1, 7, allow_tf32=False)
        out, log_sum_exp = triton_kernels.forward(q, q, q, offsets, options, tiles)
        triton_kernels.backward(out, q, q, q, out, log_sum_exp, offsets, options, tiles)
    assert [name for name, _ in launched] == ["forward_kernel", "backward_q_kernel", "backward_kv_kernel"]
    assert all(heads == 2 and 0 < programs <= 900 for _, (programs, heads) in launched)
