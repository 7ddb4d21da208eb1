"""Hopper's products of warpgroups (sm_90): wgmma.mma_async, its fence and groups, and the fence between proxies.

D [64, N] = A·B + D, or A·B. B, and A unless it is in registers, lie in shared memory where a 64-bit matrix descriptor
says (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout"): bits 0-13 the start, 16-29 the leading and
32-45 the stride byte offset, each in units of 16 bytes, 62-63 the swizzle (none, 128, 64 or 32 bytes). In chunks of 16
bytes, W of them across a swizzled row:

    K-major     row r, chunk c of its K     (r % 8)·16W + (r / 8)·stride + c·16   (not swizzled: c·leading)
    MN-major    chunk c of M or N, row k    (k % 8)·16W + (k / 8)·stride + (c % W)·16 + (c / W)·leading
                                            (not swizzled: (k % 8)·16 + (k / 8)·leading + c·stride)

and the swizzle exclusive-ors bits 4-6 of an address with bits 7-9, as many as W has. Warp w of a group holds rows 16w
to 16w + 15 of D and A, each as of mma.m16n8k*.

Shared memory is read through the async proxy: what was written with ordinary stores or cp.async needs
fence.proxy.async between. That read belongs to all four warps, so that a barrier must stand between it and whatever
any warp writes.
"""

from __future__ import annotations

import functools
import re

import numpy as np

from tests.ptx.simulator.faults import Fault
from tests.ptx.simulator.formats import Lanes, bfloat16_to_float32, to_tf32
from tests.ptx.simulator.in_flight import RegisterOperand, SharedOperand, Slots
from tests.ptx.simulator.machine import WARP, Active, Execute, Wave
from tests.ptx.simulator.operands import Source, source
from tests.ptx.simulator.parser import Instruction, Kernel
from tests.ptx.simulator.warp import fragments

GROUP = 4 * WARP
CHUNK = 16
SWIZZLE_CHUNKS = (1, 8, 4, 2)
"""W by the descriptor's swizzle field."""
_TYPES = {"bf16": 2, "f16": 2, "tf32": 4}


