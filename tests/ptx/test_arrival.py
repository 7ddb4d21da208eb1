"""Machine code of wgmma with A in registers: WARPGROUP.ARRIVE stands behind the instructions that write A.

PTX wants a wgmma.fence behind such writes, and LLVM, which knows nothing of it, moves arithmetic past the fence that
Triton sets: with sampled attention the decisions end up between fence and product. ptxas puts the machine's
WARPGROUP.ARRIVE where the registers are complete. The simulator runs PTX and lets these registers pass; here the code
that a GPU would run is read.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from m3kernels import compiled_tables, machine_code
from m3kernels.compiled_tables import Entry

ROOT = Path(__file__).parents[2]
KERNELS = ("forward", "backward_kv")
ENTRIES = [
    entry
    for entry in compiled_tables.entries(("attention",), (90,))
    if entry.kernel in KERNELS and entry.dtype == "bf16" and entry.width in (32, 64)
]
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s+(.*?)\s*;", re.M)
_PRODUCT = re.compile(r"R\d+, R(\d+), gdesc")


def late_writes(code: str) -> tuple[int, list[str]]:
    """How many products have A in registers, and instructions that write one between WARPGROUP.ARRIVE and product."""
    products, late = 0, []
    since: list[tuple[int, str]] = []
    for name, operands in _INSTRUCTION.findall(code):
        if name.startswith("WARPGROUP.ARRIVE"):
            since = []
        elif name.startswith("HGMMA"):
            if first := _PRODUCT.match(operands):
                products += 1
                fragment = range(int(first[1]), int(first[1]) + 4)
                late += [text for register, text in since if register in fragment]
        elif (written := re.match(r"R(\d+)\b", operands)) and not name.startswith(("ST", "RED", "ATOM")):
            words = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
            since += [(int(written[1]) + word, f"{name} {operands}") for word in range(words)]
    return products, late


def machine_code_of(entry: Entry) -> str:
    with compiled_tables.triton_cache(ROOT / ".cache" / "triton"):
        compiled = compiled_tables.compile_entry(entry)
    return machine_code.disassembly(compiled.asm["cubin"])


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_operands_in_registers_are_complete_when_the_warpgroup_arrives(entry: Entry) -> None:
    products, late = late_writes(machine_code_of(entry))
    assert products > 0, "no product has A in registers"
    assert not late, late


def test_a_write_behind_the_arrival_is_found() -> None:
    lines = [line for line in machine_code_of(ENTRIES[0]).splitlines() if _INSTRUCTION.match(line)]
    product = next(n for n, line in enumerate(lines) if "HGMMA" in line and _PRODUCT.search(line))
    arrival = max(n for n, line in enumerate(lines[:product]) if "WARPGROUP.ARRIVE" in line)
    register = _PRODUCT.search(lines[product])[1]  # type: ignore[index]
    write = max(n for n, line in enumerate(lines[:arrival]) if re.search(rf"[A-Z0-9_.]+ R{register},", line))
    moved = [*lines[:write], lines[arrival], *lines[write:arrival], *lines[arrival + 1 :]]
    assert late_writes("\n".join(moved))[1]
