"""The comparison with public kernels compiles what their packages would launch, every configuration of a tuner."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from benchmarks.gpu_side_by_side import compiled_launches
from m3kernels.compiled_tables import triton_cache
from tests.ptx.triton_launches import ROOT


@triton.autotune([triton.Config({"BLOCK": block}, num_warps=4) for block in (128, 256)], key=["count"])
@triton.jit
def tuned_kernel(x_ptr, count, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + rows, tl.load(x_ptr + rows, mask=rows < count) * 2, mask=rows < count)


def test_every_configuration_of_a_tuner_is_compiled() -> None:
    with warnings.catch_warnings(), triton_cache(ROOT / ".cache" / "triton"):
        warnings.simplefilter("error")
        with compiled_launches(90) as found:
            tuned_kernel[(4,)](torch.zeros(1000), 1000)
    instructions = {facts.instructions for facts in found["tuned_kernel"]}
    assert len(instructions) == 2, found
