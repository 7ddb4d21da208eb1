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


def forward_error(change: Callable[[str], str] | None, architecture: int = ARCHITECTURE) -> float:
    q, k, v = (random(sum(LENGTHS), 1, WIDTH, dtype=torch.bfloat16, seed=i) for i in range(3))
    offsets, scale = offsets_of(LENGTHS), WIDTH**-0.5
    options = attention.Options(scale, None, 0.0, 0, False)
    with simulated_triton(change=change, architecture=architecture):
        out, _ = attention.forward(q, k, v, offsets, options, _tiles.for_architecture("attention", architecture))
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


def swizzled_otherwise(ptx: str) -> str:
    """64-byte swizzles of matrix descriptors, whose two top bits are 2, made 32-byte ones."""
    changed = re.sub(
        r"(or|add)(\.[bs]64\s+%rd\d+, %rd\d+, )(-9223\d+);", lambda f: f"{f[1]}{f[2]}{int(f[3]) + 2**62};", ptx
    )
    assert changed != ptx
    return changed


HOPPER_BREAKS = {
    "no barriers": BREAKS["no barriers"],
    "copies waited for one group late": BREAKS["copies waited for one group late"],
    "products not waited for": replaced(r"^\s*wgmma\.wait_group\S*\s.*$", ""),
    "products waited for one group late": replaced(r"(wgmma\.wait_group\S*\s+)0", r"\g<1>1"),
    "products never committed": replaced(r"^\s*wgmma\.commit_group.*$", ""),
    "registers not fenced": replaced(r"^\s*wgmma\.fence.*$", ""),
    "stores not made visible to the async proxy": replaced(r"^\s*fence\.proxy\.async.*$", ""),
    "another swizzle": swizzled_otherwise,
    "B not transposed": replaced(r"(wgmma\.mma_async\S*m64n32k16.*, 1, 1), 1;", r"\1, 0;"),
    "sums of the chain forgotten": replaced(r"(wgmma\.mma_async.*), %p\d+, 1, 1", r"\1, 0, 1, 1"),
}


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_code_as_it_was_compiled_is_right(architecture: int) -> None:
    assert forward_error(None, architecture) <= attention_bound("bf16", max(LENGTHS))


@pytest.mark.parametrize(
    ("architecture", "name"), [*((80, name) for name in BREAKS), *((90, name) for name in HOPPER_BREAKS)]
)
def test_broken_code_is_noticed(architecture: int, name: str) -> None:
    try:
        error = forward_error((BREAKS if architecture == 80 else HOPPER_BREAKS)[name], architecture)
    except Fault:
        return
    assert not error <= attention_bound("bf16", max(LENGTHS)), error