@functools.cache
def _chunks(rows: int, depth: int, mn_major: bool) -> tuple[Lanes, Lanes, Lanes]:
    """For all chunks of an operand [rows, depth]: the place along the swizzled row, the row within a group of 8, and
    the group of 8 rows; for MN-major operands "row" is k."""
    along, across = (rows // 8, depth) if mn_major else (2, rows)
    chunk, row = np.meshgrid(np.arange(along), np.arange(across), indexing="ij")
    return chunk.reshape(-1), row.reshape(-1) % 8, row.reshape(-1) // 8


def chunk_addresses(descriptors: Lanes, rows: int, depth: int, mn_major: bool) -> Lanes:
    """[descriptors, chunks] addresses of an operand's chunks."""
    start, leading, stride = (
        ((descriptors >> np.uint64(shift)) & np.uint64(0x3FFF)).astype(np.int64)[:, None] * CHUNK
        for shift in (0, 16, 32)
    )
    if (descriptors >> np.uint64(49) & np.uint64(7)).any():
        raise NotImplementedError("wgmma with a base offset")
    width = np.array(SWIZZLE_CHUNKS)[(descriptors >> np.uint64(62)).astype(np.int64)][:, None]
    chunk, row, group = _chunks(rows, depth, mn_major)
    if mn_major:
        plain = row * CHUNK + group * leading + chunk * stride
        swizzled = row * CHUNK * width + group * stride + chunk % width * CHUNK + chunk // width * leading
    else:
        plain = row * CHUNK + group * stride + chunk * leading
        swizzled = row * CHUNK * width + group * stride + chunk * CHUNK
    addresses = start + np.where(width == 1, plain, swizzled)
    return addresses ^ ((addresses >> 7) & (width - 1)) * CHUNK


def _matrices(chunks: Lanes, rows: int, depth: int, mn_major: bool, kind: str) -> Lanes:
    """float32 [operands, rows, depth] of bytes [operands, chunks, 16]."""
    elements = chunks.view(np.uint32 if kind == "tf32" else np.uint16).reshape(len(chunks), *(
        (rows // 8, depth, 8) if mn_major else (2, rows, -1)
    ))  # fmt: skip
    order = (0, 1, 3, 2) if mn_major else (0, 2, 1, 3)
    return _numbers(np.ascontiguousarray(elements.transpose(order)).reshape(-1, rows, depth), kind)


def _numbers(words: Lanes, kind: str) -> Lanes:
    if kind == "tf32":
        return to_tf32(words)
    return bfloat16_to_float32(words) if kind == "bf16" else words.view(np.float16).astype(np.float32)


def _groups(active: Active, instruction: Instruction) -> Lanes:
    """First lanes of the acting warpgroups, which must act whole."""
    if active.lanes.size % GROUP:
        raise Fault(f"{instruction.opcode} in a block that is no whole number of warpgroups")
    acting = active.lanes.reshape(-1, GROUP)
    if (acting.any(1) != acting.all(1)).any():
        raise Fault(f"{instruction.opcode} by a part of a warpgroup")
    return np.flatnonzero(acting.all(1)) * GROUP


def _uniform(wave: Wave, read: Source, firsts: Lanes) -> Lanes:
    values = np.broadcast_to(np.asarray(read(wave)), wave.lanes).reshape(-1, GROUP)[firsts // GROUP]
    if (values != values[:, :1]).any():
        raise Fault("threads of a warpgroup give wgmma different descriptors or predicates")
    return np.ascontiguousarray(values[:, 0])


def _slots(kernel: Kernel, names: tuple[str, ...]) -> Slots:
    return tuple(kernel.registers[name].slot for name in names)


def _product(instruction: Instruction, kernel: Kernel) -> Execute:
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", next((m for m in instruction.modifiers if m.startswith("m64")), ""))
    out, kind, other = instruction.modifiers[-3:]
    to, from_a, from_b, keep, *immediate = instruction.operands
    in_registers = isinstance(from_a, tuple)
    if shape is None or out != "f32" or kind not in _TYPES or other != kind or immediate[:2] != ["1", "1"]:
        raise NotImplementedError(f"the simulator does not know {instruction.text!r}")
    assert isinstance(to, tuple)
    columns, depth = int(shape[1]), int(shape[2])
    transposed = [flag == "1" for flag in immediate[2:]]
    b_mn_major = bool(transposed) and transposed[-1]
    a_mn_major = bool(transposed) and not in_registers and transposed[0]
    sums, keeps = _slots(kernel, to), source(kernel, keep, "pred")
    right = source(kernel, from_b, "b64")
    left = source(kernel, from_a, "b64") if not in_registers else None
    a_slots = _slots(kernel, from_a) if isinstance(from_a, tuple) else ()
    at_a, _, _ = fragments(depth, 4, 2, 4 // _TYPES[kind])

    def from_shared(wave: Wave, read: Source, firsts: Lanes, rows: int, mn_major: bool) -> Lanes:
        places = chunk_addresses(_uniform(wave, read, firsts), rows, depth, mn_major)
        index, seen = wave.shared.warpgroup_load(wave.block[firsts], places)
        wave.in_flight.operands.append(SharedOperand(firsts, wave.in_flight.committed[firsts], index, seen))
        return _matrices(seen, rows, depth, mn_major, kind)

    def from_registers(wave: Wave, lanes: Lanes) -> Lanes:
        words = np.stack([wave.registers[slot][lanes] for slot in a_slots])
        wave.in_flight.operands.append(RegisterOperand(lanes, wave.in_flight.committed[lanes], a_slots, words))
        words = np.ascontiguousarray(words.reshape(4, -1, WARP).transpose(1, 0, 2))
        elements = words.view(np.uint32 if kind == "tf32" else np.uint16).reshape(len(words), -1)
        return _numbers(elements[:, at_a], kind).reshape(-1, 64, depth)

    def run(wave: Wave, active: Active) -> None:
        firsts = _groups(active, instruction)
        a = from_registers(wave, active.numbers) if left is None else from_shared(wave, left, firsts, 64, a_mn_major)
        b = from_shared(wave, right, firsts, columns, b_mn_major)
        product = (a @ b.transpose(0, 2, 1)).reshape(-1, 4, 2, 8, columns // 8, 4, 2)
        # Group, warp, half of its rows, g, block of 8 columns, t, column of the pair: registers run over halves, blocks
        # and pairs, lanes of a warp over g and t.
        products = product.transpose(4, 2, 6, 0, 1, 3, 5).reshape(len(sums), -1)
        kept = np.repeat(_uniform(wave, keeps, firsts), GROUP)
        wave.in_flight.start(wave.registers, sums, active.numbers, kept, products)

    return run


def _fence(instruction: Instruction, kernel: Kernel) -> Execute:
    slots: set[int] = set()
    for other in kernel.instructions:
        if "mma_async" in other.modifiers:
            sums = other.operands[0]
            assert isinstance(sums, tuple)
            slots.update(_slots(kernel, sums))
    return lambda wave, active: wave.in_flight.fence(wave.registers, slots, active.lanes)


def _commit(instruction: Instruction, kernel: Kernel) -> Execute:
    def run(wave: Wave, active: Active) -> None:
        wave.in_flight.committed[active.numbers] += 1

    return run


def _wait(instruction: Instruction, kernel: Kernel) -> Execute:
    left = int(str(instruction.operands[0]), 0)
    return lambda wave, active: wave.in_flight.wait(wave.registers, wave.shared.chunks, active.lanes, left)


_WGMMA = {"mma_async": _product, "fence": _fence, "commit_group": _commit, "wait_group": _wait}


def _wgmma(instruction: Instruction, kernel: Kernel) -> Execute:
    return _WGMMA[instruction.modifiers[0]](instruction, kernel)


def _memory_fence(instruction: Instruction, kernel: Kernel) -> Execute:
    """fence.proxy.async; other fences do nothing, as memory is sequentially consistent here."""
    if instruction.modifiers[:2] != ("proxy", "async"):
        return lambda wave, active: None
    return lambda wave, active: wave.shared.proxy_fence(wave.block[active.numbers], wave.warp_in_block[active.numbers])


DECODERS = {"wgmma": _wgmma, "fence": _memory_fence}
