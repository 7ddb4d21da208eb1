"""Runs Triton launches on CPU tensors: Triton's own binder and compiler make PTX, the simulator executes it.

    with simulated_triton() as launches:
        out, log_sum_exp = attention.forward(q, k, v, offsets, options, tiles)   # the product's own host code
    launches[0].kernel, launches[0].counters

No machine code is made (the stage that runs ptxas is left out), so compiling is quick; results are cached on disk.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from m3kernels.compiled_tables import triton_cache
from tests.ptx.simulator import Counters, GlobalMemory, Program, load
from tests.triton.named_device import NamedDevice

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = 80
Grid = tuple[int, int, int]
Programs = Callable[[str, Grid], Iterable[Grid] | None]
"""Which blocks of a kernel's grid to run; None: all."""


@dataclass(frozen=True)
class Launch:
    """One launch that was simulated."""

    kernel: str
    grid: Grid
    threads: int
    counters: Counters


def _without_machine_code(*stages: Any) -> Any:
    """Triton's hook: asked without arguments for a key of the changed pipeline, else to change it."""
    if not stages:
        return "ptx only", "ptx-only"
    stages[1]["cubin"] = lambda source, metadata: b""
    return None


@contextmanager
def simulated_triton(
    programs: Programs | None = None,
    change: Callable[[str], str] | None = None,
    architecture: int = ARCHITECTURE,
) -> Iterator[list[Launch]]:
    """Simulate every Triton launch within; yields the list of launches, which grows.

    Args:
        programs: which blocks to run, default all.
        change: alters the compiled PTX before it runs, to see whether that is noticed.
        architecture: whose PTX, 80 or 90.
    """
    launches: list[Launch] = []
    loaded: dict[str, Program] = {}
    original_run, original_driver = JITFunction.run, driver._active
    hook = knobs.runtime.add_stages_inspection_hook

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = original_run(self, *arguments, grid=grid, warmup=True, **options)
        ptx = kernel.asm["ptx"]
        if ptx not in loaded:
            (loaded[ptx],) = load(ptx if change is None else change(ptx)).values()
        named = dict(zip(self.arg_names, arguments)) | options
        values = [(ptx_type, named[name]) for name, ptx_type in kernel.src.signature.items() if ptx_type != "constexpr"]
        memory = GlobalMemory([extent(value) for _, value in values if isinstance(value, torch.Tensor)])
        whole: Grid = (*grid, 1, 1)[:3]
        program = loaded[ptx]
        counters = program.launch(
            memory,
            whole,
            program.kernel.threads or (32 * kernel.metadata.num_warps, 1, 1),
            _parameters(program, values),
            kernel.metadata.shared,
            None if programs is None else programs(self.__name__, whole),
        )
        launches.append(Launch(self.__name__, whole, 32 * kernel.metadata.num_warps, counters))
        return kernel

    JITFunction.run, driver._active = run, NamedDevice(architecture)
    knobs.runtime.add_stages_inspection_hook = _without_machine_code
    try:
        with triton_cache(ROOT / ".cache" / "ptx" / "triton"):
            yield launches
    finally:
        JITFunction.run, driver._active = original_run, original_driver
        knobs.runtime.add_stages_inspection_hook = hook


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and bytes that a tensor spans."""
    if not tensor.numel():
        return tensor.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


_PACK = {"fp32": "f", "fp64": "d", "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u32": "I", "u64": "Q"}


def _parameters(program: Program, values: list[tuple[str, Any]]) -> bytes:
    """The bytes of the kernel's arguments; Triton adds pointers to scratch memory that these kernels do not use."""
    block = bytearray(program.kernel.parameter_bytes)
    for parameter, (triton_type, value) in zip(program.kernel.parameters, values):
        if triton_type.startswith("*"):
            word = struct.pack("q", value.data_ptr())
        else:
            word = struct.pack(_PACK[triton_type], value)
        assert len(word) == parameter.size or triton_type == "i1", (parameter, triton_type)
        block[parameter.offset : parameter.offset + len(word)] = word
    return bytes(block)
