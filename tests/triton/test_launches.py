"""The launches bind: Triton's own argument binder specialises every kernel from real tensors and compiles it.

There is no GPU to launch on, so a driver that only names the architecture stands in for CUDA's, and kernels are warmed
up (bound, specialised, compiled) instead of launched. The ahead-of-time tables name argument types by hand; here they
come from the calls that the ops make.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime import driver
from triton.runtime.jit import JITFunction

from m3kernels import _tiles
from m3kernels.attention import triton_kernels as attention
from m3kernels.maxsim import triton_kernels as maxsim
from tests.triton.named_device import NamedDevice

OFFSETS = torch.tensor([0, 5, 5, 40], dtype=torch.int32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Kernels compiled by the launches of a test, by name."""
    kernels: dict[str, Any] = {}
    run = JITFunction.run

    def warm_up(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        assert all(size > 0 for size in grid)
        kernels[self.__name__] = run(self, *arguments, grid=grid, warmup=True, **options)
        return kernels[self.__name__]

    monkeypatch.setattr(JITFunction, "run", warm_up)
    monkeypatch.setattr(driver, "_active", NamedDevice(90))
    return kernels


def gpu_code(kernel: Any) -> str:
    return str(kernel.asm["ttgir"])


def test_attention_launches(compiled: dict[str, Any]) -> None:
    fused = torch.randn(40, 3, 2, 64).bfloat16()
    q, k, v = fused.unbind(1)
    tiles = _tiles.for_architecture("attention", 90)
    options = attention.Options(0.125, 0.5, 0.1, 2**40, False)
    out, log_sum_exp = attention.forward(q, k, v, OFFSETS, options, tiles)
    attention.backward(out, q, k, v, out, log_sum_exp, OFFSETS, options, tiles)
    assert set(compiled) == {"forward_kernel", "backward_q_kernel", "backward_kv_kernel"}
    for kernel in compiled.values():
        # Asynchronous copies of 16 bytes need the alignment that the binder found in the tensors.
        assert "async_copy_global_to_local" in gpu_code(kernel)
        assert "warp_group_dot" in gpu_code(kernel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_maxsim_launches(compiled: dict[str, Any], dtype: torch.dtype) -> None:
    rows = (torch.randn(40, 64).to(dtype), torch.randn(40, 64).to(dtype), OFFSETS, OFFSETS)
    tiles = _tiles.for_architecture("maxsim", 90)
    floor = torch.tensor([True, False, True])
    pairs = torch.tensor([[0, 1], [2, 2]], dtype=torch.int32)
    scores, argmax = maxsim.forward(*rows, floor, True, True, False, tiles)
    maxsim.backward(scores, *rows, floor, argmax, True, False, tiles)
    listed = maxsim.pairs_forward(*rows, pairs, None, True, False, tiles)
    maxsim.pairs_backward(listed, *rows, pairs, None, True, False, tiles)
    names = ("forward", "sum", "pairs_forward", "backward_q", "backward_p")
    assert set(compiled) == {f"{name}_kernel" for name in names}
    on_tensor_cores = {name for name in names if "warp_group_dot" in gpu_code(compiled[f"{name}_kernel"])}
    assert on_tensor_cores == ({"forward", "pairs_forward", "backward_p"} if dtype == torch.bfloat16 else set())
