"""A functional simulator of PTX in numpy, sm_80's and what our sm_90 code adds: runs what Triton and nvcc generated.

    kernels = load(ptx)
    kernels["name"].launch(GlobalMemory([(address, bytes), ...]), grid, threads, parameters) -> Counters

Checked while it runs: every global, shared, local and parameter address, alignment, reads of unwritten shared memory,
races between warps on shared memory, divergent barriers, shuffles from absent lanes, cp.async without its wait; wgmma
without its fences, group or wait, or whose operands change while it runs.
Not modelled: time, caches, races within a warp, between blocks or on global memory, the rounding of sums inside a
tensor core, and of what is newer than sm_80 all but wgmma, its fences and stmatrix: our kernels use no mbarrier and no
bulk copies on sm_90. tcgen05 (sm_100) is not there.
"""

from __future__ import annotations

from tests.ptx.simulator import access, arithmetic, warp, warpgroup
from tests.ptx.simulator.counters import Counters
from tests.ptx.simulator.faults import Fault, PtxError
from tests.ptx.simulator.formats import bits_of
from tests.ptx.simulator.machine import Execute, Program
from tests.ptx.simulator.memory import GlobalMemory
from tests.ptx.simulator.parser import Instruction, Kernel, parse

__all__ = ["Counters", "Fault", "GlobalMemory", "Program", "PtxError", "load"]

_DECODERS = {**arithmetic.DECODERS, **access.DECODERS, **warp.DECODERS, **warpgroup.DECODERS}


def load(ptx: str) -> dict[str, Program]:
    """All kernels of a PTX text, decoded.

    Raises:
        PtxError: text that is not understood.
        NotImplementedError: an instruction that the simulator does not know.
    """
    return {name: Program(kernel, _decode, _granule(kernel)) for name, kernel in parse(ptx).items()}


def _decode(instruction: Instruction, kernel: Kernel) -> Execute:
    decoder = _DECODERS.get(instruction.opcode)
    if decoder is None:
        raise NotImplementedError(f"the simulator does not know {instruction.text!r}")
    return decoder(instruction, kernel)


def _granule(kernel: Kernel) -> int:
    """The smallest access to shared memory: so fine must its shadow be."""
    sizes = [16]
    for instruction in kernel.instructions:
        if instruction.opcode in ("ld", "st", "atom", "red") and access.space_of(instruction) in ("shared", "generic"):
            sizes.append(max(bits_of(instruction.type) // 8, 1))
        elif instruction.opcode == "cp":
            sizes.append(4)
    return min(sizes)
