"""Attention on the CPU at its limits: the longest sequences, peak memory, and numbers that are not finite."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3kernels import _library, flash_attention_varlen, offsets_from_lengths
from m3kernels.attention import reference

pytestmark = pytest.mark.skipif(
    _library.cpu_kernel("flash_attention_forward") is None, reason="the compiled CPU kernels are missing"
)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_training_at_length_8192_needs_less_than_twice_the_memory_of_its_tensors() -> None:
    """Beyond q, k and v, so out and the three gradients are counted; the scores alone would take 4 GiB."""
    program = """
import torch
from m3kernels import flash_attention_varlen
def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
q, k, v, grad = (torch.randn(8192, 16, 64) for _ in range(4))
leaves = [x.requires_grad_() for x in (q, k, v)]
def step(length):
    offsets = torch.tensor([0, length], dtype=torch.int32)
    out = flash_attention_varlen(*(x[:length] for x in leaves), offsets)
    return out, torch.autograd.grad(out, leaves, grad[:length])
step(64)
open("/proc/self/clear_refs", "w").write("5")  # the peak becomes the present size
before = resident("VmRSS")
step(8192)
print(resident("VmHWM") - before)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    extra, tensors = int(result.stdout), 4 * (8192 * 16 * 64 * 4)
    assert tensors / 4 < extra < 2 * tensors, f"{extra / tensors:.2f} times q, k, v and out"


def test_length_32768() -> None:
    """Its scores would take 4 GiB a head. Gradients of a loss of five rows are those of the five rows alone."""
    length, width = 32_768, 32
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(length, 1, width, generator=generator).requires_grad_() for _ in range(3))
    chosen = torch.tensor([0, 1, 12_345, 20_000, length - 1])
    grad = torch.zeros(length, 1, width)
    grad[chosen] = torch.randn(5, 1, width, generator=generator)
    out = flash_attention_varlen(q, k, v, torch.tensor([0, length], dtype=torch.int32))
    grads = torch.autograd.grad(out, (q, k, v), grad)

    exact = [x.detach().double()[:, 0] for x in (q, k, v)]
    some_q = exact[0][chosen].requires_grad_()
    all_k, all_v = (x.requires_grad_() for x in exact[1:])
    some_out = torch.softmax(width**-0.5 * some_q @ all_k.T, dim=1) @ all_v
    expected = torch.autograd.grad(some_out, (some_q, all_k, all_v), grad[chosen, 0].double())
    actual = [out[chosen, 0], grads[0][chosen, 0], grads[1][:, 0], grads[2][:, 0]]
    errors = [
        float((a - e).detach().abs().max() / e.detach().abs().max()) for a, e in zip(actual, (some_out, *expected))
    ]
    assert max(errors) <= 2e-6 * math.sqrt(length), errors
    others = torch.ones(length, dtype=torch.bool)
    others[chosen] = False
    assert not grads[0][others].any()


SPOILT = {
    "NaN in q": (0, math.nan),
    "NaN in k": (1, math.nan),
    "NaN in v": (2, math.nan),
    "+inf in q": (0, math.inf),
    "-inf in q": (0, -math.inf),
    "+inf in k": (1, math.inf),
    "-inf in k": (1, -math.inf),
    "+inf in v": (2, math.inf),
    "-inf in v": (2, -math.inf),
}


def spoilt_rows(case: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(565, 2, 32, generator=generator) for _ in range(3)]
    which, value = SPOILT[case]
    rows[which][20, 1, 3] = value
    return rows


@pytest.mark.parametrize("case", SPOILT)
def test_a_number_that_is_not_finite_acts_as_in_the_reference_and_stays_in_its_sequence_and_head(
    case: str, instruction_set: str
) -> None:
    offsets = offsets_from_lengths(torch.tensor([5, 560]))
    spoilt, clean = ([x.requires_grad_() for x in spoilt_rows(case)] for _ in range(2))
    with torch.no_grad():
        for x in clean:
            x.nan_to_num_(1.0, 1.0, 1.0)
    expected, _ = reference.flash_attention_varlen(*spoilt, offsets, 32**-0.5)
    outs = [flash_attention_varlen(*leaves, offsets) for leaves in (spoilt, clean)]
    torch.testing.assert_close(outs[0], expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert not outs[0].isfinite().all()
    grads = [torch.autograd.grad(out, leaves, torch.ones_like(out)) for out, leaves in zip(outs, (spoilt, clean))]
    for one, other in [(outs[0], outs[1]), *zip(*grads)]:
        torch.testing.assert_close(one[:5], other[:5], rtol=0, atol=0)
        torch.testing.assert_close(one[:, 0], other[:, 0], rtol=0, atol=0)


def test_keys_with_a_score_of_minus_infinity_count_as_absent_and_rows_with_no_other_give_0(
    instruction_set: str,
) -> None:
    rows = [torch.randn(60, 2, 32, generator=torch.Generator().manual_seed(2)) for _ in range(3)]
    rows[0].abs_()
    rows[1][30:50, 1, 7] = -math.inf
    out = flash_attention_varlen(*rows, offsets_from_lengths(torch.tensor([30, 20, 10])))
    assert not out[30:50, 1].any()
    together = flash_attention_varlen(*rows, offsets_from_lengths(torch.tensor([60])))
    present = torch.cat([torch.arange(30), torch.arange(50, 60)])
    without = flash_attention_varlen(*(x[present] for x in rows), offsets_from_lengths(torch.tensor([40])))
    torch.testing.assert_close(together[present, 1], without[:, 1], rtol=1e-5, atol=1e-6)
