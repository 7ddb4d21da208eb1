"""The demo's report over seeds: errors of pooled differences, and that the committed file says what its places say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.report_demo import TABLE, differences, reciprocal_ranks
from m3model.demo.fine_tuning import HYBRID_WEIGHTS, UNTRAINED_WEIGHTS
from m3model.demo.measuring import MEASURED_HEADS, reciprocal
from m3model.scoring import HEADS


def test_pooled_error_grows_with_the_spread_of_the_seeds() -> None:
    gains = np.array([[1.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]])
    found = differences(gains, [7, 8])
    assert found["7"] == [0.5, pytest.approx(np.std([1, 0, 0.5, 0.5], ddof=1) / 2, abs=1e-4)]
    assert found["8"] == [0, 0]
    queries, seeds = np.var([0.5, 0, 0.25, 0.25], ddof=1) / 4, np.var([0.5, 0], ddof=1) / 2
    assert found["pooled"] == [0.25, pytest.approx(np.sqrt(queries + seeds), abs=1e-4)]
    assert differences(gains[:1], [7])["pooled"] == found["7"]


def test_a_body_stands_behind_all_that_score_as_much() -> None:
    scores = torch.zeros(12, 12) + torch.arange(12.0)
    scores[11] = 5.0
    expected = [0.0, 0.0, *(1 / place for place in range(10, 1, -1)), 0.0]
    assert reciprocal_ranks(scores).tolist() == pytest.approx(expected)


@pytest.mark.skipif(not TABLE.exists(), reason="no figures of several seeds are committed")
def test_the_committed_figures_are_those_of_the_committed_places_and_weights() -> None:
    stored = json.loads(TABLE.read_text())
    held_out, development = stored["held out"], stored["development"]
    seeds = list(held_out["places_after"])
    assert len(seeds) >= 3 and development["seeds"] == [int(seed) for seed in seeds]
    assert development["after"]["best"] == held_out["weights"]["after"] == list(HYBRID_WEIGHTS)
    assert development["before"]["best"] == held_out["weights"]["before"] == list(UNTRAINED_WEIGHTS)
    ranks = {
        head: np.stack([reciprocal(held_out["places_after"][seed][head]) for seed in seeds]) for head in MEASURED_HEADS
    }
    assert ranks["all"].shape == (len(seeds), held_out["pairs"]["held out"])
    for head in HEADS:
        assert held_out["lead"][head] == differences(ranks["all"] - ranks[head], [int(seed) for seed in seeds])
    for head in MEASURED_HEADS:
        before = reciprocal(held_out["places_before"][head])
        assert held_out["gain"][head] == differences(ranks[head] - before, [int(seed) for seed in seeds])
