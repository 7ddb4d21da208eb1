"""Late interaction and its peers, one by one: `python -m pytest benchmarks/bench_maxsim.py [--device cuda]`.

benchmarks/results/maxsim.csv comes from `python -m benchmarks.report_maxsim`, which interleaves them in processes of
their own.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.conftest import Timer
from benchmarks.maxsim_cases import CASES
from benchmarks.peers.maxsim import ON_ANY_DEVICE, PEERS, call_of

# Crashes at width 1024 with version 0.1.0, and would take this process along.
RISKY = "maxsim-cpu"


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer != RISKY])
@pytest.mark.parametrize("case", list(CASES))
def test_maxsim(timer: Timer, device: str, case: str, peer: str) -> None:
    shape = replace(CASES[case], device=device)
    if device != "cpu" and peer not in ON_ANY_DEVICE:
        pytest.skip(f"{peer} runs on the CPU")
    if shape.training and peer in ("m3kernels 8 bits", "m3kernels 1 bit", "numkong"):
        pytest.skip(f"{peer} has no gradients")
    try:
        with torch.set_grad_enabled(shape.training):
            timer(call_of(peer, shape))
    except ImportError as error:
        pytest.skip(f"{peer} is not installed: {error}")
