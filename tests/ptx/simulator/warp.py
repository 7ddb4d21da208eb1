"""Instructions of whole warps: shuffles, votes, reductions, ldmatrix, stmatrix and mma.sync.

The fragment layouts of mma.m16n8k* and ldmatrix are those of the PTX ISA ("Matrix Fragments for mma.m16n8k16" and its
neighbours): with group g = lane / 4 and t = lane % 4, register q of A holds row g + 8·(q % 2) and, for 16-bit types,
the columns 2t, 2t + 1 of the left or (q ≥ 2) right half; B is the same transposed; of C, register q holds row
g + 8·(q / 2), column 2t + q % 2. Products are exact in float32; their sum is numpy's, whose order and rounding are not
the GPU's.
"""

from __future__ import annotations

import functools

import numpy as np

from tests.ptx.simulator.counters import phase_numbers
from tests.ptx.simulator.faults import Fault
from tests.ptx.simulator.formats import Lanes, bfloat16_to_float32, to_tf32
from tests.ptx.simulator.machine import WARP, Active, Execute, Wave
from tests.ptx.simulator.operands import address, source, write
from tests.ptx.simulator.parser import Instruction, Kernel


def _whole(active: Active, instruction: Instruction) -> None:
    if not active.whole_warps():
        raise Fault(f"{instruction.opcode} by a part of a warp")


def _shuffle(instruction: Instruction, kernel: Kernel) -> Execute:
    kind = instruction.modifiers[1]
    to, _, arrived = str(instruction.operands[0]).partition("|")
    value = source(kernel, instruction.operands[1], "b32")
    distance, control = (source(kernel, operand, "u32") for operand in instruction.operands[2:4])
    put = write(kernel, to, "b32")
    put_arrived = write(kernel, arrived, "pred") if arrived else None

    def run(wave: Wave, active: Active) -> None:
        lane, b = wave.lane, np.asarray(distance(wave)).astype(np.int64) & 31
        c = np.asarray(control(wave)).astype(np.int64)
        segment, clamp = c >> 8 & 31, c & 31
        highest, lowest = (lane & segment) | (clamp & ~segment), lane & segment
        other = {"bfly": lane ^ b, "down": lane + b, "up": lane - b, "idx": lowest | (b & ~segment)}[kind]
        inside = other >= highest if kind == "up" else other <= highest
        origin = np.arange(wave.lanes) - lane + np.where(inside, other, lane)
        if (active.lanes & ~active.lanes[origin]).any():
            raise Fault("shuffle from a lane that does not take part")
        moved = np.broadcast_to(np.asarray(value(wave)), wave.lanes)[origin]
        put(wave, active, moved)
        if put_arrived is not None:
            put_arrived(wave, active, inside)

    return run


def _ballot(lanes: Lanes) -> Lanes:
    """The bits of each warp, repeated for its lanes."""
    weights = np.uint64(1) << np.arange(WARP, dtype=np.uint64)
    return np.repeat((lanes.reshape(-1, WARP) * weights).sum(1).astype(np.uint32), WARP)


def _vote(instruction: Instruction, kernel: Kernel) -> Execute:
    ballot = "ballot" in instruction.modifiers
    kind = next(m for m in instruction.modifiers if m in ("any", "all", "uni", "ballot"))
    predicate = source(kernel, instruction.operands[1], "pred")
    put = write(kernel, instruction.operands[0], "b32" if ballot else "pred")

    def run(wave: Wave, active: Active) -> None:
        holds = np.broadcast_to(predicate(wave), wave.lanes) & active.lanes
        some, every = _ballot(holds), _ballot(active.lanes)
        put(
            wave,
            active,
            some if ballot else {"any": some != 0, "all": some == every}.get(kind, (some == 0) | (some == every)),
        )

    return run


def _active_mask(instruction: Instruction, kernel: Kernel) -> Execute:
    put = write(kernel, instruction.operands[0], "b32")
    return lambda wave, active: put(wave, active, _ballot(active.lanes))


_REDUCE = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


def _reduce(instruction: Instruction, kernel: Kernel) -> Execute:
    """redux.sync over all lanes of a warp."""
    combine = _REDUCE[instruction.modifiers[1]]
    value, put = (
        source(kernel, instruction.operands[1], instruction.type),
        write(kernel, instruction.operands[0], instruction.type),
    )

    def run(wave: Wave, active: Active) -> None:
        _whole(active, instruction)
        lanes = np.broadcast_to(np.asarray(value(wave)), wave.lanes).reshape(-1, WARP)
        put(wave, active, np.repeat(combine.reduce(lanes, axis=1, dtype=lanes.dtype), WARP))

    return run


def _load_matrix(instruction: Instruction, kernel: Kernel) -> Execute:
    """ldmatrix: 8×8 matrices of 16 bits, the row addresses from 8 lanes each; lane l gets row l / 4, words l % 4."""
    operands = instruction.operands[0] if isinstance(instruction.operands[0], tuple) else (instruction.operands[0],)
    count, transposed = len(operands), "trans" in instruction.modifiers
    where = address(kernel, instruction.operands[1])
    puts = [write(kernel, name, "b32") for name in operands]

    def run(wave: Wave, active: Active) -> None:
        _whole(active, instruction)
        lanes = active.numbers.reshape(-1, WARP)[:, : 8 * count].reshape(-1)
        addresses = where(wave, active).reshape(-1, WARP)[:, : 8 * count].reshape(-1)
        wave.counters.shared_access(addresses, 16, phase_numbers(lanes, 16))
        words = wave.shared.shared_load(wave.block[lanes], wave.warp_in_block[lanes], addresses, 4, 4)
        if transposed:
            halves = np.ascontiguousarray(words).view(np.uint16).reshape(-1, 8, 8)
            words = np.ascontiguousarray(halves.transpose(0, 2, 1)).view(np.uint32)
        matrices = words.reshape(-1, count, WARP)
        for number, put in enumerate(puts):
            spread = np.zeros(wave.lanes, np.uint32)
            spread[active.numbers] = matrices[:, number].reshape(-1)
            put(wave, active, spread)

    return run


