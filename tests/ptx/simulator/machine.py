"""Runs a kernel: all blocks of a wave at once, as numpy operations over their lanes.

Lanes that stand at one instruction execute it together; where they part, the lowest program counter goes first, which
brings them together again. Barriers release when no lane can run. A kernel is decoded once: every instruction becomes a
Python function of the wave and the acting lanes (arithmetic.py, access.py, warp.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.simulator.counters import Counters
from tests.ptx.simulator.faults import Fault
from tests.ptx.simulator.formats import UNSIGNED, Lanes
from tests.ptx.simulator.in_flight import InFlight
from tests.ptx.simulator.memory import BlockMemory, GlobalMemory, SharedMemory
from tests.ptx.simulator.parser import Instruction, Kernel

WARP = 32
LANES_AT_ONCE = 8192
MOST_STEPS = 20_000_000
RUNS, WAITS, GONE = 0, 1, 2


class Active:
    """The lanes that execute an instruction together."""

    def __init__(self, lanes: NDArray[np.bool_]) -> None:
        self.lanes = lanes
        self.count = int(np.count_nonzero(lanes))
        self.full = self.count == lanes.size
        self.where: Any = True if self.full else lanes
        """For the `where` of numpy's functions."""

    @cached_property
    def numbers(self) -> Lanes:
        """Numbers of the active lanes."""
        return np.flatnonzero(self.lanes)

    @cached_property
    def warps(self) -> NDArray[np.bool_]:
        """Which warps have an active lane."""
        return self.lanes.reshape(-1, WARP).any(1)

    @cached_property
    def warp_count(self) -> int:
        return int(np.count_nonzero(self.warps))

    def whole_warps(self) -> bool:
        """Whether no warp is active in part."""
        return self.full or self.count == WARP * self.warp_count


Execute = Callable[["Wave", Active], None]


