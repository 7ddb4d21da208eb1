"""Other tiles for the kernels that stand beside public ones: could any be ahead of them in everything? No GPU.

    python -m benchmarks.gpu_tile_trials [--anew | --recorded]

writes docs/gpu_tile_trials.md and its JSON in benchmarks/results. Trials recorded there are kept, beside the present
figures of the public kernels, where kernel, tile, grid and Triton's version are as they were (--anew: none; --recorded:
nothing is compiled, and what is missing is named).

For each kernel of benchmarks/results/gpu_side_by_side.json that is behind a public one in a figure, a grid of tiles is
compiled. Three figures count, each better when higher: FLOPs of the main loop for each instruction and for each byte
loaded, and occupancy. Tiles that spill, exceed the card's shared memory, repeat products in several warps or wait for
every product are out. Of the others the undominated ones are listed, with what the public kernels reach.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from tqdm import tqdm

from benchmarks.gpu_side_by_side import PEER_KERNELS, loop_flops, op_of
from m3kernels import _tiles, compiled_tables
from m3kernels.compiled_facts import CompiledFacts
from m3kernels.compiled_tables import Entry
from m3kernels.maxsim.triton_kernels import MOST_QUERY_ROWS
from m3kernels.static_report import tile_text

ROOT = Path(__file__).resolve().parents[1]
SIDE_BY_SIDE = ROOT / "benchmarks" / "results" / "gpu_side_by_side.json"
RECORD = ROOT / "benchmarks" / "results" / "gpu_tile_trials.json"
DOCUMENT = ROOT / "docs" / "gpu_tile_trials.md"

Tile = tuple[int, ...]
Figures = tuple[float, float, float]
FIGURES = ("FLOP/instr.", "FLOP/B", "occupancy")

GRIDS: dict[tuple[str, str], list[Tile]] = {
    ("attention", "forward"): list(itertools.product((64, 128, 256), (32, 64, 128), (4, 8), (2, 3))),
    ("attention", "backward_q"): list(itertools.product((64, 128, 256), (32, 64, 128), (4, 8), (2,))),
    ("attention", "backward_kv"): list(itertools.product((32, 64, 128), (64, 128, 256), (4, 8), (2,))),
    ("maxsim", "forward"): list(itertools.product((64, 128), (64, 128), (32, 64, 128), (4, 8), (2, 3))),
    ("maxsim", "backward_q"): [
        (rows, columns, warps, 2)
        for rows, columns, warps in itertools.product((1, 2, 4, 8, 16), (256, 512, 1024), (1, 2, 4))
        if 16 <= rows * columns // (32 * warps) <= 64
    ],
    ("maxsim", "backward_p"): list(itertools.product((32, 64, 128), (64, 128), (32, 64), (4, 8), (2,))),
}
"""(op, kernel) → tiles to compile, in the form of tiles.json."""

_TALL = "A tile of 256 rows is not shipped: a text of 100 tokens would compute 256 rows."
_ROOM = "Tiles that load less spill with options, or exceed the 99 KiB of RTX cards, which take sm_80's table."
_SUMS = "flash-attention-triton's bytes leave out its sums of grad_q."
_TF32 = "Its one-hot side is tf32 to keep the range of gradients, at half the rate of 16 bits; see gpu_side_by_side.md."
_FOLD = "Similarities stay in registers until they are folded into maxima, so occupancy is bought with smaller tiles."
_ONE_ROW = (
    "One row at a time (1x1024 by one warp) has 50 % occupancy and fewer FLOPs for each instruction; two rows have "
    "more bytes under way on a multiprocessor ({} warps with 4 KiB each against 32 with 2)."
)
WHY = {
    "attention/sm_80/forward/bf16/32": (
        f"The one that is ahead spills; 256x32 by 8 warps has its bytes and half its occupancy. {_TALL}"
    ),
    "attention/sm_80/backward_q/bf16/32": f"{_SUMS} {_TALL}",
    "attention/sm_80/backward_kv/bf16/32": f"{_SUMS} A tile of 256 keys is not shipped, for the reason of 256 rows.",
    "attention/sm_90/forward/bf16/32": _TALL,
    "attention/sm_80/forward/bf16/64": f"{_TALL} On sm_86 it spills, with options on sm_80 too.",
    "attention/sm_80/backward_q/bf16/64": _SUMS,
    "attention/sm_80/backward_kv/bf16/64": f"Calls with options, with which it spills, take 32x128. {_SUMS}",
    "attention/sm_90/forward/bf16/64": _TALL,
    "attention/sm_90/backward_kv/bf16/64": "A tile of 256 keys is not shipped, for the same reason as 256 query rows.",
    "attention/sm_100/backward_kv/bf16/32": (
        "flash-linear-attention's two warps run mma.sync, whose sums are registers; ours are in tensor memory and "
        "are copied to registers. 64x64 by two warps (mma.sync, outside the grid) has 753 and 120 and spills 56 B. "
        "Occupancy of 25 % costs a third of the FLOPs for each instruction (32x128 by 8 warps)."
    ),
    "attention/sm_100/backward_kv/bf16/64": (
        "Two blocks on a multiprocessor leave 128 registers to a thread: 32x128 by 8 warps has 25 % and fewer FLOPs "
        "for each instruction than the single pass."
    ),
    "attention/sm_80/forward/bf16/128": _TALL,
    "attention/sm_100/forward/bf16/128": (
        "128x128 by 8 warps has 952 and spills 32 B. With one stage (outside the grid) it has 1225, 128 and 12 % and "
        "spills nothing, but loads nothing ahead: its only block would wait for every tile, which no figure here shows."
    ),
    "attention/sm_80/backward_q/bf16/128": _ROOM,
    "attention/sm_80/backward_kv/bf16/128": _ROOM,
    "attention/sm_90/forward/bf16/128": f"{_TALL} With dropout 128x128 spills; such calls take 128x64.",
    "attention/sm_90/backward_q/bf16/128": _TALL,
    "maxsim/sm_80/forward/bf16/128": f"{_FOLD} 128x128x128 exceeds the 99 KiB of RTX cards, which take sm_80's table.",
    "maxsim/sm_80/backward_q/bf16/256": (
        "The tiles ahead have 1024 columns: at width 128 seven eighths of them are masked, and count here."
    ),
    "maxsim/sm_80/backward_q/bf16/1024": _ONE_ROW.format(21),
    "maxsim/sm_90/forward/bf16/128": (
        f"{_FOLD} Two stages of 128 columns have as many bytes under way as three of 64, which had 2405."
    ),
    "maxsim/sm_90/backward_q/bf16/1024": _ONE_ROW.format(21),
    "maxsim/sm_100/forward/bf16/128": f"{_FOLD} Of 128x128 every tile spills.",
    "maxsim/sm_100/backward_q/bf16/1024": _ONE_ROW.format(17),
    "maxsim/sm_80/backward_p/bf16/1024": _TF32,
    "maxsim/sm_90/backward_p/bf16/1024": f"{_TF32} 128 passage rows would idle on shorter passages.",
    "maxsim/sm_100/backward_p/bf16/1024": _TF32,
}
"""Start of an entry's name → why the tile that ships was kept where another one, or a peer, is ahead in a figure."""


