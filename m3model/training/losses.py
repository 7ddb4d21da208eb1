"""The training loss of M3 (arXiv 2402.03216 v4, section 3.3), for B queries of G passages each, P passages in all.

    s_*      = score / τ                                      [B, P], for each head present
    s_inter  = w1·s_dense + w2·s_lex + w3·s_mul               (w = 1, 0.3, 1)
    L_*      = -log softmax(s_*)[positive], mean over queries
    L        = (λ1·L_dense + λ2·L_lex + λ3·L_mul + L_inter) / 4          (λ = 1, 0.1, 1)
    L'_*     = -softmax(s_inter, detached) · log softmax(s_*)
    L'       = (λ1·L'_dense + λ2·L'_lex + λ3·L'_mul) / 3
    L_final  = (L + L') / 2, or L without self-distillation

With two heads the divisors are 3 and 2. With one head the hybrid would be that head again, so the loss is L_* alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from m3kernels import maxsim, maxsim_pairs, sparse_scores
from m3model.embeddings import M3Embeddings
from m3model.scoring import HEADS

__all__ = ["M3Loss", "m3_loss"]


class M3Loss(NamedTuple):
    """Scalars: `total` is to be minimised; the others are its parts before λ, None where they do not take part."""

    total: Tensor
    dense: Tensor | None
    sparse: Tensor | None
    multi_vector: Tensor | None
    ensemble: Tensor | None
    distill: Tensor | None


def m3_loss(
    queries: M3Embeddings[Any],
    passages: M3Embeddings[Any],
    *,
    temperature: float = 0.02,
    weights: Sequence[float] = (1.0, 0.3, 1.0),
    self_distill: bool = True,
    official: bool = False,
    loss_weights: Sequence[float] = (1.0, 0.1, 1.0),
    in_batch_negatives: bool = True,
    teacher_scores: Tensor | None = None,
    teacher_loss: Literal["kl_div", "m3_kd_loss"] = "kl_div",
    zero_floor: bool | None = None,
    group_size: int | None = None,
    first_passage: int = 0,
) -> M3Loss:
    """Loss of the heads that `queries` hold, their hybrid, and self-distillation from the detached hybrid.

    Args:
        queries: B texts as tensors, with at least one head.
        passages: P texts with the same heads; the G of each query lie together, its positive first. The first query's
            positive is passage `first_passage`.
        temperature: τ above 0, of every head and of the distillation.
        weights: w of dense, sparse and multi-vector in the hybrid.
        self_distill: add L'.
        official: compute what FlagEmbedding 1.4.2 does: the same formulas with zero_floor=True.
        loss_weights: λ of dense, sparse and multi-vector.
        in_batch_negatives: the passages of other queries count as negatives; otherwise a query's own G alone.
        teacher_scores: [B, G] of an external teacher. Its softmax is the target in place of the positive, for every
            head and for the hybrid (FlagEmbedding/abc/finetune/embedder/AbsModeling.py).
        teacher_loss: "kl_div", cross-entropy with the target over the group plus L_*; or "m3_kd_loss", Σ_i target_i ·
            cross-entropy of group member i over all passages but the group members before i.
        zero_floor: padding counts as a zero vector in MaxSim, for every passage shorter than the longest. Left out, it
            is what `official` says.
        group_size: G. Left out, P / B; to be given where passages of other ranks are among the P.
        first_passage: where the passages of these queries begin.

    Returns:
        M3Loss of scalars: float32, or float64 for float64 embeddings.

    Raises:
        TypeError: embeddings that are not tensors.
        ValueError: heads, counts, weights, temperature or teacher are not as described.
    """
    heads = _check_heads(queries, passages)
    query_weights = _check_weights("weights", weights)
    lambdas = _check_weights("loss_weights", loss_weights)
    if not math.isfinite(temperature) or temperature <= 0:
        raise ValueError(f"temperature is {temperature}; accepted: finite numbers above 0")
    if teacher_loss not in ("kl_div", "m3_kd_loss"):
        raise ValueError(f"teacher_loss is {teacher_loss!r}; accepted: 'kl_div', 'm3_kd_loss'")
    group = _check_groups(len(queries), len(passages), group_size, first_passage)
    if teacher_scores is not None and tuple(teacher_scores.shape) != (len(queries), group):
        given = tuple(teacher_scores.shape)
        raise ValueError(f"teacher_scores have shape {given}; accepted: {(len(queries), group)}, a score a passage")

    device = queries.dense.device if queries.dense is not None else _first_offsets(queries).device
    positives = first_passage + group * torch.arange(len(queries), device=device)
    members = positives[:, None] + torch.arange(group, device=device)
    floor = official if zero_floor is None else zero_floor
    scores = {
        head: _head_scores(head, queries, passages, None if in_batch_negatives else members, floor) / temperature
        for head in heads
    }
    if not in_batch_negatives:
        members = torch.arange(group, device=device).expand(len(queries), group)
        positives = torch.zeros_like(positives)

    targets = None
    if teacher_scores is not None:
        targets = teacher_scores.to(scores[heads[0]]).softmax(1).detach()

    def contrast(score: Tensor) -> Tensor:
        if targets is None:
            return functional.cross_entropy(score, positives)
        if teacher_loss == "kl_div":
            return functional.cross_entropy(score.gather(1, members), targets) + functional.cross_entropy(
                score, positives
            )
        return _listwise(score, members, targets)

    losses: dict[str, Tensor] = {head: contrast(score) for head, score in scores.items()}
    if len(heads) == 1:
        return _result(losses[heads[0]], losses, None, None)
    factor = dict(zip(HEADS, lambdas))
    hybrid_weight = dict(zip(HEADS, query_weights))
    hybrid = torch.stack([hybrid_weight[head] * score for head, score in scores.items()]).sum(0)
    ensemble = contrast(hybrid)
    total = (torch.stack([factor[head] * loss for head, loss in losses.items()]).sum() + ensemble) / (len(heads) + 1)
    if not self_distill:
        return _result(total, losses, ensemble, None)
    target = hybrid.detach().softmax(1)
    parts = [factor[head] * functional.cross_entropy(score, target) for head, score in scores.items()]
    distill = torch.stack(parts).sum() / len(heads)
    return _result((total + distill) / 2, losses, ensemble, distill)


def _head_scores(
    head: str, queries: M3Embeddings[Any], passages: M3Embeddings[Any], members: Tensor | None, floor: bool
) -> Tensor:
    """Scores of one head: [B, P], or [B, G] of `members` [B, G]."""
    if head == "multi_vector":
        left, right = queries.multi_vector, passages.multi_vector
        assert left is not None and right is not None
        rows = (left.rows, right.rows, left.offsets, right.offsets)
        lengths = right.offsets.diff()
        padded = lengths < lengths.max() if floor else False
        if members is None:
            return maxsim(*rows, zero_floor=padded)
        numbers = torch.arange(len(members), device=members.device)[:, None].expand_as(members)
        pairs = torch.stack([numbers, members], 2).reshape(-1, 2).int()
        return maxsim_pairs(*rows, pairs, zero_floor=padded).view_as(members)
    scores: Tensor
    if head == "dense":
        assert queries.dense is not None and passages.dense is not None
        dtype = torch.float64 if queries.dense.dtype == torch.float64 else torch.float32
        scores = queries.dense.to(dtype) @ passages.dense.to(dtype).T
    else:
        assert queries.sparse is not None and passages.sparse is not None
        scores = sparse_scores(queries.sparse, passages.sparse)
    return scores if members is None else scores.gather(1, members)


def _listwise(score: Tensor, members: Tensor, targets: Tensor) -> Tensor:
    """Σ_i mean_b target_bi · cross-entropy of group member i, members before it left out of the softmax."""
    total = score.new_zeros(())
    for place in range(members.shape[1]):
        used = torch.zeros_like(score, dtype=torch.bool).scatter(1, members[:, :place], True)
        left = score.masked_fill(used, -torch.inf)
        total = total + (targets[:, place] * functional.cross_entropy(left, members[:, place], reduction="none")).mean()
    return total


def _result(total: Tensor, losses: dict[str, Tensor], ensemble: Tensor | None, distill: Tensor | None) -> M3Loss:
    return M3Loss(total, losses.get("dense"), losses.get("sparse"), losses.get("multi_vector"), ensemble, distill)


def _first_offsets(embeddings: M3Embeddings[Any]) -> Tensor:
    part = embeddings.sparse if embeddings.sparse is not None else embeddings.multi_vector
    assert part is not None
    return part.offsets


def _check_heads(queries: M3Embeddings[Any], passages: M3Embeddings[Any]) -> list[str]:
    present = []
    for name, embeddings in (("queries", queries), ("passages", passages)):
        if not isinstance(embeddings, M3Embeddings):
            raise TypeError(f"{name} must be M3Embeddings, got {type(embeddings).__name__}")
        if embeddings.dense is not None and not isinstance(embeddings.dense, Tensor):
            raise TypeError(f"{name}.dense must be a tensor, got {type(embeddings.dense).__name__}")
        present.append([head for head in HEADS if getattr(embeddings, head) is not None])
    if not present[0] or present[0] != present[1]:
        raise ValueError(
            f"queries have the heads {present[0]}, passages {present[1]}; accepted: the same, at least one"
        )
    return present[0]


def _check_weights(name: str, values: Sequence[float]) -> tuple[float, ...]:
    numbers = tuple(values)
    if len(numbers) != 3 or not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise ValueError(f"{name} are {numbers}; accepted: three finite numbers of at least 0")
    return numbers


def _check_groups(queries: int, passages: int, group_size: int | None, first_passage: int) -> int:
    if not queries:
        raise ValueError("queries are empty; accepted: at least one")
    if group_size is None:
        if passages % queries or not passages or first_passage:
            raise ValueError(
                f"there are {passages} passages for {queries} queries from passage {first_passage} on; accepted without"
                " group_size: a multiple of the queries, from passage 0 on"
            )
        return passages // queries
    if group_size < 1 or first_passage < 0 or first_passage + queries * group_size > passages:
        raise ValueError(
            f"group_size {group_size} for {queries} queries from passage {first_passage} on does not fit"
            f" {passages} passages"
        )
    return group_size
