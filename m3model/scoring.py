"""Scores of M3 (paper section 3.2, arXiv 2402.03216) and their weighted sums.

    dense         q · p
    sparse        Σ over shared ids of q's weight · p's weight
    multi_vector  mean over q's rows of the maximum over p's rows of q_i · p_j
    dense+sparse  (w1·dense + w2·sparse) / (w1 + w2)
    all           (w1·dense + w2·sparse + w3·multi_vector) / (w1 + w2 + w3)

Dividing by the sum of the weights is what FlagEmbedding does; it changes no ranking.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from m3kernels import maxsim, maxsim_pairs, sparse_scores
from m3model.embeddings import M3Embeddings

__all__ = ["DEFAULT_WEIGHTS", "HEADS", "SCORE_NAMES", "check_weights", "combine", "head_scores", "score_embeddings"]

DEFAULT_WEIGHTS = (1.0, 0.3, 1.0)
"""Weights of dense, sparse and multi-vector in the sum, as in the paper (section 4.1, MIRACL and MKQA)."""

HEADS = ("dense", "sparse", "multi_vector")

SCORE_NAMES = (*HEADS, "dense+sparse", "all")


def score_embeddings(
    queries: M3Embeddings[Any],
    passages: M3Embeddings[Any],
    *,
    weights: Sequence[float] = DEFAULT_WEIGHTS,
    pairs: Tensor | None = None,
    zero_floor: bool | Tensor = False,
) -> dict[str, Tensor]:
    """The five scores of every query with every passage, or of the listed pairs.

    Args:
        queries, passages: embeddings with all three representations.
        weights: of dense, sparse and multi-vector.
        pairs: int32 [P, 2] of (query, passage) numbers.
        zero_floor: as in m3kernels.maxsim: let a zero vector take part in the maximum, as padding does elsewhere.

    Returns:
        Under each of SCORE_NAMES a float32 tensor [Nq, Np], or [P] with pairs; differentiable if the embeddings are.

    Raises:
        ValueError: a representation is missing, or the weights are not as `combine` wants them.
    """
    check_weights(weights)
    for name, embeddings in (("queries", queries), ("passages", passages)):
        absent = [head for head in HEADS if getattr(embeddings, head) is None]
        if absent:
            raise ValueError(f"{name} have no {', '.join(absent)}; all three representations are needed")
    if pairs is None:
        scores = {head: head_scores(head, queries, passages, zero_floor=zero_floor) for head in HEADS}
    else:
        _check_pairs(pairs, len(queries), len(passages))
        left, right = pairs[:, 0].long(), pairs[:, 1].long()
        rows, passage_rows = queries.multi_vector, passages.multi_vector
        assert rows is not None and passage_rows is not None
        scores = {
            "dense": (torch.as_tensor(queries.dense)[left] * torch.as_tensor(passages.dense)[right]).sum(1),
            "sparse": _sparse_pairs(queries, passages, left, right),
            "multi_vector": maxsim_pairs(
                rows.rows, passage_rows.rows, rows.offsets, passage_rows.offsets, pairs, zero_floor=zero_floor
            ),
        }
    return combine({name: score.float() for name, score in scores.items()}, weights)


def head_scores(
    head: str, queries: M3Embeddings[Any], passages: M3Embeddings[Any], *, zero_floor: bool | Tensor = False
) -> Tensor:
    """[Nq, Np], the scores of one of HEADS, of embeddings that have its representation."""
    if head == "dense":
        return torch.as_tensor(queries.dense) @ torch.as_tensor(passages.dense).T
    if head == "sparse":
        assert queries.sparse is not None and passages.sparse is not None
        return sparse_scores(queries.sparse, passages.sparse)
    left, right = queries.multi_vector, passages.multi_vector
    assert left is not None and right is not None
    return maxsim(left.rows, right.rows, left.offsets, right.offsets, zero_floor=zero_floor)


def combine(scores: Mapping[str, Tensor], weights: Sequence[float] = DEFAULT_WEIGHTS) -> dict[str, Tensor]:
    """`scores` (dense, sparse and multi_vector, of equal shapes) together with the two weighted means of them.

    Raises:
        ValueError: weights are not three finite numbers of at least 0, the first two not both 0.
    """
    check_weights(weights)
    dense, sparse, multi_vector = weights
    pair = dense * scores["dense"] + sparse * scores["sparse"]
    total = pair + multi_vector * scores["multi_vector"]
    return {**scores, "dense+sparse": pair / (dense + sparse), "all": total / (dense + sparse + multi_vector)}


def check_weights(weights: Sequence[float]) -> None:
    """Raise ValueError unless weights are three finite numbers of at least 0, the first two not both 0."""
    values = tuple(weights)
    if len(values) != 3 or not all(math.isfinite(value) and value >= 0 for value in values) or not sum(values[:2]):
        raise ValueError(
            f"weights are {values}; accepted: three numbers of at least 0 for dense, sparse and multi-vector,"
            " the first two not both 0"
        )


def _check_pairs(pairs: Tensor, queries: int, passages: int) -> None:
    if pairs.dtype != torch.int32 or pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must be int32 [P, 2], got {pairs.dtype} {tuple(pairs.shape)}")
    if pairs.device.type != "cpu" or pairs.numel() == 0:
        return
    low, high = pairs.min(0).values.tolist(), pairs.max(0).values.tolist()
    if min(low) < 0 or high[0] >= queries or high[1] >= passages:
        raise ValueError(
            f"pairs run from {low} to {high}; accepted: queries 0 to {queries - 1}, passages 0 to {passages - 1}"
        )


def _sparse_pairs(queries: M3Embeddings[Any], passages: M3Embeddings[Any], left: Tensor, right: Tensor) -> Tensor:
    """Sparse scores of pairs: entries of each pair's two texts are joined on (pair, id) by one sort-merge."""
    keys, weights = [], []
    for embeddings, chosen in ((queries, left), (passages, right)):
        side = M3Embeddings[Any](sparse=embeddings.sparse).select(chosen.tolist()).sparse
        assert side is not None
        pair = torch.repeat_interleave(torch.arange(len(chosen), device=chosen.device), side.offsets.diff().long())
        keys.append(pair * 2**32 + side.token_ids.long())
        weights.append(side.weights.float())
    at = torch.searchsorted(keys[1], keys[0]).clamp_max(max(len(keys[1]) - 1, 0))
    if not len(keys[0]) or not len(keys[1]):
        return left.new_zeros(len(left), dtype=torch.float32)
    shared = keys[1][at] == keys[0]
    products = torch.where(shared, weights[0] * weights[1][at], 0.0)
    return products.new_zeros(len(left)).index_add(0, keys[0] // 2**32, products)
