"""Tile shapes of the Triton kernels: a short JSON table for each op, read once, looked up at launch, never searched.

m3kernels/<op>/tiles.json maps architecture → kernel → arithmetic → width → tile, a tile being
[block_m, block_n, num_warps, num_stages] or, for products over long rows, [block_m, block_n, block_k, num_warps,
num_stages]. Arithmetic is "16bit" (bfloat16, float16), "float32" (IEEE: no tensor cores) or "tf32". The width taken is
the smallest listed that is not below the call's; for maxsim's two forward kernels it counts query rows, not E. A width
followed by options, such as "64 dropout" or "32 floor+save", is the tile of calls with exactly these switches on, where
the width's own tile would spill; the other calls of that width take the tile without options.
`m3kernels.tuning` measures candidates on a GPU and rewrites the file.

The entries in the repository were chosen by what the compiler made of them (`m3kernels.compiled_tables`: no spilled
registers, every 16-bit product on tensor cores), not by time on a device. The table of sm_80 keeps to 99 KiB of shared
memory and also serves sm_86, sm_89 and sm_120, which have no more and, like sm_80, run mma.sync.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Entries = dict[str, dict[str, dict[str, list[int]]]]
"""kernel → arithmetic → width, with options or without → tile, as in the file."""

OLDEST = 80
SMALL = (86, 87, 89, 120, 121)
"""Architectures without wgmma and tcgen05 whose blocks get 99 KiB of shared memory (sm_87: more)."""


@dataclass(frozen=True)
class Tile:
    """Block sizes and launch options of one kernel; block_k is None where a kernel has no such block."""

    block_m: int
    block_n: int
    block_k: int | None
    num_warps: int
    num_stages: int

    @classmethod
    def from_list(cls, numbers: list[int]) -> Tile:
        """From the file's form, of four numbers or five."""
        block_m, block_n, *block_k, num_warps, num_stages = numbers
        return cls(block_m, block_n, block_k[0] if block_k else None, num_warps, num_stages)

    def blocks(self) -> dict[str, int]:
        """The block sizes as arguments of a kernel."""
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}
        return blocks if self.block_k is None else {**blocks, "BLOCK_K": self.block_k}

    def launch_options(self) -> dict[str, Any]:
        """Everything that a launch takes from the table."""
        return {**self.blocks(), "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class TileTable:
    """The tiles of one op on one architecture."""

    architecture: int
    entries: Entries

    def find(
        self, kernel: str, dtype: torch.dtype, width: int, allow_tf32: bool, options: Collection[str] = ()
    ) -> Tile:
        """The tile for a call with these switches on; the smallest listed width that is not below `width`."""
        by_width = self.entries[kernel][arithmetic(dtype, allow_tf32)]
        return Tile.from_list(tile_of(by_width, min(one for one in widths(by_width) if one >= width), options))


def tile_of(by_width: Mapping[str, list[int]], width: int, options: Collection[str]) -> list[int]:
    """The tile that one column of the table has for a listed width with these switches on."""
    return by_width.get(key(width, options)) or by_width[str(width)]


def widths(by_width: Mapping[str, object]) -> list[int]:
    """The widths that one column of the table lists."""
    return [int(listed) for listed in by_width if listed.isdecimal()]


def key(width: int, options: Collection[str] = ()) -> str:
    """Where the table keeps a tile: "64", or with switches "64 sampled+dropout"."""
    return f"{width} {options_text(options)}".rstrip()


def turned_on(switches: Mapping[str, bool]) -> tuple[str, ...]:
    """The names of the switches that are on."""
    return tuple(name for name, on in switches.items() if on)


def options_text(options: Collection[str]) -> str:
    """Switches as one word: SAMPLED and DROPOUT as "sampled+dropout"."""
    return "+".join(options).lower()


def arithmetic(dtype: torch.dtype, allow_tf32: bool) -> str:
    """Which column of the table serves a dtype."""
    if dtype in (torch.float16, torch.bfloat16):
        return "16bit"
    return "tf32" if allow_tf32 else "float32"


def path(op: str) -> Path:
    """The file of an op: "attention" or "maxsim"."""
    return Path(__file__).parent / op / "tiles.json"


@functools.cache
def load(op: str) -> dict[int, TileTable]:
    """All tables of an op by architecture number (80 for sm_80)."""
    tables = json.loads(path(op).read_text())
    return {int(name.removeprefix("sm_")): TileTable(int(name.removeprefix("sm_")), e) for name, e in tables.items()}


def for_architecture(op: str, architecture: int) -> TileTable:
    """The architecture's own table, else sm_80's where shared memory is small, else that of the next one below.

    Raises:
        RuntimeError: the architecture is older than sm_80, for which the kernels are not made.
    """
    if architecture < OLDEST:
        raise RuntimeError(f"{op} needs a device of sm_{OLDEST} or newer, this is sm_{architecture}")
    tables = load(op)
    if architecture in tables:
        return tables[architecture]
    if architecture in SMALL:
        return tables[OLDEST]
    return tables[max(listed for listed in tables if listed <= architecture)]
