"""The demo's hybrid: dense and multi-vector with weight 1, the sparse head with the weight that ranks best.

It is chosen on development pairs, which are neither searched nor trained on: the weight of SPARSE_WEIGHTS with the
highest MRR of each pair's body among all of them, of equally good ones the smallest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from m3model.demo.docstrings import Pair
from m3model.model import M3Model
from m3model.scoring import DEFAULT_WEIGHTS, HEADS, head_scores

__all__ = ["LEAST_PAIRS", "SPARSE_WEIGHTS", "Weights", "chosen_weights", "reciprocal_ranks"]

SPARSE_WEIGHTS = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
LEAST_PAIRS = 20
"""With fewer pairs the published weights are taken."""

Weights = tuple[float, float, float]


def chosen_weights(model: M3Model, pairs: Sequence[Pair]) -> Weights:
    """Weights of dense, sparse and multi-vector for `model`."""
    if len(pairs) < LEAST_PAIRS:
        return DEFAULT_WEIGHTS
    bodies = model.encode([pair.body for pair in pairs])
    queries = model.encode([pair.summary for pair in pairs], role="query")
    dense, sparse, multi_vector = (head_scores(head, queries, bodies) for head in HEADS)
    found = {w: float(reciprocal_ranks(dense + w * sparse + multi_vector).mean()) for w in SPARSE_WEIGHTS}
    return 1.0, max(SPARSE_WEIGHTS, key=lambda weight: found[weight]), 1.0


def reciprocal_ranks(scores: torch.Tensor) -> np.ndarray:
    """1 / place of column i in row i of `scores` [N, N], 0 beyond the tenth place; float64 [N]."""
    places = 1 + (scores > scores.diagonal()[:, None]).sum(1).double()
    return torch.where(places <= 10, 1 / places, 0.0).cpu().numpy()
