"""Published weights of dense, sparse and multi-vector scores, and how the paper searches.

    preset     dense+sparse      all                  source
    miracl     1, 0.3            1, 0.3, 1            M3 paper v4 (arXiv 2402.03216), section 4.1
    mkqa       1, 0.3            1, 0.3, 1            M3 paper v4, section 4.2
    mldr       0.2, 0.8          0.15, 0.5, 0.35      M3 paper v4, section 4.3; NarrativeQA is searched with these too
    beir       1, 1              1, 1, 1              FlagEmbedding's default (compute_score); no published weights

Candidates: dense and sparse each give their best 1000; dense+sparse unites them, a passage absent from one list has
score 0 there (research/C_MTEB/MLDR of FlagEmbedding); multi-vector and the sum of all rerank the best 200 dense ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from m3model.retrieval.interface import CANDIDATES, RERANK

__all__ = ["PRESETS", "HybridWeights", "preset"]


@dataclass(frozen=True)
class HybridWeights:
    """Weights (dense, sparse) and (dense, sparse, multi-vector) with their source, and the depths of the search."""

    dense_sparse: tuple[float, float]
    all: tuple[float, float, float]
    source: str
    candidates: int = CANDIDATES
    reranked: int = RERANK


PRESETS: dict[str, HybridWeights] = {
    "miracl": HybridWeights((1.0, 0.3), (1.0, 0.3, 1.0), "M3 paper v4 (arXiv 2402.03216), section 4.1"),
    "mkqa": HybridWeights((1.0, 0.3), (1.0, 0.3, 1.0), "M3 paper v4 (arXiv 2402.03216), section 4.2"),
    "mldr": HybridWeights((0.2, 0.8), (0.15, 0.5, 0.35), "M3 paper v4 (arXiv 2402.03216), section 4.3"),
    "beir": HybridWeights((1.0, 1.0), (1.0, 1.0, 1.0), "default of FlagEmbedding's compute_score"),
}


def preset(name: str) -> HybridWeights:
    """The weights published under this name.

    Raises:
        ValueError: there are none.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; accepted: {', '.join(PRESETS)}")
    return PRESETS[name]