@dataclass(frozen=True)
class Trial:
    """One kernel of ours at one width on one architecture: what its grid came to."""

    case: str
    entry: Entry
    compiled: int
    spilled: int
    unfit: int
    repeated: int
    shipped: Figures
    peers: dict[str, tuple[int, Figures]]
    """Package and kernel → bytes spilled, figures."""
    front: dict[str, Figures]
    """Undominated tiles of those that are neither spilled, unfit nor repeated."""

    @property
    def equal_everywhere(self) -> list[str]:
        """Tiles at least equal to the best that any public kernel reaches in each figure."""
        best = [max(figures[i] for _, figures in self.peers.values()) for i in range(3)]
        return [tile for tile, own in self.front.items() if all(a >= b for a, b in zip(own, best, strict=True))]


def figures(facts: CompiledFacts) -> Figures:
    """FLOP/instr., FLOP/B and occupancy of compiled code."""
    flops = loop_flops(facts)
    return flops / facts.loop_instructions, flops / facts.loop_load_bytes, facts.occupancy


def dominated(one: Figures, by: Figures) -> bool:
    """Whether `by` is nowhere behind and somewhere ahead."""
    return by != one and all(a >= b for a, b in zip(by, one, strict=True))


def cases() -> Iterator[tuple[str, Entry, dict[str, tuple[int, Figures]]]]:
    """Case, shipped entry and public kernels, of each of our kernels that one of them leads in a figure."""
    lines = json.loads(SIDE_BY_SIDE.read_text())
    shipped = {entry.name: entry for entry in compiled_tables.entries()}
    for line in lines:
        op = op_of(line["case"])
        kernel = line["kernel"].removesuffix("_kernel")
        if line["package"] != "m3kernels" or (op, kernel) not in PEER_KERNELS:
            continue
        peers = {
            f"{other['package']} `{other['kernel']}`": (other["spilled_bytes"], _recorded(other))
            for other in lines
            if (other["case"], other["architecture"]) == (line["case"], line["architecture"])
            and other["kernel"] in PEER_KERNELS[op, kernel]
            and other["package"] != "m3kernels"
        }
        own = _recorded(line)
        if not any(theirs > ours for _, figures in peers.values() for theirs, ours in zip(figures, own, strict=True)):
            continue
        # MaxSim's table counts query rows for the forward.
        words = line["case"].replace(",", "").split()
        width = MOST_QUERY_ROWS if (op, kernel) == ("maxsim", "forward") else int(words[words.index("width") + 1])
        tiles = _tiles.for_architecture(op, line["architecture"]).entries[kernel]["16bit"]
        column = min(listed for listed in _tiles.widths(tiles) if listed >= width)
        options = "save" if (op, kernel) == ("maxsim", "forward") else "plain"
        yield line["case"], shipped[f"{op}/sm_{line['architecture']}/{kernel}/bf16/{column}/{options}"], peers


