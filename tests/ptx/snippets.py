"""Hand-written PTX for tests: one kernel of two arguments around a body, run on numpy arrays."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.simulator import Counters, GlobalMemory, load

_KERNEL = """
.version 8.7
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry snippet(.param .u64 input, .param .u64 output)
{{
  .reg .pred %p<9>; .reg .b16 %rs<30>; .reg .b32 %r<99>; .reg .f32 %f<9>; .reg .b64 %rd<30>;
  {declarations}
  ld.param.u64 %rd1, [input];
  ld.param.u64 %rd2, [output];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd3, %r1, 4;
  add.s64 %rd4, %rd1, %rd3;   // word of this thread in the input
  add.s64 %rd5, %rd2, %rd3;   // and in the output
  {body}
  ret;
}}
"""


def run(
    body: str,
    words: NDArray[Any],
    *,
    outputs: int | None = None,
    threads: int = 32,
    blocks: int = 1,
    shared_bytes: int = 0,
    declarations: str = "",
) -> tuple[NDArray[np.uint32], Counters]:
    """Run a body (%r1 thread, %rd4 and %rd5 its input and output word); gives `outputs` words, NaN where unwritten."""
    inputs = np.ascontiguousarray(words).view(np.uint32).copy()
    results = np.full(threads if outputs is None else outputs, 0xFFFFFFFF, np.uint32)
    memory = GlobalMemory([(array.ctypes.data, array.nbytes) for array in (inputs, results)])
    program = load(_KERNEL.format(body=body, declarations=declarations))["snippet"]
    arguments = struct.pack("qq", inputs.ctypes.data, results.ctypes.data)
    counters = program.launch(memory, (blocks, 1, 1), (threads, 1, 1), arguments, shared_bytes)
    return results, counters


def elementwise(instruction: str, *operands: NDArray[Any]) -> NDArray[np.uint32]:
    """32-bit operands a, b, c in %r2, %r3, %r4, one for each thread; the instruction leaves its result in %r9."""
    threads = 32
    columns = [np.resize(np.ascontiguousarray(operand).view(np.uint32), threads) for operand in operands]
    loads = " ".join(f"ld.global.b32 %r{2 + i}, [%rd4+{4 * threads * i}];" for i in range(len(operands)))
    result, _ = run(f"{loads} {instruction} st.global.b32 [%rd5], %r9;", np.concatenate(columns))
    return result[: len(operands[0])]
