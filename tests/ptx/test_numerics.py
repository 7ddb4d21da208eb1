"""Numbers at the edges, through the compiled code: overflow, subnormals, infinities, NaN, and the documented bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import gpu_numerics
from m3kernels import _tiles
from m3kernels.attention import reference as attention_reference
from m3kernels.attention import triton_kernels as attention
from m3kernels.maxsim import reference as maxsim_reference
from m3kernels.maxsim import triton_kernels as maxsim
from tests.ptx.cases import offsets_of, random
from tests.ptx.triton_launches import ARCHITECTURE, simulated_triton

ROWS, WIDTH = 40, 32
OFFSETS = offsets_of((ROWS,))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Outputs of one head [rows, width]."""
    options = attention.Options(scale, None, 0.0, 0, False)
    with simulated_triton():
        q, k, v = (x[:, None] for x in (q, k, v))
        return attention.forward(q, k, v, OFFSETS, options, _tiles.for_architecture("attention", ARCHITECTURE))[0][:, 0]


def maxima(queries: Tensor, passages: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [1, 1] by the sum, and the winners [rows, 1]."""
    bounds = (offsets_of((len(queries),)), offsets_of((len(passages),)))
    tiles = _tiles.for_architecture("maxsim", ARCHITECTURE)
    with simulated_triton():
        return maxsim.forward(queries, passages, *bounds, None, False, True, False, tiles)


def close(actual: Tensor, expected: Tensor, bound: float) -> None:
    error = float((actual.double() - expected).norm() / expected.norm())
    assert error <= bound, error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_far_beyond_the_range_of_float16_do_not_overflow(dtype: torch.dtype) -> None:
    q, k = (200 * random(ROWS, WIDTH, dtype=torch.float32, seed=i).to(dtype) for i in range(2))
    v = random(ROWS, WIDTH, dtype=dtype, seed=2)
    scores = q.double() @ k.double().T
    assert scores.abs().max() > torch.finfo(torch.float16).max
    close(attend(q, k, v, 1.0), torch.softmax(scores, 1) @ v.double(), 2 * torch.finfo(dtype).eps)


def test_output_at_the_largest_float16_stays_finite() -> None:
    v = torch.full((ROWS, WIDTH), torch.finfo(torch.float16).max, dtype=torch.float16)
    q, k = (random(ROWS, WIDTH, dtype=torch.float16, seed=i) for i in range(2))
    out = attend(q, k, v, 1.0)
    assert out.isfinite().all()
    assert (out >= 0.999 * torch.finfo(torch.float16).max).all()


def test_weights_that_underflow_become_zero_not_nan() -> None:
    q = torch.full((ROWS, WIDTH), 100.0, dtype=torch.bfloat16)
    k = -q.clone()
    k[3] = 0
    v = random(ROWS, WIDTH, dtype=torch.bfloat16, seed=1)
    assert torch.equal(attend(q, k, v, 1.0), v[3].expand(ROWS, WIDTH))


def test_subnormal_float16_inputs_are_multiplied_exactly() -> None:
    smallest = 2.0**-24
    queries = torch.full((3, 64), 7 * smallest, dtype=torch.float16)
    passages = torch.tensor([1.0, 5.0, 3.0])[:, None].expand(3, 64).mul(smallest).half().contiguous()
    scores, winners = maxima(queries, passages)
    assert winners.flatten().tolist() == [1, 1, 1]
    assert float(scores) == 3 * 64 * 35 * smallest**2


def test_subnormal_values_pass_through_attention() -> None:
    v = (random(ROWS, WIDTH, dtype=torch.float32, seed=1) * 2.0**-16).half()
    q, k = (random(ROWS, WIDTH, dtype=torch.float16, seed=i) for i in (2, 3))
    expected = torch.softmax(q.double() @ k.double().T, 1) @ v.double()
    assert float((attend(q, k, v, 1.0).double() - expected).abs().max()) <= 2.0**-24


def test_an_infinite_score_makes_nan_in_its_row_alone() -> None:
    """∞ - ∞ has no value; torch gives NaN as well. Other rows are untouched."""
    q, k, v = (random(ROWS, WIDTH, dtype=torch.float32, seed=i) for i in range(3))
    q[5] = math.inf
    out = attend(q, k, v, 1.0)
    others = [row for row in range(ROWS) if row != 5]
    assert out[5].isnan().all()
    expected = attention_reference.flash_attention_varlen(*(x.double()[:, None] for x in (q, k, v)), OFFSETS, 1.0)[0]
    close(out[others], expected[others, 0], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_nan_makes_the_score_nan_and_infinity_wins(dtype: torch.dtype) -> None:
    queries, passages = (random(n, 64, dtype=dtype, seed=n) for n in (3, 70))
    queries[:, 0] = 1
    passages[66, 0] = math.inf
    scores, winners = maxima(queries, passages)
    assert float(scores) == math.inf and winners.flatten().tolist() == [66] * 3
    passages[68, 1] = math.nan
    scores, _ = maxima(queries, passages)
    assert scores.isnan().all()


def test_equal_similarities_go_to_the_lowest_row_in_every_arithmetic() -> None:
    passages = random(70, 64, dtype=torch.bfloat16, seed=1)
    passages[65] = passages[2] = 3 * passages[9]
    queries = passages[9:10].clone()
    scores, winners = maxima(queries, passages)
    assert winners.tolist() == [[2]]
    exact: Any = (queries.double(), passages.double(), offsets_of((1,)), offsets_of((70,)))
    close(scores, maxsim_reference.maxsim(*exact, None, False)[0], 1e-6)


def test_compiled_code_stays_within_the_documented_bounds() -> None:
    """In tf32, of which the compiled code alone shows what the hardware reads."""
    errors = gpu_numerics.attention_errors("tf32", 64, simulated_triton())
    errors |= gpu_numerics.maxsim_errors("tf32", 64, simulated_triton())
    for result, error in errors.items():
        assert 1e-5 < error <= gpu_numerics.bound(result, "tf32", 64) or result == "grad_of_queries", (result, error)
