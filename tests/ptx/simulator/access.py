"""Loads, stores, atomics and asynchronous copies.

cp.async writes NaN to its target when it is issued and the data when the issuing thread waits for its group: a missing
wait, or a buffer that is used again too early, shows in the results or as a race.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.simulator.counters import phase_numbers
from tests.ptx.simulator.faults import Fault
from tests.ptx.simulator.formats import UNSIGNED, Lanes, numpy_type
from tests.ptx.simulator.machine import WARP, Active, Execute, Wave
from tests.ptx.simulator.memory import LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW, gather, scatter
from tests.ptx.simulator.operands import Address, address, source, width, write
from tests.ptx.simulator.parser import Instruction, Kernel

SPACES = ("global", "shared", "local", "param", "const")
_WINDOWS = (("param", PARAMETER_WINDOW), ("local", LOCAL_WINDOW), ("shared", SHARED_WINDOW))


def space_of(instruction: Instruction) -> str:
    """The memory space an instruction names, "generic" where it names none."""
    named = {modifier.partition("::")[0] for modifier in instruction.modifiers}
    return next((space for space in SPACES if space in named), "generic")


def load_from(wave: Wave, space: str, lanes: Lanes, addresses: Lanes, size: int, count: int) -> Lanes:
    """[n, count] words of `size` bytes for the lanes [n]."""
    if space == "global":
        wave.counters.global_access(False, addresses, size * count, lanes // WARP)
        return wave.global_memory.load(addresses, size, count)
    if space == "shared":
        wave.counters.shared_access(addresses, size * count, phase_numbers(lanes, size * count))
        return wave.shared.shared_load(wave.block[lanes], wave.warp_in_block[lanes], addresses, size, count)
    if space == "local":
        return wave.local.load(lanes, addresses, size, count)
    return wave.parameters.load(np.zeros_like(lanes), addresses, size, count)


def store_to(wave: Wave, space: str, lanes: Lanes, addresses: Lanes, values: Lanes) -> None:
    """Store [n, count] words of the lanes [n]."""
    size = values.dtype.itemsize * values.shape[1]
    if space == "global":
        wave.counters.global_access(True, addresses, size, lanes // WARP)
        wave.global_memory.store(addresses, values)
    elif space == "shared":
        wave.counters.shared_access(addresses, size, phase_numbers(lanes, size))
        wave.shared.shared_store(wave.block[lanes], wave.warp_in_block[lanes], addresses, values)
    elif space == "local":
        wave.local.store(lanes, addresses, values)
    else:
        raise Fault(f"store to {space} memory")


def _spaces(space: str, addresses: Lanes) -> list[tuple[str, Any, Lanes]]:
    """The spaces of generic addresses, each with its lanes and the addresses within it."""
    if space != "generic":
        return [(space, slice(None), addresses)]
    parts: list[tuple[str, Any, Lanes]] = []
    rest = np.ones(addresses.size, bool)
    for name, window in _WINDOWS:
        inside = rest & (addresses >= window)
        if inside.any():
            parts.append((name, inside, addresses[inside] - window))
            rest &= ~inside
    if rest.any():
        parts.append(("global", rest, addresses[rest]))
    return parts


def _load(instruction: Instruction, kernel: Kernel) -> Execute:
    size, space = width(instruction.type), space_of(instruction)
    to = instruction.operands[0] if isinstance(instruction.operands[0], tuple) else (instruction.operands[0],)
    where = address(kernel, instruction.operands[1])
    puts = [write(kernel, name, instruction.type) for name in to]
    dtype = numpy_type(instruction.type)
    count = len(to)

    def run(wave: Wave, active: Active) -> None:
        addresses, lanes = where(wave, active), active.numbers
        if space != "generic":
            words = load_from(wave, space, lanes, addresses, size, count)
        else:
            words = np.empty((lanes.size, count), UNSIGNED[8 * size])
            for name, chosen, inside in _spaces(space, addresses):
                words[chosen] = load_from(wave, name, lanes[chosen], inside, size, count)
        for number, put in enumerate(puts):
            if active.full:
                put(wave, active, np.ascontiguousarray(words[:, number]).view(dtype))
            else:
                spread = np.zeros(wave.lanes, dtype)
                spread[lanes] = words[:, number].view(dtype)
                put(wave, active, spread)

    return run


def _store(instruction: Instruction, kernel: Kernel) -> Execute:
    size, space = width(instruction.type), space_of(instruction)
    origin = instruction.operands[1] if isinstance(instruction.operands[1], tuple) else (instruction.operands[1],)
    where = address(kernel, instruction.operands[0])
    reads = [source(kernel, name, f"b{8 * size}") for name in origin]

    def run(wave: Wave, active: Active) -> None:
        addresses, lanes = where(wave, active), active.numbers
        columns = [np.broadcast_to(np.asarray(read(wave)), wave.lanes)[lanes] for read in reads]
        values = np.stack(columns, 1)
        for name, chosen, inside in _spaces(space, addresses):
            store_to(wave, name, lanes[chosen], inside, values[chosen])

    return run


_ATOMIC: dict[str, Callable[..., Any]] = {
    "add": lambda old, value: old + value,
    "min": min,
    "max": max,
    "and": lambda old, value: old & value,
    "or": lambda old, value: old | value,
    "xor": lambda old, value: old ^ value,
    "exch": lambda old, value: value,
    "inc": lambda old, value: old.dtype.type(0) if old >= value else old + old.dtype.type(1),
}


def _atomic(instruction: Instruction, kernel: Kernel) -> Execute:
    """atom and red, one lane after another."""
    space, ptx_type = space_of(instruction), instruction.type
    operands = instruction.operands if instruction.opcode == "atom" else ("_", *instruction.operands)
    where = address(kernel, operands[1])
    reads = [source(kernel, operand, ptx_type) for operand in operands[2:]]
    put, dtype = write(kernel, operands[0], ptx_type), numpy_type(ptx_type)
    operation = next(m for m in instruction.modifiers if m in _ATOMIC or m == "cas")
    combine = _ATOMIC.get(operation)
    size = width(ptx_type)

    def run(wave: Wave, active: Active) -> None:
        addresses, lanes = where(wave, active), active.numbers
        values = [np.broadcast_to(np.asarray(read(wave)), wave.lanes) for read in reads]
        found = np.zeros(wave.lanes, dtype)
        for name, chosen, inside in _spaces(space, addresses):
            for lane, place in zip(lanes[chosen].tolist(), inside.tolist()):
                at = np.array([place])
                if name == "shared":
                    block, warp = int(wave.block[lane]), int(wave.warp_in_block[lane])
                    byte = wave.shared.shared_atomic(block, warp, place, size)
                    old = gather(wave.shared.data, byte, size, 1).view(dtype)[0, 0]
                else:
                    old = wave.global_memory.load(at, size, 1).view(dtype)[0, 0]
                value = values[0][lane]
                new = (values[1][lane] if old == value else old) if combine is None else combine(old, value)
                found[lane] = old
                word = np.array([[new]], dtype).view(UNSIGNED[8 * size])
                if name == "shared":
                    scatter(wave.shared.data, byte, word)
                else:
                    wave.global_memory.store(at, word)
        put(wave, active, found)

    return run


def _copy(instruction: Instruction, kernel: Kernel) -> Execute:
    if "commit_group" in instruction.modifiers:

        def commit(wave: Wave, active: Active) -> None:
            wave.committed[active.numbers] += 1

        return commit
    if "wait_group" in instruction.modifiers or "wait_all" in instruction.modifiers:
        left = int(str(instruction.operands[0]), 0) if instruction.operands else 0
        everything = "wait_all" in instruction.modifiers
        return lambda wave, active: _wait(wave, active, left, everything)
    if "shared" not in {m.partition("::")[0] for m in instruction.modifiers} or "bulk" in instruction.modifiers:
        raise NotImplementedError(f"the simulator does not know {instruction.text!r}")
    return _issue(instruction, kernel, *(address(kernel, operand) for operand in instruction.operands[:2]))


def _issue(instruction: Instruction, kernel: Kernel, to: Address, origin: Address) -> Execute:
    size = int(str(instruction.operands[2]), 0)
    has_count = len(instruction.operands) > 3
    available = source(kernel, instruction.operands[3], "u32") if has_count else None

    def run(wave: Wave, active: Active) -> None:
        lanes, places = active.numbers, to(wave, active)
        words = np.zeros((lanes.size, size // 4), np.uint32)
        taken = np.ones(lanes.size, bool)
        if available is not None:
            count = np.broadcast_to(np.asarray(available(wave)), wave.lanes)[lanes]
            if ((count != 0) & (count != size)).any():
                raise NotImplementedError("cp.async of a part, the rest filled with zeros")
            taken = count > 0
        if taken.any():
            wanted = origin(wave, active)[taken]
            wave.counters.global_access(False, wanted, size, lanes[taken] // WARP)
            words[taken] = wave.global_memory.load(wanted, 4, 1 if size == 4 else size // 4)
        wave.counters.shared_access(places, size, phase_numbers(lanes, size))
        poison = np.full(words.shape, 0xFFFFFFFF, np.uint32)
        wave.shared.shared_store(wave.block[lanes], wave.warp_in_block[lanes], places, poison)
        wave.pending.append((lanes, wave.committed[lanes], places, words))

    return run


def _wait(wave: Wave, active: Active, left: int, everything: bool) -> None:
    """Complete the copies of the acting lanes but for their last `left` groups."""
    kept = []
    for lanes, group, places, words in wave.pending:
        done = active.lanes[lanes]
        if not everything:
            done = done & (group < wave.committed[lanes] - left)
        if done.any():
            who = lanes[done]
            wave.shared.shared_store(wave.block[who], wave.warp_in_block[who], places[done], words[done])
        if not done.all():
            kept.append((lanes[~done], group[~done], places[~done], words[~done]))
    wave.pending = kept


DECODERS = {"ld": _load, "ldu": _load, "st": _store, "atom": _atomic, "red": _atomic, "cp": _copy}