def _store_matrix(instruction: Instruction, kernel: Kernel) -> Execute:
    """stmatrix, the reverse: the row addresses from 8 lanes for each matrix."""
    origin = instruction.operands[1] if isinstance(instruction.operands[1], tuple) else (instruction.operands[1],)
    if "trans" in instruction.modifiers:
        raise NotImplementedError(f"the simulator does not know {instruction.text!r}")
    where = address(kernel, instruction.operands[0])
    reads = [source(kernel, name, "b32") for name in origin]

    def run(wave: Wave, active: Active) -> None:
        _whole(active, instruction)
        lanes = active.numbers.reshape(-1, WARP)[:, : 8 * len(reads)].reshape(-1)
        addresses = where(wave, active).reshape(-1, WARP)[:, : 8 * len(reads)].reshape(-1)
        words = np.stack([np.broadcast_to(np.asarray(read(wave)), wave.lanes)[active.numbers] for read in reads])
        rows = np.ascontiguousarray(words.reshape(len(reads), -1, WARP).transpose(1, 0, 2)).reshape(-1, 4)
        wave.counters.shared_access(addresses, 16, phase_numbers(lanes, 16))
        wave.shared.shared_store(wave.block[lanes], wave.warp_in_block[lanes], addresses, rows)

    return run


@functools.cache
def fragments(k: int, registers_a: int, registers_b: int, halves: int) -> tuple[Lanes, Lanes, Lanes]:
    """Where the elements of A [16·K], B [K·8] and D [16·8] lie among a warp's (register, lane, half)."""
    g, t = np.arange(WARP) // 4, np.arange(WARP) % 4
    a, b, d = np.zeros((16, k), np.int64), np.zeros((k, 8), np.int64), np.zeros((16, 8), np.int64)
    left, above = k // max(registers_a // 2, 1), k // registers_b
    for half in range(halves):
        for q in range(registers_a):
            a[g + 8 * (q % 2), t * halves + half + left * (q // 2)] = (q * WARP + np.arange(WARP)) * halves + half
        for q in range(registers_b):
            b[t * halves + half + above * q, g] = (q * WARP + np.arange(WARP)) * halves + half
    for q in range(4):
        d[g + 8 * (q // 2), t * 2 + q % 2] = q * WARP + np.arange(WARP)
    return a.reshape(-1), b.reshape(-1), d.reshape(-1)


def _matrix_product(instruction: Instruction, kernel: Kernel) -> Execute:
    """mma.sync.m16n8k*: D = A·B + C with float32 sums."""
    kinds = instruction.modifiers[-4:]
    shape = next((m for m in instruction.modifiers if m.startswith("m16n8k")), None)
    operands = [operand if isinstance(operand, tuple) else (operand,) for operand in instruction.operands]
    if shape is None or kinds[0] != "f32" or kinds[3] != "f32" or kinds[1] not in ("bf16", "f16", "tf32"):
        raise NotImplementedError(f"the simulator does not know {instruction.text!r}")
    k, halves = int(shape[6:]), 1 if kinds[1] == "tf32" else 2
    puts = [write(kernel, name, "f32") for name in operands[0]]
    a, b, c = ([source(kernel, name, "b32") for name in operand] for operand in operands[1:4])
    at_a, at_b, at_d = fragments(k, len(a), len(b), halves)
    from_d = np.argsort(at_d)

    def matrices(wave: Wave, reads: list, places: Lanes) -> Lanes:  # type: ignore[type-arg]
        words = np.stack([np.broadcast_to(np.asarray(read(wave)), wave.lanes) for read in reads])
        words = np.ascontiguousarray(words.reshape(len(reads), -1, WARP).transpose(1, 0, 2))
        if kinds[1] == "tf32":
            return to_tf32(words.reshape(words.shape[0], -1)[:, places])
        chosen = words.view(np.uint16).reshape(words.shape[0], -1)[:, places]
        return bfloat16_to_float32(chosen) if kinds[1] == "bf16" else chosen.view(np.float16).astype(np.float32)

    def run(wave: Wave, active: Active) -> None:
        _whole(active, instruction)
        left = matrices(wave, a, at_a).reshape(-1, 16, k)
        right = matrices(wave, b, at_b).reshape(-1, k, 8)
        products = (left @ right).reshape(-1, 128)[:, from_d].reshape(-1, 4, WARP)
        sums = [np.asarray(read(wave)).view(np.float32) for read in c]
        for number, put in enumerate(puts):
            put(wave, active, products[:, number].reshape(-1) + sums[number])

    return run


def _no_barrier(instruction: Instruction, kernel: Kernel) -> Execute:
    """bar.warp.sync: the lanes of a warp run in step here."""
    return lambda wave, active: None


DECODERS = {
    "shfl": _shuffle,
    "vote": _vote,
    "activemask": _active_mask,
    "redux": _reduce,
    "ldmatrix": _load_matrix,
    "stmatrix": _store_matrix,
    "mma": _matrix_product,
    "bar": _no_barrier,
}