def _recorded(line: dict[str, Any]) -> Figures:
    return line["flops_per_instruction"], line["flops_per_byte"], line["occupancy"]


def trials(anew: bool, only_recorded: bool) -> tuple[list[Trial], list[str]]:
    """All cases: recorded, compiled by as many processes as there are cores, or out of the cache of compiled facts; and
    the names of those that were not compiled."""
    chosen = list(cases())
    recorded = {} if anew else {(one["case"], one["hash"]): one for one in json.loads(RECORD.read_text())}

    def kept(case: str, entry: Entry) -> dict[str, Any] | None:
        found = recorded.get((case, entry.hash))
        return found if found and found["compiled"] == len(GRIDS[entry.op, entry.kernel]) else None

    fresh = [entry for case, entry, _ in chosen if not kept(case, entry)]
    if only_recorded:
        chosen = [one for one in chosen if kept(*one[:2])]
    grid = {
        entry: [replace(entry, tile=tile) for tile in GRIDS[entry.op, entry.kernel]]
        for case, entry, _ in chosen
        if not kept(case, entry)
    }
    wanted = dict.fromkeys((*grid, *itertools.chain.from_iterable(grid.values())))
    with tqdm(total=len(wanted), unit="kernel") as bar:
        facts = compiled_tables.compile_entries(wanted, compiled_tables.cache_folder(), bar.update)
    found = []
    for case, entry, peers in chosen:
        if line := kept(case, entry):
            line = {key: value for key, value in line.items() if key != "hash"}
            found.append(Trial(**{**line, "entry": entry, "peers": peers}))
        else:
            found.append(_trial(case, entry, {one: facts[one] for one in grid[entry]}, facts[entry], peers))
    return found, sorted({entry.name for entry in fresh if entry not in grid})


def _trial(
    case: str, entry: Entry, grid: dict[Entry, CompiledFacts], shipped: CompiledFacts, peers: dict[str, Any]
) -> Trial:
    spilled = [one for one, facts in grid.items() if facts.spilled]
    unfit = [one for one, facts in grid.items() if one not in spilled and not _usable(facts)]
    left = {one: facts for one, facts in grid.items() if one not in spilled and one not in unfit}
    repeated = [one for one, facts in left.items() if facts.loop_tensor_flops * facts.num_warps > one.block_flops > 0]
    good = {tile_text(one.tile): figures(facts) for one, facts in left.items() if one not in repeated}
    front = {tile: own for tile, own in good.items() if not any(dominated(own, other) for other in good.values())}
    return Trial(
        case, entry, len(grid), len(spilled), len(unfit), len(repeated), figures(shipped), peers,
        dict(sorted(front.items(), key=lambda item: item[1], reverse=True)),
    )  # fmt: skip


