"""The error bounds that docs/gpu_numerics.md states hold, under the corrected interpreter."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from benchmarks import gpu_numerics


@pytest.mark.parametrize("arithmetic", gpu_numerics.ARITHMETICS)
def test_errors_stay_within_their_documented_bounds(arithmetic: str) -> None:
    length = 130
    errors = gpu_numerics.attention_errors(arithmetic, length, nullcontext())
    errors |= gpu_numerics.maxsim_errors(arithmetic, length, nullcontext())
    for result, error in errors.items():
        assert error <= gpu_numerics.bound(result, arithmetic, length), (result, error)


def test_each_arithmetic_shows_its_own_precision() -> None:
    """An interpreter that multiplied tf32 or bfloat16 exactly would pass every bound."""
    out = {a: gpu_numerics.attention_errors(a, 64, nullcontext())["out"] for a in gpu_numerics.ARITHMETICS}
    assert out["fp32"] < 1e-6 < 1e-4 < out["fp16"] < out["tf32"] < out["bf16"]
