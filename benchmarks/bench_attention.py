"""Attention and its peers, one by one: `python -m pytest benchmarks/bench_attention.py [--device cuda]`.

benchmarks/results/attention.csv comes from `python -m benchmarks.report_attention`, which interleaves them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.attention_cases import CASES, Case
from benchmarks.conftest import waited_for
from benchmarks.peers.attention import PEERS, call_of, peers_of


@pytest.mark.parametrize("peer", list(PEERS))
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_attention(benchmark: Any, device: str, case: Case, peer: str) -> None:
    if not case.available:
        pytest.skip("no ../shared/data and no M3_DATA: real lengths are not measured")
    if peer not in peers_of(case):
        pytest.skip("unmasked attention serves equal lengths only; options are measured at one batch")
    call = waited_for(call_of(peer, replace(case, device=device)), device)
    benchmark.extra_info["gflop"] = case.flops / 1e9
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
