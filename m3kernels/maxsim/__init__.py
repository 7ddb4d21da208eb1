"""Late interaction of packed multi-vectors: `maxsim` (every pair), `maxsim_pairs` (a list of pairs), `maxsim_topk`."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from m3kernels._checks import check_offsets, check_tensor
from m3kernels.maxsim import ops as _ops  # noqa: F401  (registers the ops)
from m3kernels.maxsim.quantized import QuantizedRows, check_quantized, quantize_rows

__all__ = ["BestPassages", "QuantizedRows", "maxsim", "maxsim_pairs", "maxsim_topk", "quantize_rows"]

MAX_WIDTH = 1024
# Scores that maxsim_topk holds at a time, beside the best k.
_SCORES_AT_A_TIME = 1 << 20


def maxsim(
    queries: Tensor,
    passages: Tensor | QuantizedRows,
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
        passages: rows [Tp, E] in the same dtype, or QuantizedRows of that width (`quantize_rows`). On the CPU they may
            lie in a memory-mapped file: they are read in place, and what has been read does not stay resident.
        query_offsets, passage_offsets: int32 [Nq + 1], [Np + 1] on the same device.
        reduce: "mean" divides by the query's rows (M3), "sum" does not (ColBERT).
        zero_floor: let a zero vector take part in the maximum: of every passage (True), or of the passages marked in a
            bool tensor [Np]. Padded implementations (FlagEmbedding, PyLate) do so for each passage shorter than the
            longest of its batch.
        recompute_argmax: save no argmax (int32 [Tq, Np]) for backward, compute it again there.
        allow_tf32: let a GPU multiply float32 rows in tf32.

    Returns:
        float32 [Nq, Np] (float64 for float64 rows), differentiable in queries and passages. With quantized passages,
        estimates without gradients: similarities of 7-bit query rows with the rows that the codes stand for on the CPU,
        of whole query rows with them on a GPU.

    Raises:
        TypeError: no tensors, dtypes not listed above, or the dtypes differ.
        ValueError: shapes, devices, offsets (by value on the CPU) or `reduce` are not as described.
    """
    floor = _check(queries, passages, query_offsets, passage_offsets, reduce, zero_floor)
    if isinstance(passages, QuantizedRows):
        estimates: Tensor = torch.ops.m3.maxsim_quantized(
            queries.detach(),
            passages.codes,
            passages.scales,
            query_offsets,
            passage_offsets,
            floor,
            passages.bits,
            reduce == "mean",
        )
        return estimates
    save_argmax = torch.is_grad_enabled() and (queries.requires_grad or passages.requires_grad) and not recompute_argmax
    rows = (queries, passages, query_offsets, passage_offsets)
    scores: Tensor = torch.ops.m3.maxsim_forward(*rows, floor, reduce == "mean", save_argmax, allow_tf32)[0]
    return scores


def maxsim_pairs(
    queries: Tensor,
    passages: Tensor | QuantizedRows,
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
    if isinstance(passages, QuantizedRows):
        estimates: Tensor = torch.ops.m3.maxsim_pairs_quantized(
            queries.detach(),
            passages.codes,
            passages.scales,
            query_offsets,
            passage_offsets,
            pairs,
            floor,
            passages.bits,
            reduce == "mean",
        )
        return estimates
    rows = (queries, passages, query_offsets, passage_offsets)
    scores: Tensor = torch.ops.m3.maxsim_pairs_forward(*rows, pairs, floor, reduce == "mean", allow_tf32)
    return scores


class BestPassages(NamedTuple):
    """The best passages of each query, best first: scores [Nq, k] and their numbers, int64 [Nq, k]."""

    scores: Tensor
    passages: Tensor


@torch.no_grad()
def maxsim_topk(
    queries: Tensor,
    passages: Tensor | QuantizedRows,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    k: int,
    *,
    reduce: Literal["mean", "sum"] = "mean",
    zero_floor: bool | Tensor = False,
) -> BestPassages:
    """The k passages with the largest `maxsim` for each query; the scores of all passages are never held together.

    Passages are scored in runs of about a million scores, and only the best k so far are kept. Of equal scores the
    lower passage comes first.

    Args:
        k: how many, at least 1; with fewer passages than that, all of them are returned.
        Others as `maxsim`.

    Returns:
        BestPassages(scores float32 [Nq, min(k, Np)] (float64 for float64 rows), passages int64), without gradients.

    Raises:
        TypeError, ValueError: as `maxsim`; also k below 1.
    """
    floor = _check(queries, passages, query_offsets, passage_offsets, reduce, zero_floor)
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k is {k!r}; accepted: integers of at least 1")
    query_count, count = query_offsets.shape[0] - 1, passage_offsets.shape[0] - 1
    step = max(k, _SCORES_AT_A_TIME // max(query_count, 1))
    score_dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    best = queries.new_empty((query_count, 0), dtype=score_dtype)
    numbers = torch.empty((query_count, 0), dtype=torch.int64, device=queries.device)
    for first in range(0, count, step):
        last = min(first + step, count)
        offsets = passage_offsets[first : last + 1]
        rows = passages
        if not queries.is_cuda and count > step:
            # On a GPU the kernel takes offsets into all rows as they are: nothing has to be read back.
            begin, end = int(offsets[0]), int(offsets[-1])
            rows = rows.slice_rows(begin, end) if isinstance(rows, QuantizedRows) else rows[begin:end]
            offsets = offsets - begin
        run_floor = False if floor is None else floor[first:last]
        scores = maxsim(queries, rows, query_offsets, offsets, reduce=reduce, zero_floor=run_floor)
        run = torch.arange(first, last, device=queries.device).expand(query_count, -1)
        # Stable: the kept ones come first and have lower numbers.
        best, order = torch.cat([best, scores], 1).sort(dim=1, descending=True, stable=True)
        best, order = best[:, :k], order[:, :k]
        numbers = torch.cat([numbers, run], 1).gather(1, order)
    return BestPassages(best, numbers)


def _check(
    queries: Tensor,
    passages: Tensor | QuantizedRows,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    reduce: str,
    zero_floor: bool | Tensor,
) -> Tensor | None:
    """Check the arguments that both ops share and return zero_floor as the ops take it."""
    check_tensor("queries", queries, dims=2)
    width = queries.shape[1]
    if isinstance(passages, QuantizedRows):
        check_quantized("passages", passages, queries.device)
        passage_width = passages.width
    else:
        check_tensor("passages", passages, dims=2, dtypes=(queries.dtype,), device=queries.device)
        passage_width = passages.shape[1]
    if passage_width != width:
        raise ValueError(f"passages have width {passage_width}, but queries have {width}")
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
