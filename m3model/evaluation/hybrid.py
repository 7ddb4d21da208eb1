"""Hybrid runs out of the runs of single heads, as the M3 paper makes them.

unite    Σ of weight · score over the runs; a passage that a run does not list has score 0 in it
"""

from __future__ import annotations

from collections.abc import Sequence

from m3model.evaluation.tasks import Run
from m3model.evaluation.trec import ranked

__all__ = ["unite"]


def unite(runs: Sequence[Run], weights: Sequence[float], depth: int) -> Run:
    """The best `depth` passages of the weighted sum, for every query of the first run.

    Args:
        runs: of the heads, over the same queries.
        weights: one for each run, of at least 0.
        depth: passages kept for each query, at least 1.

    Raises:
        ValueError: numbers of runs and weights differ, a weight is negative, the queries differ, or depth is below 1.
    """
    if len(runs) != len(weights) or not runs or min(weights) < 0 or depth < 1:
        raise ValueError(
            f"{len(runs)} runs, weights {tuple(weights)}, depth {depth};"
            " accepted: one weight of at least 0 for each run, depth from 1"
        )
    if any(run.keys() != runs[0].keys() for run in runs):
        raise ValueError("the runs answer different queries; accepted: the same queries in each")
    united: Run = {}
    for query in runs[0]:
        sums: dict[str, float] = {}
        for run, weight in zip(runs, weights):
            for passage, score in run[query].items():
                sums[passage] = sums.get(passage, 0.0) + weight * score
        united[query] = ranked(sums, depth)
    return united