class Wave:
    """Blocks that run side by side, and their registers and memories."""

    def __init__(
        self,
        kernel: Kernel,
        blocks: Sequence[tuple[int, int, int]],
        grid: tuple[int, int, int],
        threads: tuple[int, int, int],
        shared_bytes: int,
        granule: int,
        global_memory: GlobalMemory,
        parameters: bytes,
        counters: Counters,
    ) -> None:
        count = threads[0] * threads[1] * threads[2]
        padded = -(-count // WARP) * WARP
        lanes = len(blocks) * padded
        self.kernel, self.lanes, self.counters = kernel, lanes, counters
        self.block = np.repeat(np.arange(len(blocks)), padded)
        self.lane = np.arange(lanes) % WARP
        thread = np.arange(lanes) % padded
        self.warp_in_block = thread // WARP
        self.state = np.where(thread < count, RUNS, GONE).astype(np.int8)
        self.pc = np.zeros(lanes, np.int64)
        self.registers: list[Lanes] = [
            np.zeros(lanes, UNSIGNED[register.bits] if register.bits else bool)
            for register in kernel.registers.values()
        ]
        self.global_memory = global_memory
        self.shared = SharedMemory(len(blocks), shared_bytes, granule)
        self.local = BlockMemory(lanes, kernel.local_bytes, "local")
        self.parameters = BlockMemory(1, kernel.parameter_bytes, "parameter")
        self.parameters.data[: len(parameters)] = np.frombuffer(parameters, np.uint8)
        # cp.async: copies that were issued but not waited for, and how many groups each lane has committed.
        self.pending: list[tuple[Lanes, Lanes, Lanes, Lanes]] = []
        self.committed = np.zeros(lanes, np.int64)
        self.in_flight = InFlight(lanes)
        self.special = self._special_registers(blocks, grid, threads, thread)

    def _special_registers(
        self,
        blocks: Sequence[tuple[int, int, int]],
        grid: tuple[int, int, int],
        threads: tuple[int, int, int],
        thread: Lanes,
    ) -> dict[str, Lanes]:
        values: dict[str, Any] = {"%laneid": self.lane, "%warpid": self.warp_in_block}
        places = np.array(blocks, np.int64)[self.block]
        steps = (1, threads[0], threads[0] * threads[1])
        for axis, letter in enumerate("xyz"):
            values[f"%tid.{letter}"] = thread // steps[axis] % threads[axis]
            values[f"%ntid.{letter}"] = threads[axis]
            values[f"%ctaid.{letter}"] = places[:, axis]
            values[f"%nctaid.{letter}"] = grid[axis]
        return {name: np.broadcast_to(np.asarray(value, np.uint32), self.lanes) for name, value in values.items()}

    def where_is(self, lane: int) -> str:
        """Block and thread of a lane, for messages."""
        return f"block {self.block[lane]} of the wave, warp {self.warp_in_block[lane]}, lane {self.lane[lane]}"


class Program:
    """A decoded kernel."""

    def __init__(self, kernel: Kernel, decode: Callable[[Instruction, Kernel], Execute], granule: int) -> None:
        self.kernel, self.granule = kernel, granule
        self.steps = [
            None
            if instruction.opcode in CONTROL and "warp" not in instruction.modifiers
            else decode(instruction, kernel)
            for instruction in kernel.instructions
        ]
        self.predicates = [
            kernel.registers[i.predicate].slot if i.predicate is not None else -1 for i in kernel.instructions
        ]

    def launch(
        self,
        global_memory: GlobalMemory,
        grid: tuple[int, int, int],
        threads: tuple[int, int, int],
        parameters: bytes,
        dynamic_shared: int = 0,
        blocks: Iterable[tuple[int, int, int]] | None = None,
    ) -> Counters:
        """Run the blocks (default: all of the grid) and count what they do.

        Raises:
            Fault: the program does what is undefined on a GPU.
        """
        counters = Counters()
        warps = np.zeros(len(self.steps), np.int64)
        lanes = np.zeros(len(self.steps), np.int64)
        everywhere = ((x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0]))
        chosen = iter(everywhere if blocks is None else blocks)
        at_once = max(1, LANES_AT_ONCE // (threads[0] * threads[1] * threads[2]))
        shared_bytes = self.kernel.shared_bytes + dynamic_shared
        with np.errstate(all="ignore"):
            while wave_blocks := list(islice(chosen, at_once)):
                counters.blocks += len(wave_blocks)
                wave = Wave(
                    self.kernel, wave_blocks, grid, threads, shared_bytes, self.granule, global_memory, parameters,
                    counters,
                )  # fmt: skip
                _Run(self, wave, warps, lanes).run()
        self._count(counters, warps, lanes)
        counters.global_distinct_load_sectors, counters.global_distinct_store_sectors = global_memory.distinct_sectors()
        return counters

    def _count(self, counters: Counters, warps: Lanes, lanes: Lanes) -> None:
        for instruction, in_warps, in_lanes in zip(self.kernel.instructions, warps.tolist(), lanes.tolist()):
            name, modifiers = instruction.opcode, instruction.modifiers
            counters.instructions += in_warps
            counters.opcodes[name] += in_warps
            if name == "mma" or "mma_async" in modifiers:
                counters.tensor_flops += 2 * in_warps * mma_products(instruction)
            elif instruction.type in ("f16", "bf16", "f32") and name in ("fma", "add", "sub", "mul"):
                counters.float_flops += in_lanes * (2 if name == "fma" else 1)
            elif name in ("atom", "red") and "shared" not in modifiers:
                counters.atomics += in_lanes


CONTROL = ("bra", "ret", "exit", "bar", "barrier", "trap")


def mma_products(instruction: Instruction) -> int:
    """Multiply-adds of a warp in one mma.sync, M·N·K, or a quarter of those of a warpgroup's wgmma."""
    shape = next(
        match for modifier in instruction.modifiers if (match := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", modifier))
    )
    m, n, k = map(int, shape.groups())
    return m * n * k // (4 if instruction.opcode == "wgmma" else 1)


class _Run:
    """The scheduler of one wave."""

    def __init__(self, program: Program, wave: Wave, warps: Lanes, lanes: Lanes) -> None:
        self.program, self.wave = program, wave
        self.executed_warps, self.executed_lanes = warps, lanes
        self.budget = MOST_STEPS

    def run(self) -> None:
        wave, end = self.wave, len(self.program.steps)
        while True:
            runs = wave.state == RUNS
            if not runs.any():
                if not self._release():
                    return
                continue
            counters = wave.pc[runs]
            first = int(counters.min())
            later = counters[counters > first]
            stop = int(later.min()) if later.size else end
            active = Active(runs & (wave.pc == first) if later.size else runs)
            self._together(first, stop, active)

    def _release(self) -> bool:
        """Let the blocks go whose threads all wait at one barrier; False if all threads are gone."""
        wave = self.wave
        waits = wave.state == WAITS
        if not waits.any():
            return False
        blocks, first = np.unique(wave.block[waits], return_index=True)
        at = np.zeros(int(wave.block[-1]) + 1, np.int64)
        at[blocks] = wave.pc[waits][first]
        if (wave.pc[waits] != at[wave.block[waits]]).any():
            raise Fault(f"{wave.kernel.name}: threads of one block wait at different barriers")
        wave.state[waits] = RUNS
        wave.shared.barrier(blocks)
        return True

    def _together(self, pc: int, stop: int, active: Active) -> None:
        """Run lanes from `pc` until they part, wait, end, or reach `stop`, where others stand."""
        wave, program = self.wave, self.program
        steps, predicates, instructions = program.steps, program.predicates, program.kernel.instructions
        while pc < stop:
            self.budget -= 1
            if self.budget < 0:
                raise Fault(f"{program.kernel.name} ran more than {MOST_STEPS} instructions")
            acting = active
            instruction = instructions[pc]
            if predicates[pc] >= 0:
                predicate = wave.registers[predicates[pc]]
                chosen = active.lanes & ~predicate if instruction.negated else active.lanes & predicate
                count = np.count_nonzero(chosen)
                if count == 0:
                    pc += 1
                    continue
                if count != active.count:
                    acting = Active(chosen)
            self.executed_warps[pc] += acting.warp_count
            self.executed_lanes[pc] += acting.count
            step = steps[pc]
            if step is not None:
                try:
                    step(wave, acting)
                except Fault as fault:
                    place = wave.where_is(int(acting.numbers[0]))
                    raise Fault(f"{program.kernel.name}: {fault}; at {instruction.text!r}, first of {place}") from None
                pc += 1
            elif instruction.opcode == "bra":
                assert instruction.target is not None
                if acting is not active:
                    wave.pc[active.lanes] = pc + 1
                    wave.pc[acting.lanes] = instruction.target
                    return
                pc = instruction.target
            elif instruction.opcode == "trap":
                raise Fault(f"{program.kernel.name}: trap at {instruction.text!r}")
            else:
                wave.state[acting.lanes] = WAITS if instruction.opcode in ("bar", "barrier") else GONE
                wave.pc[acting.lanes] = pc + 1
                if acting is active:
                    return
                pc += 1
                active = Active(active.lanes & ~acting.lanes)
        wave.pc[active.lanes] = pc
        if pc >= len(steps):
            wave.state[active.lanes] = GONE
