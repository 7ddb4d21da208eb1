"""Lets scripts for a GPU run to their end without one: Triton kernels under the interpreter, CPU tensors, no timing.

`install()` makes `m3::flash_attention_*` and `m3::maxsim_*` of CPU tensors run the Triton kernels through the corrected
interpreter of tests/triton (TRITON_INTERPRET=1 must be set before Triton is imported). The CUDA C++ ops take their CPU
kernels. What such a run computes is right; what it takes is the interpreter's time and says nothing about a GPU.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from m3kernels import _tiles, gpu_support
from m3kernels.attention import ops as attention
from m3kernels.maxsim import ops as maxsim

# Few, large blocks: the interpreter's time goes by the number of block operations.
_TILES = {
    "attention": {kernel: [64, 64, 4, 1] for kernel in ("forward", "backward_q", "backward_kv")},
    "maxsim": {
        **{kernel: [64, 64, 128, 4, 1] for kernel in ("forward", "pairs_forward", "backward_p")},
        "backward_q": [16, 256, 4, 1],
    },
}


@functools.cache
def install() -> None:
    """Replace the CPU implementations of this process by the interpreted GPU kernels; once."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("a dry run needs TRITON_INTERPRET=1, set before Triton is imported")
    from tests.triton import corrected_interpreter

    corrected_interpreter.install()
    gpu_support.triton_kernels = _interpreted  # type: ignore[assignment]
    torch.cuda.device = _no_device  # type: ignore[assignment,misc]
    library = torch.library.Library("m3", "IMPL")
    replaced: dict[str, Callable[..., Any]] = {
        "flash_attention_forward": attention._forward_cuda,
        "flash_attention_backward": attention._backward_cuda,
        "maxsim_forward": maxsim._forward_cuda,
        "maxsim_backward": maxsim._backward_cuda,
        "maxsim_pairs_forward": maxsim._pairs_forward_cuda,
        "maxsim_pairs_backward": maxsim._pairs_backward_cuda,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of every kernel that is overridden
        for name, function in replaced.items():
            library.impl(name, function, "CPU", allow_override=True)
    _KEPT.append(library)


_KEPT: list[torch.library.Library] = []
"""Implementations vanish with their Library."""


class _no_device:
    """Stands in for torch.cuda.device, which initialises CUDA."""

    def __init__(self, device: object) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _interpreted(op: str, device: torch.device) -> tuple[Any, _tiles.TileTable]:
    import importlib

    columns = ("16bit", "float32", "tf32")
    entries = {kernel: {column: {"1024": tile} for column in columns} for kernel, tile in _TILES[op].items()}
    return importlib.import_module(f"m3kernels.{op}.triton_kernels"), _tiles.TileTable(80, entries)
