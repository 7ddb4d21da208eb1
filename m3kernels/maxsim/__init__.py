"""Late interaction of packed multi-vectors: `maxsim` for every pair, `maxsim_pairs` for a list of pairs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from m3kernels._checks import check_offsets, check_tensor
from m3kernels.maxsim import ops as _ops  # noqa: F401  (registers the ops)

__all__ = ["maxsim", "maxsim_pairs"]

MAX_WIDTH = 1024


def maxsim(
    queries: Tensor,
    passages: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    *,
    reduce: Literal["mean", "sum"] = "mean",
    zero_floor: bool | Tensor = False,
    recompute_argmax: bool = False,
    allow_tf32: bool = False,
) -> Tensor:
    """Late-interaction score of every query with every passage: Σ_i max_j q_i · p_j (arXiv 2402.03216, section 3.2).

    Of equal similarities the lowest passage row wins and alone gets the gradient. An empty query or passage scores 0
    and gets no gradient.

    Args:
        queries: rows [Tq, E], E a multiple of 8 up to 1024; float32, bfloat16, float16 (float64 through the reference).
        passages: rows [Tp, E] in the same dtype.
        query_offsets, passage_offsets: int32 [Nq + 1], [Np + 1] on the same device.
        reduce: "mean" divides by the query's rows (M3), "sum" does not (ColBERT).
        zero_floor: let a zero vector take part in the maximum: of every passage (True), or of the passages marked in a
            bool tensor [Np]. Padded implementations (FlagEmbedding, PyLate) do so for each passage shorter than the
            longest of its batch.
        recompute_argmax: save no argmax (int32 [Tq, Np]) for backward, compute it again there.
        allow_tf32: let a GPU multiply float32 rows in tf32.

    Returns:
        float32 [Nq, Np] (float64 for float64 rows), differentiable in queries and passages.

    Raises:
        TypeError: no tensors, dtypes not listed above, or the dtypes differ.
        ValueError: shapes, devices, offsets (by value on the CPU) or `reduce` are not as described.
    """
    floor = _check(queries, passages, query_offsets, passage_offsets, reduce, zero_floor)
    save_argmax = torch.is_grad_enabled() and (queries.requires_grad or passages.requires_grad) and not recompute_argmax
    rows = (queries, passages, query_offsets, passage_offsets)
    scores: Tensor = torch.ops.m3.maxsim_forward(*rows, floor, reduce == "mean", save_argmax, allow_tf32)[0]
    return scores


def maxsim_pairs(
    queries: Tensor,
    passages: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    pairs: Tensor,
    *,
    reduce: Literal["mean", "sum"] = "mean",
    zero_floor: bool | Tensor = False,
    allow_tf32: bool = False,
) -> Tensor:
    """Late-interaction scores of the listed pairs only: reranking, hard negatives. Otherwise as `maxsim`.

    Args:
        pairs: int32 [P, 2] of (query, passage) numbers.

    Returns:
        float32 [P] (float64 for float64 rows), differentiable in queries and passages.

    Raises:
        TypeError, ValueError: as `maxsim`; also pairs out of range (by value on the CPU).
    """
    floor = _check(queries, passages, query_offsets, passage_offsets, reduce, zero_floor)
    check_tensor("pairs", pairs, dims=2, dtypes=(torch.int32,), device=queries.device)
    if pairs.shape[1] != 2:
        raise ValueError(f"pairs must have shape [P, 2], got {tuple(pairs.shape)}")
    rows = (queries, passages, query_offsets, passage_offsets)
    scores: Tensor = torch.ops.m3.maxsim_pairs_forward(*rows, pairs, floor, reduce == "mean", allow_tf32)
    return scores


def _check(
    queries: Tensor,
    passages: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    reduce: str,
    zero_floor: bool | Tensor,
) -> Tensor | None:
    """Check the arguments that both ops share and return zero_floor as the ops take it."""
    check_tensor("queries", queries, dims=2)
    check_tensor("passages", passages, dims=2, dtypes=(queries.dtype,), device=queries.device)
    width = queries.shape[1]
    if passages.shape[1] != width:
        raise ValueError(f"passages have width {passages.shape[1]}, but queries have {width}")
    if width % 8 or not 8 <= width <= MAX_WIDTH:
        raise ValueError(f"queries have width {width}; accepted: multiples of 8 from 8 to {MAX_WIDTH}")
    check_offsets("query_offsets", query_offsets, queries.device)
    check_offsets("passage_offsets", passage_offsets, queries.device)
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce is {reduce!r}; accepted: 'mean', 'sum'")
    count = passage_offsets.shape[0] - 1
    if isinstance(zero_floor, bool):
        return torch.ones(count, dtype=torch.bool, device=queries.device) if zero_floor else None
    check_tensor("zero_floor", zero_floor, dims=1, dtypes=(torch.bool,), device=queries.device)
    if zero_floor.shape[0] != count:
        raise ValueError(f"zero_floor has {zero_floor.shape[0]} entries, but there are {count} passages")
    return zero_floor
