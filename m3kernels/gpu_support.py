"""Which implementation of an op serves an NVIDIA GPU, and why not another.

Attention and MaxSim are Triton kernels for sm_80 (Ampere) and newer: older cards have no bfloat16 tensor cores, and no
tile table is made for them. The sparse ops, pack and unpack are CUDA C++, compiled for the architectures that the
library names. Where a kernel does not serve a card the op raises an error that says why, and never falls back
silently; M3_GPU_REFERENCE=1 asks for the plain PyTorch reference on every GPU, slow and large but the same results.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from m3kernels import _library, _tiles
from m3kernels.fatbin import cuda_architectures

__all__ = ["Served", "cuda_kernel", "reference_wanted", "served", "served_by_gpus", "triton_kernels"]

OLDEST_TRITON = (3, 6)
"""The Triton of torch 2.10, the oldest torch supported. The tables and tests were made with 3.7.1 only."""
TRITON_OPS = {"attention": "attention", "maxsim": "late interaction"}
CUDA_OPS = {"sparse": "sparse head and scores", "packing": "pack and unpack"}
_HINT = "M3_GPU_REFERENCE=1 runs the plain PyTorch reference instead"


class Served(NamedTuple):
    """What runs an op on a device; `obstacle` says what stands in the way of its kernel, if anything does."""

    op: str
    device: str
    implementation: str
    obstacle: str = ""


def reference_wanted() -> bool:
    """Whether M3_GPU_REFERENCE asks for the reference on GPUs.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    value = os.environ.get("M3_GPU_REFERENCE", "0")
    if value not in ("0", "1"):
        raise ValueError(f"M3_GPU_REFERENCE is {value!r}; accepted: 0 and 1")
    return value == "1"


def triton_kernels(op: str, device: torch.device) -> tuple[Any, _tiles.TileTable]:
    """The module of an op's Triton kernels and the tiles for a device.

    Raises:
        RuntimeError: Triton is missing or too old, or the device is.
    """
    return _triton_kernels(op, torch.cuda.get_device_capability(device))


@functools.cache
def _triton_kernels(op: str, capability: tuple[int, int]) -> tuple[Any, _tiles.TileTable]:
    obstacle = triton_obstacle(capability)
    if obstacle:
        raise RuntimeError(f"{op}: {obstacle}; {_HINT}")
    return importlib.import_module(f"m3kernels.{op}.triton_kernels"), _tiles.for_architecture(op, _number(capability))


def cuda_kernel(name: str, device: torch.device) -> Callable[..., Any]:
    """The compiled CUDA kernel of op `name` for a device.

    Raises:
        RuntimeError: the CUDA library was not built, or for other architectures.
    """
    obstacle = cuda_obstacle(torch.cuda.get_device_capability(device))
    if obstacle:
        raise RuntimeError(f"m3::{name}: {obstacle}; {_HINT}")
    kernel: Callable[..., Any] = getattr(torch.ops.m3_cuda, name)
    return kernel


def forget_tables() -> None:
    """Look the tiles up anew: a table was rewritten."""
    _triton_kernels.cache_clear()


@functools.cache
def triton_obstacle(capability: tuple[int, int]) -> str:
    """Why the Triton kernels do not serve cards of this compute capability, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton; Linux)"
    version = _triton_version()
    if version < OLDEST_TRITON:
        return (
            f"Triton {'.'.join(map(str, version))} is too old; accepted: {'.'.join(map(str, OLDEST_TRITON))} and newer"
        )
    if _number(capability) < _tiles.OLDEST:
        return (
            f"the Triton kernels need sm_{_tiles.OLDEST} or newer (bfloat16 tensor cores), this GPU is"
            f" sm_{_number(capability)}"
        )
    return ""


@functools.cache
def cuda_obstacle(capability: tuple[int, int]) -> str:
    """Why the compiled CUDA library does not serve cards of this compute capability, or "".

    Machine code runs on cards of its own generation that are not older; PTX is compiled by the driver for newer cards.
    """
    if _library.CUDA_LIBRARY is None:
        return "the CUDA kernels are missing; build the package on a machine with nvcc"
    held = cuda_architectures(_library.CUDA_LIBRARY)
    number = _number(capability)
    for name in held:
        kind, _, architecture = name.partition("_")
        own = int(architecture)
        if own == number or (own < number and (kind == "compute" or own // 10 == number // 10)):
            return ""
    return (
        f"the CUDA kernels were built for {', '.join(held)}, this GPU is sm_{number}; build them with"
        f' M3_CUDA_ARCHS="{number}"'
    )


def served() -> list[Served]:
    """What runs here, for `m3 doctor`: on the CPU, then on each GPU that torch sees."""
    isa = _library.cpu_kernel("cpu_isa")
    on_cpu = f"C++, {isa()}" if isa else "plain PyTorch reference"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = {f"cuda:{number}": torch.cuda.get_device_capability(number) for number in range(count)}
    return [*(Served(name, "cpu", on_cpu) for name in (TRITON_OPS | CUDA_OPS).values()), *served_by_gpus(gpus)]


def served_by_gpus(capabilities: Mapping[str, tuple[int, int]]) -> list[Served]:
    """What runs, or would run, on GPUs of these compute capabilities, given by name."""
    rows = []
    for device, capability in capabilities.items():
        for op, name in (TRITON_OPS | CUDA_OPS).items():
            is_triton = op in TRITON_OPS
            obstacle = (triton_obstacle if is_triton else cuda_obstacle)(capability)
            if reference_wanted():
                rows.append(Served(name, device, "plain PyTorch reference", "M3_GPU_REFERENCE=1"))
            elif obstacle:
                rows.append(Served(name, device, "nothing", f"{obstacle}; {_HINT}"))
            elif is_triton:
                table = _tiles.for_architecture(op, _number(capability)).architecture
                rows.append(Served(name, device, f"Triton, tiles of sm_{table}"))
            else:
                rows.append(Served(name, device, "CUDA C++"))
    return rows


def _number(capability: tuple[int, int]) -> int:
    return 10 * capability[0] + capability[1]


def _triton_version() -> tuple[int, ...]:
    import triton

    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
