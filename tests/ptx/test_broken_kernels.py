"""Compiled attention, broken on purpose in its PTX: each change must end in a Fault or a wrong result.

So the comparisons of test_compiled_kernels can fail, for faults that a compiler or a hand-written kernel could have.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from m3kernels import _tiles
from m3kernels.attention import reference
from m3kernels.attention import triton_kernels as attention
from tests.ptx.cases import attention_bound, offsets_of, random
from tests.ptx.simulator import Fault
from tests.ptx.triton_launches import ARCHITECTURE, simulated_triton

LENGTHS, WIDTH = (150, 40), 32


def forward_error(change: Callable[[str], str] | None) -> float:
    q, k, v = (random(sum(LENGTHS), 1, WIDTH, dtype=torch.bfloat16, seed=i) for i in range(3))
    offsets, scale = offsets_of(LENGTHS), WIDTH**-0.5
    options = attention.Options(scale, None, 0.0, 0, False)
    with simulated_triton(change=change):
        out, _ = attention.forward(q, k, v, offsets, options, _tiles.for_architecture("attention", ARCHITECTURE))
    expected, _ = reference.flash_attention_varlen(q.double(), k.double(), v.double(), offsets, scale)
    return float((out.double() - expected).norm() / expected.norm())


def replaced(pattern: str, by: str, count: int = 0) -> Callable[[str], str]:
    """A change that must find something to change."""

    def change(ptx: str) -> str:
        changed, places = re.subn(pattern, by, ptx, count=count, flags=re.MULTILINE)
        assert places, f"the compiled code has no {pattern}"
        return changed

    return change


BREAKS = {
    "no barriers": replaced(r"^\s*bar\.sync\s.*$", ""),
    "copies waited for one group late": lambda ptx: re.sub(
        r"cp\.async\.wait_group\s+(\d+)", lambda found: f"cp.async.wait_group {int(found[1]) + 3}", ptx
    ),
    "a matrix not transposed": replaced(r"\.trans\.shared", ".shared"),
    "operands of products swapped": replaced(r"(mma\.sync\S+\s+\{[^}]*\}, \{) (%r\d+), (%r\d+),", r"\1 \3, \2,"),
    "sums of other lanes left out": replaced(r"shfl\.sync\.bfly\.b32(\s+\S+\s+\S+) 2,", r"shfl.sync.bfly.b32\1 0,"),
    "maximum ignored": replaced(r"max\.f32", "min.f32"),
    "another head": replaced(r"mov\.u32(\s+%r\d+), %ctaid\.y", r"mov.u32\1, 1"),
}


def test_the_code_as_it_was_compiled_is_right() -> None:
    assert forward_error(None) <= attention_bound("bf16", max(LENGTHS))


@pytest.mark.parametrize("name", list(BREAKS))
def test_broken_code_is_noticed(name: str) -> None:
    try:
        error = forward_error(BREAKS[name])
    except Fault:
        return
    assert not error <= attention_bound("bf16", max(LENGTHS)), error
