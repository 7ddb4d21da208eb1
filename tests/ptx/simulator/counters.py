"""What a launch did, counted: instructions, products, and traffic of global and shared memory.

A global request moves whole 32-byte sectors; a warp's request touches as many as its lanes' addresses lie in. Shared
memory has 32 banks of 4 bytes and serves 128 bytes of a warp in one phase (32 lanes of 4 bytes, 16 of 8, 8 of 16);
lanes that want different words of one bank cost a further wavefront each (CUDA C++ programming guide).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from tests.ptx.simulator.formats import Lanes

SECTOR = 32
BANKS = 32
PHASE_BYTES = 128


@dataclass
class Counters:
    """Totals over all blocks that ran; instructions are counted once for each warp, operations once for each thread."""

    blocks: int = 0
    instructions: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)
    tensor_flops: int = 0
    """Two for each multiply-add of mma.sync."""
    float_flops: int = 0
    """Two for each fma, one for each add, sub and mul in float32 or less."""
    global_load_bytes: int = 0
    global_load_sectors: int = 0
    global_store_bytes: int = 0
    global_store_sectors: int = 0
    global_distinct_load_sectors: int = 0
    global_distinct_store_sectors: int = 0
    atomics: int = 0
    shared_phases: int = 0
    shared_wavefronts: int = 0

    @property
    def bank_conflicts(self) -> int:
        """Wavefronts of shared memory beyond the fewest possible."""
        return self.shared_wavefronts - self.shared_phases

    def global_access(self, stores: bool, addresses: Lanes, size: int, warps: Lanes) -> None:
        """One access of `size` bytes (at most a sector) at each address, by lanes of the given warps."""
        sectors = _starts(np.sort((warps.astype(np.int64) << 48) ^ (addresses // SECTOR))).size
        if stores:
            self.global_store_bytes += addresses.size * size
            self.global_store_sectors += sectors
        else:
            self.global_load_bytes += addresses.size * size
            self.global_load_sectors += sectors

    def shared_access(self, addresses: Lanes, size: int, phases: Lanes) -> None:
        """One access of `size` bytes at each address; `phases` numbers the groups served together."""
        words = max(size // 4, 1)
        places = (addresses // 4)[:, None] + np.arange(words)
        wanted = np.sort(((phases.astype(np.int64)[:, None] << 24) | places).reshape(-1))
        wanted = wanted[_starts(wanted)]
        banks = np.sort((wanted >> 24 << 5) | (wanted & (BANKS - 1)))
        first_of_bank = _starts(banks)
        conflicts = np.diff(first_of_bank, append=banks.size)
        first_of_phase = _starts(banks[first_of_bank] >> 5)
        self.shared_phases += first_of_phase.size
        self.shared_wavefronts += int(np.maximum.reduceat(conflicts, first_of_phase).sum())


def _starts(ordered: Lanes) -> Lanes:
    """Where runs of equal numbers begin."""
    begins = np.ones(ordered.size, bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    return np.flatnonzero(begins)


def phase_numbers(lanes: Lanes, size: int) -> Lanes:
    """The phase in which each lane (numbered through all warps) is served for an access of `size` bytes."""
    return lanes // min(32, max(1, PHASE_BYTES // size))
