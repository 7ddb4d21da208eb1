"""The facts of compiled GPU kernels as a Markdown document: docs/gpu_static.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import triton

from m3kernels.compiled_facts import MULTIPROCESSORS, CompiledFacts
from m3kernels.compiled_tables import Entry, problems
from m3kernels.machine_code import TENSOR_CORE

_NO_PROBLEMS = (
    "none spills, none exceeds its card, no product of 16-bit or tf32 numbers is off the tensor cores, none waits for "
    "each of its wgmma products."
)
_COPIES = ("cp.async", "bulk_copy")
COLUMNS: dict[str, Callable[[CompiledFacts], str]] = {
    "registers": lambda facts: str(facts.registers),
    "spilled B": lambda facts: str(facts.stack_bytes),
    "local": lambda facts: str(facts.local_accesses),
    "shared KiB": lambda facts: f"{facts.shared_bytes / 1024:.1f}",
    "warps": lambda facts: str(facts.num_warps),
    "blocks/SM": lambda facts: str(facts.blocks_per_multiprocessor),
    "occupancy": lambda facts: f"{100 * facts.occupancy:.0f} %",
    "loop": lambda facts: str(facts.loop_instructions),
    "tensor": lambda facts: _named(facts, TENSOR_CORE),
    "FMA": lambda facts: str(facts.loop_counts["ffma"]),
    "ex2": lambda facts: str(facts.loop_counts["ex2"]),
    "copies": lambda facts: _named(facts, _COPIES),
    "loads": lambda facts: str(facts.loop_counts["load_global"]),
    "bytes": lambda facts: str(facts.loop_load_bytes),
}
SHORT = ("registers", "spilled B", "shared KiB", "blocks/SM", "occupancy", "loop", "tensor")
"""Columns that fit a terminal beside the names."""
RATIOS = ("FLOP/instr.", "FLOP/B")
_INTRODUCTION = """# What the GPU kernels compile to

Made by `m3 bench --static --markdown docs/gpu_static.md` with Triton {triton} on a machine without a GPU. These are
facts of compiled code; nothing here was measured on a device.

- A line is one kernel in one configuration that ships: dtype, the widest call that it serves (head width for attention,
  query rows for MaxSim's forward, E for its backward), and the options that are compiled in, in every set that a call
  can ask for: sampled attention and dropout; MaxSim's zero floor, saved argmax, listed pairs and mean. tf32 is float32
  with `allow_tf32`. fp32 multiplies in IEEE float32, which no tensor core does.
- *spilled B* is the stack of a thread, *local* the loads and stores of local memory in the machine code: both must
  be 0.
- *occupancy* follows from registers, shared memory and threads with the limits of one multiprocessor in NVIDIA's CUDA
  C++ programming guide 13.0, "Technical Specifications per Compute Capability": {limits}. On sm_100 tensor memory
  counts too, of which a multiprocessor has 512 columns.
- *loop* and what is right of it are counted in the main loop of the machine code, for each warp: instructions,
  tensor-core products (mma.sync, wgmma, tcgen05), float32 multiply-adds, exponentials, asynchronous copies (cp.async or
  bulk), plain global loads, and the bytes that both bring. *FLOP/instr.* and *FLOP/B* divide the useful FLOPs of a turn
  by the instructions and by the bytes.
- sm_86 and sm_89 take the tiles of sm_80, which keep to the 99 KiB of shared memory that those cards give a block.
"""


def markdown(facts: Mapping[Entry, CompiledFacts], library: Mapping[str, CompiledFacts]) -> str:
    """The whole document."""
    limits = "; ".join(
        f"sm_{number}: {sm.warps} warps, {sm.blocks} blocks, {sm.registers >> 10}k registers,"
        f" {sm.shared_bytes >> 10} KiB"
        for number, sm in MULTIPROCESSORS.items()
        if any(entry.architecture == number for entry in facts)
    )
    bad = [entry.name for entry, value in facts.items() if problems(value, entry.dtype)]
    lines = [
        _INTRODUCTION.format(triton=triton.__version__, limits=limits),
        f"{len(facts)} configurations of Triton kernels and {len(library)} CUDA C++ kernels; "
        + (f"with problems: {', '.join(bad)}." if bad else _NO_PROBLEMS),
        "",
    ]
    for (op, architecture), group in _groups(facts):
        lines += [f"## {op}, sm_{architecture}", ""]
        columns = ["kernel", "dtype", "width", "options", "tile", *COLUMNS, *RATIOS]
        lines += _table(columns, [_row(entry, facts[entry]) for entry in group])
    if library:
        lines += ["## CUDA C++", "", "sm_86 and sm_89 execute the machine code of sm_80.", ""]
        lines += _table(
            ["kernel", "architecture", *COLUMNS],
            [
                [f"`{name.split('/', 2)[2]}`", name.split("/")[1], *(column(value) for column in COLUMNS.values())]
                for name, value in sorted(library.items(), key=lambda item: item[0].split("/")[::-1])
            ],
        )
    return "\n".join(lines)


def _row(entry: Entry, facts: CompiledFacts) -> list[str]:
    options = ", ".join(entry.options).lower() or "-"
    configuration = [entry.kernel, entry.dtype, str(entry.width or "any"), options, tile_text(entry.tile)]
    return [*configuration, *(column(facts) for column in COLUMNS.values()), *ratios(entry, facts)]


def ratios(entry: Entry, facts: CompiledFacts) -> tuple[str, str]:
    """Useful FLOPs of the main loop for each instruction of a warp and for each byte loaded; "-" without products."""
    flops = loop_flops(entry, facts)
    parts = (facts.loop_instructions, facts.loop_load_bytes)
    first, second = (f"{flops / part:.0f}" if flops and part else "-" for part in parts)
    return first, second


def loop_flops(entry: Entry, facts: CompiledFacts) -> float:
    """Useful FLOPs of one turn of the compiled main loop for each warp.

    That is one turn of the source's loop, or as many as the products say where the compiler unrolled it. Products that
    warps repeat in tiles too small for them are not useful.
    """
    turn = entry.block_flops / facts.num_warps
    if not turn:
        return 0.0
    if facts.loop_tensor_flops:
        return turn * max(1, int(facts.loop_tensor_flops / turn))
    return turn * max(1, int(facts.loop_fma_flops / turn))


def tile_text(tile: Sequence[int]) -> str:
    """As 128x64, 8 warps, 3 stages."""
    *blocks, warps, stages = tile
    return f"{'x'.join(map(str, blocks))}, {warps}w {stages}s"


def _named(facts: CompiledFacts, kinds: Sequence[str]) -> str:
    return " ".join(f"{facts.loop_counts[kind]} {kind}" for kind in kinds if facts.loop_counts[kind]) or "-"


def _groups(entries: Iterable[Entry]) -> Iterator[tuple[tuple[str, int], list[Entry]]]:
    groups: dict[tuple[str, int], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.op, entry.architecture), []).append(entry)
    yield from groups.items()


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]
