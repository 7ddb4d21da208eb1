"""What every entry of every tile table compiles to, without a GPU; recorded in benchmarks/results/static/<op>.json.

    python -m m3kernels.compiled_tables attention benchmarks/results/static/attention.json

compiles all entries of an op (minutes) and writes the record. The record names the kernels' source, Triton's version
and the tiles that it was made from, so that a stale one is recognised.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton

from m3kernels import _tiles
from m3kernels.compiled_facts import CompiledFacts, compile_facts

_DTYPES = {"16bit": "bf16", "float32": "fp32", "tf32": "fp32"}


@dataclass(frozen=True)
class Entry:
    """One line of a tile table."""

    op: str
    architecture: int
    kernel: str
    arithmetic: str
    width: int
    tile: tuple[int, ...]

    @property
    def name(self) -> str:
        """As in the record: sm_80/forward/16bit/64."""
        return f"sm_{self.architecture}/{self.kernel}/{self.arithmetic}/{self.width}"


def entries(op: str) -> Iterator[Entry]:
    """All lines of the op's tables."""
    for architecture, table in _tiles.load(op).items():
        for kernel, arithmetics in table.entries.items():
            for arithmetic, widths in arithmetics.items():
                for width, tile in widths.items():
                    yield Entry(op, architecture, kernel, arithmetic, int(width), tuple(tile))


def compile_entry(entry: Entry) -> CompiledFacts:
    """Compile the kernel of an entry with every option on and read the machine code.

    That is not always the tightest variant: with options off, ptxas picks other register counts, and a few float32
    entries then spill a register or two.
    """
    module = importlib.import_module(f"m3kernels.{entry.op}.triton_kernels")
    kernel = getattr(module, f"{entry.kernel}_kernel")
    tile = _tiles.Tile.from_list(list(entry.tile))
    signature, constants, aligned = module.compiled_arguments(kernel, _DTYPES[entry.arithmetic], entry.width)
    return compile_facts(
        kernel,
        signature,
        {**constants, **tile.blocks(), "PRECISION": "tf32" if entry.arithmetic == "tf32" else "ieee"},
        entry.architecture,
        aligned=aligned,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def compile_entries(chosen: Iterable[Entry]) -> dict[str, CompiledFacts]:
    """Facts by the entries' names, compiled by as many processes as the machine has cores."""
    chosen = list(chosen)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return {entry.name: facts for entry, facts in zip(chosen, pool.map(compile_entry, chosen))}


def origin(op: str) -> dict[str, Any]:
    """What the compiled code depends on: Triton, the kernels' source without comments and docstrings, the tiles."""
    module = importlib.import_module(f"m3kernels.{op}.triton_kernels")
    tree = ast.parse(Path(str(module.__file__)).read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0].value.value = ""
    source = hashlib.sha256(ast.unparse(tree).encode()).hexdigest()
    return {
        "triton": triton.__version__,
        "source": source,
        "tiles": {entry.name: list(entry.tile) for entry in entries(op)},
    }


def read_record(op: str, path: Path) -> dict[str, CompiledFacts] | None:
    """The recorded facts, or None where there are none or they belong to other sources, tiles or another Triton."""
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    if record["origin"] != origin(op):
        return None
    return {name: CompiledFacts(**facts) for name, facts in record["facts"].items()}


def write_record(op: str, path: Path, facts: dict[str, CompiledFacts]) -> None:
    """Write facts with their origin, one line for each entry."""
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(asdict(value))}" for name, value in facts.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n  "origin": {json.dumps(origin(op))},\n  "facts": {{\n{lines}\n  }}\n}}\n')


def main() -> None:
    """Compile all entries of an op and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("op", choices=("attention", "maxsim"))
    parser.add_argument("path", type=Path)
    arguments = parser.parse_args()
    facts = compile_entries(entries(arguments.op))
    write_record(arguments.op, arguments.path, facts)
    for name, value in facts.items():
        print(
            f"{name:36s} registers {value.registers:3d} spilled {value.spilled!s:5s} shared {value.shared_bytes:6d}"
            f" blocks/SM {value.blocks_per_multiprocessor:2d} "
            + " ".join(f"{count} {what}" for what, count in value.counts.items() if count)
        )


if __name__ == "__main__":
    main()
