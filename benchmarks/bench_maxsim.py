"""Late interaction and its peers, one by one: `python -m pytest benchmarks/bench_maxsim.py`.

benchmarks/results/maxsim.csv comes from `python -m benchmarks.report_maxsim`, which interleaves them in processes of
their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.maxsim_cases import CASES
from benchmarks.peers.maxsim import PEERS, call_of

# Crashes at width 1024 with version 0.1.0, and would take this process along.
RISKY = "maxsim-cpu"


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer != RISKY])
@pytest.mark.parametrize("case", list(CASES))
def test_maxsim(benchmark: Callable[..., Any], case: str, peer: str) -> None:
    shape = CASES[case]
    if shape.training and peer in ("m3kernels 8 bits", "m3kernels 1 bit", "numkong"):
        pytest.skip(f"{peer} has no gradients")
    try:
        with torch.set_grad_enabled(shape.training):
            benchmark(call_of(peer, shape))
    except ImportError as error:
        pytest.skip(f"{peer} is not installed: {error}")
