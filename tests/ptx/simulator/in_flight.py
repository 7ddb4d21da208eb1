"""wgmma products of a wave that are issued and not waited for, and what must stay as it is until then.

A warpgroup is four warps, lanes 128·i to 128·i + 127. Its products read shared memory and registers and write their
accumulators at any time between their issue and the wait for their group. Here they are computed at once, from what
lies in shared memory then, and the sums are kept aside: the registers hold NaN until the wait delivers. What a product
read must be the same at the wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.ptx.simulator.faults import Fault
from tests.ptx.simulator.formats import Lanes

Slots = tuple[int, ...]
"""Rows of the register file."""
POISON = np.uint32(0xFFFFFFFF)


@dataclass
class Accumulators:
    """Sums of one set of registers, float32 [registers, lanes], and the group of each lane's last product (−1: none
    in flight, the registers hold the sums)."""

    sums: Lanes
    group: Lanes


@dataclass
class SharedOperand:
    """Chunks of shared memory [warpgroups, chunks] that products read, by the first lanes of the warpgroups."""

    lanes: Lanes
    group: Lanes
    chunks: Lanes
    seen: Lanes
    """[warpgroups, chunks, 16] bytes."""

    def check(self, registers: Sequence[Lanes], shared: Lanes, chosen: Lanes) -> None:
        """The chosen warpgroups find what they read."""
        if (shared[self.chunks[chosen]] != self.seen[chosen]).any():
            raise Fault("shared memory was written before the wait for the wgmma that reads it")

    def of(self, chosen: Lanes) -> SharedOperand:
        """The same for some of the warpgroups."""
        return SharedOperand(self.lanes[chosen], self.group[chosen], self.chunks[chosen], self.seen[chosen])


@dataclass
class RegisterOperand:
    """Registers that hold A."""

    lanes: Lanes
    group: Lanes
    slots: Slots
    seen: Lanes
    """Words [registers, lanes]."""

    def check(self, registers: Sequence[Lanes], shared: Lanes, chosen: Lanes) -> None:
        """The chosen lanes find what they read."""
        for slot, seen in zip(self.slots, self.seen):
            if (registers[slot][self.lanes[chosen]] != seen[chosen]).any():
                raise Fault("a register that holds A was written before the wait for its wgmma")

    def of(self, chosen: Lanes) -> RegisterOperand:
        """The same for some of the lanes."""
        return RegisterOperand(self.lanes[chosen], self.group[chosen], self.slots, self.seen[:, chosen])


class InFlight:
    """The products of all warpgroups of a wave."""

    def __init__(self, lanes: int) -> None:
        self.committed = np.zeros(lanes, np.int64)
        self.accumulators: dict[Slots, Accumulators] = {}
        self.operands: list[SharedOperand | RegisterOperand] = []
        self.fenced: dict[int, Lanes] = {}

    def fence(self, registers: Sequence[Lanes], slots: Iterable[int], lanes: NDArray[np.bool_]) -> None:
        """wgmma.fence: products that follow may use these registers as they are now."""
        for slot in slots:
            kept = self.fenced.setdefault(slot, np.zeros_like(registers[slot]))
            np.copyto(kept, registers[slot], where=lanes)

    def check_fenced(self, registers: Sequence[Lanes], slots: Slots, lanes: Lanes) -> None:
        """Sums that a product adds to were not written since the last fence. Registers of A may be: LLVM moves what
        makes them past the fence, and ptxas mends it (tests/ptx/test_arrival.py)."""
        for slot in slots:
            kept = self.fenced.get(slot)
            if kept is None or (kept[lanes] != registers[slot][lanes]).any():
                raise Fault("wgmma adds to a register that was written after the last wgmma.fence")

    def start(self, registers: Sequence[Lanes], slots: Slots, lanes: Lanes, keeps: Lanes, products: Lanes) -> None:
        """Add products [registers, active lanes] to the sums of the lanes; those that do not `keep` them start at 0."""
        for other, held in self.accumulators.items():
            if other != slots and set(other) & set(slots) and (held.group[lanes] >= 0).any():
                raise Fault("accumulators of a wgmma in flight, in another shape or order")
        total = registers[0].size
        own = self.accumulators.setdefault(
            slots, Accumulators(np.zeros((len(slots), total), np.float32), np.full(total, -1, np.int64))
        )
        landed = own.group[lanes] < 0
        self.check_fenced(registers, slots, lanes[landed & keeps])
        for number, slot in enumerate(slots):
            before = np.where(landed, registers[slot].view(np.float32)[lanes], own.sums[number, lanes])
            own.sums[number, lanes] = np.where(keeps, before, np.float32(0)) + products[number]
            registers[slot][lanes] = POISON
        own.group[lanes] = self.committed[lanes]

    def wait(self, registers: Sequence[Lanes], shared: Lanes, lanes: NDArray[np.bool_], left: int) -> None:
        """Deliver the sums of the lanes' groups but for the last `left`."""
        kept: list[SharedOperand | RegisterOperand] = []
        for operand in self.operands:
            done = lanes[operand.lanes] & (operand.group < self.committed[operand.lanes] - left)
            if done.any():
                operand.check(registers, shared, done)
            if not done.all():
                kept.append(operand.of(~done))
        self.operands = kept
        for slots, held in self.accumulators.items():
            done = lanes & (held.group >= 0) & (held.group < self.committed - left)
            if done.any():
                for number, slot in enumerate(slots):
                    np.copyto(registers[slot].view(np.float32), held.sums[number], where=done)
                held.group[done] = -1
