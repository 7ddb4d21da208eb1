"""The demo's report over seeds: errors of pooled differences, and that the committed file says what its places say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.report_demo import (
    CHOSEN_BY,
    DENSE,
    SPARSE,
    TABLE,
    TOLERANCE,
    chosen,
    comparisons,
    differences,
    places_of,
)
from m3model.demo.fine_tuning import HYBRID_WEIGHTS, UNTRAINED_WEIGHTS
from m3model.demo.measuring import MEASURES


def test_pooled_error_grows_with_the_spread_of_the_seeds() -> None:
    gains = np.array([[1.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]])
    found = differences(gains, ["7", "8"])
    assert found["7"] == [0.5, pytest.approx(np.std([1, 0, 0.5, 0.5], ddof=1) / 2, abs=1e-4)]
    assert found["8"] == [0, 0]
    queries, seeds = np.var([0.5, 0, 0.25, 0.25], ddof=1) / 4, np.var([0.5, 0], ddof=1) / 2
    assert found["pooled"] == [0.25, pytest.approx(np.sqrt(queries + seeds), abs=1e-4)]
    assert differences(gains[:1], ["7"])["pooled"] == found["7"]


def test_a_body_stands_behind_all_that_score_as_much() -> None:
    scores = torch.zeros(12, 12) + torch.arange(12.0)
    scores[11] = 5.0
    assert places_of(scores).tolist() == [0, 0, *range(10, 1, -1), 0]


def test_of_mixes_that_are_as_good_the_one_nearest_to_multi_vector_is_chosen() -> None:
    hybrids = {f"{dense:g}:{sparse:g}:1": [0.5, 0.7] for dense in DENSE for sparse in SPARSE}
    hybrids["1.5:1:1"] = [0.8, 0.8]
    hybrids["0.7:0.5:1"] = [0.8 - TOLERANCE / 2, 0.8]
    hybrids["0.7:0.3:1"] = [0.8, 0.8 - 3 * TOLERANCE]
    assert chosen(hybrids) == (0.7, 0.5, 1.0)


@pytest.mark.skipif(not TABLE.exists(), reason="no figures of several seeds are committed")
def test_the_committed_figures_are_those_of_the_committed_places_and_weights() -> None:
    stored = json.loads(TABLE.read_text())
    held_out, development = stored["held out"], stored["development"]
    seeds = list(held_out["places_after"])
    assert len(seeds) >= 3 and development["seeds"] == [int(seed) for seed in seeds]
    for moment, weights in (("before", UNTRAINED_WEIGHTS), ("after", HYBRID_WEIGHTS)):
        assert development[moment]["best"] == held_out["weights"][moment] == list(weights)
        assert chosen(development[moment][CHOSEN_BY]) == weights
    assert {len(places) for of in held_out["places_after"].values() for places in of.values()} == {
        held_out["pairs"]["held out"]
    }
    found = comparisons(held_out["places_before"], held_out["places_after"])
    assert set(found) == set(MEASURES) and found == {name: held_out[name] for name in MEASURES}