_INTRODUCTION = """# Other tiles for the kernels beside public ones

Made by `python -m benchmarks.gpu_tile_trials` with Triton {triton} on a machine without a GPU: facts of compiled code,
no time was measured. [gpu_side_by_side.md](gpu_side_by_side.md) compares the tiles that ship with public kernels; here
{count} other configurations were compiled to see whether any would be at least equal to the best public kernel in
every figure. Listed are the tiles that no other one beats in all three figures; tiles that spill registers, do not fit
the card, or repeat a product in several warps (more FLOPs, none of them useful) are out. A public kernel that spills
keeps its figures, with the bytes in brackets.

Larger tiles load fewer bytes and leave fewer warps on a multiprocessor: occupancy stands against both other figures.
The tiles that ship favour bytes and instructions, as tensor-core kernels usually do: with copies that run ahead
(cp.async, wgmma) few warps hide latency. Whether that is right only a GPU tells (`m3 bench --tune`).

Trials changed twelve tiles. First sm_80's gradients at head width 64 (about twice the FLOPs for each byte), sm_90's
forward and gradient of keys at width 128 (1.2 and 1.8 times the useful FLOPs for each instruction) and MaxSim's
gradient of passages on sm_90 (1.2 times). Then, before → after, in FLOPs for each instruction and byte:

| kernel | before | after |
| --- | --- | --- |
| attention, width 32: backward_kv, sm_80 | 64x128, 8w 2s: 623, 205 | 32x128, 4w 2s: 755, 205 |
| attention, width 64: backward_kv, sm_80 (no options) | 32x128, 8w 2s: 907, 205 | 64x128, 8w 2s: 909, 228 |
| attention, width 64: forward, sm_100 (no options) | 128x64, 8w 3s: 437, 128 | 128x128, 8w 2s: 551, 128 |
| attention, width 128: backward_q, sm_100 (no dropout) | 64x64, 8w 2s: 759, 96 | 128x128, 8w 2s: 1489, 192 |
| attention, width 128: backward_kv, sm_100 | 64x64, 8w 2s: 862, 120 | 64x128, 8w 2s: 1244, 241 |
| late interaction: forward, sm_100 | 64x128x64, 8w 2s: 1237, 43 | 128x64x128, 8w 2s: 1579, 43 |
| late interaction: backward_p, sm_100 | 64x128x64, 8w 2s: 362, 54 | 128x128x64, 8w 2s: 531, 108 |

Occupancy is as it was but for backward_q at width 128 on sm_100, 12 % after 25 %.
"""


def markdown(found: list[Trial], missing: list[str]) -> str:
    """The document."""
    total = sum({trial.entry: trial.compiled for trial in found}.values())
    lines = [_INTRODUCTION.format(triton=triton.__version__, count=total)]
    if missing:
        lines += [
            "Behind a public kernel in a figure and **not tried with a whole grid yet**: " + ", ".join(missing),
            "",
        ]
    for trial in found:
        entry = trial.entry
        lines += [
            f"## {trial.case}: {entry.kernel}, sm_{entry.architecture}",
            "",
            f"{trial.compiled} tiles: {trial.spilled} spill, {trial.unfit} do not fit, compile to no tensor-core loop "
            f"or wait for every product, {trial.repeated} repeat products.",
            "",
            "| | " + " | ".join(FIGURES) + " |",
            "| --- | --- | --- | --- |",
            _row(f"**ships: {tile_text(entry.tile)}**", trial.shipped),
        ]
        for package, (spilled, own) in trial.peers.items():
            lines.append(_row(f"{package}{f' (spills {spilled} B)' if spilled else ''}", own))
        lines += [_row(tile, own) for tile, own in trial.front.items() if tile != tile_text(entry.tile)]
        equal = trial.equal_everywhere
        verdict = f"At least equal to every public kernel in everything: {', '.join(equal)}." if equal else (
            "No tile is at least equal to the best public figure in all three."
        )  # fmt: skip
        why = WHY.get(entry.name.rpartition("/")[0])
        lines += ["", f"{verdict} {why}" if why else verdict, ""]
    return "\n".join(lines)


def _usable(facts: CompiledFacts) -> bool:
    """Whether a block fits, multiplies on tensor cores and leaves its products in flight."""
    fits = facts.fits and facts.blocks_per_multiprocessor > 0
    return fits and (facts.loop_tensor_flops > 0 or not facts.products) and not facts.serialized_products


def _row(name: str, own: Figures) -> str:
    return f"| {name} | {own[0]:.0f} | {own[1]:.0f} | {100 * own[2]:.0f} % |"


def main() -> None:
    """Write the document and its JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--anew", action="store_true", help="keep no recorded trial")
    parser.add_argument("--recorded", action="store_true", help="compile nothing, name what is missing")
    asked = parser.parse_args()
    found, missing = trials(asked.anew, asked.recorded)
    rows = ",\n".join(
        f"  {json.dumps({**asdict(trial), 'entry': trial.entry.name, 'hash': trial.entry.hash})}" for trial in found
    )
    RECORD.write_text(f"[\n{rows}\n]\n")
    DOCUMENT.write_text(markdown(found, missing))


if __name__ == "__main__":
    main()
