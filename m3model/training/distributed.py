"""Embeddings of all ranks on every rank, differentiable, so that the passages of all ranks are negatives for all heads.

Dense rows [N, E], multi-vector rows [T', E] and token weights [C] are gathered in the order of the ranks; the numbers
of texts and rows may differ from rank to rank and be 0. With k ranks of loss L_r, backward sums over the ranks:

    gradient to rank r's rows = Σ_s ∂L_s / ∂rows_r

Each rank's parameters then get their share of ∂(Σ_s L_s), and the mean over ranks that DistributedDataParallel takes
makes it the gradient of mean_s L_s: with equal numbers of queries, that of one process with the whole batch.
(FlagEmbedding gathers without gradient, so its dense gradient is 1/k of that, and does not gather the other two heads.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m3kernels import SparseBatch, offsets_from_lengths
from m3model.embeddings import M3Embeddings, MultiVectors

__all__ = ["gather_embeddings", "gather_rows"]


def gather_embeddings(embeddings: M3Embeddings[Any], group: dist.ProcessGroup | None = None) -> M3Embeddings[Any]:
    """The texts of all ranks of `group`, rank after rank; every rank calls it with the same heads.

    Without an initialized process group, or with one rank, it is `embeddings`. Gradients are summed over the ranks, so
    every rank has to run backward.

    Raises:
        TypeError: embeddings are not tensors.
        ValueError: ranks differ in their heads.
    """
    if not isinstance(embeddings, M3Embeddings) or not isinstance(embeddings.dense, Tensor | None):
        raise TypeError(f"embeddings must be M3Embeddings of tensors, got {type(embeddings).__name__}")
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return embeddings
    sparse = None if embeddings.sparse is None else embeddings.sparse.compact()
    multi_vector = embeddings.multi_vector
    parts = (embeddings.dense, None if sparse is None else sparse.weights, multi_vector and multi_vector.rows)
    counts = _gather_counts([-1 if part is None else part.shape[0] for part in parts], len(embeddings), parts, group)
    texts = counts[:, 3].tolist()
    if ((counts[:, :3] < 0) != (counts[0, :3] < 0)).any():
        raise ValueError(f"ranks differ in their heads: row counts of each rank are {counts[:, :3].tolist()}")
    dense = None if embeddings.dense is None else gather_rows(embeddings.dense, counts[:, 0].tolist(), group)
    if sparse is not None:
        entries = counts[:, 1].tolist()
        weights, ids = gather_rows(sparse.weights, entries, group), gather_rows(sparse.token_ids, entries, group)
        sparse = SparseBatch(ids, weights, _gather_offsets(sparse.offsets, texts, group))
    if multi_vector is not None:
        rows = gather_rows(multi_vector.rows, counts[:, 2].tolist(), group)
        multi_vector = MultiVectors(rows, _gather_offsets(multi_vector.offsets, texts, group))
    return M3Embeddings(dense, sparse, multi_vector)


def gather_rows(rows: Tensor, counts: list[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """Rows [Σ counts, ...] of all ranks, rank r's counts[r] rows after those of the ranks before it; differentiable.

    Raises:
        ValueError: counts do not fit the ranks or this rank's rows.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if len(counts) != ranks or counts[rank] != rows.shape[0]:
        raise ValueError(f"counts are {counts} for {ranks} ranks; rank {rank} has {rows.shape[0]} rows")
    gathered: Tensor = _GatherRows.apply(rows, counts, group)  # type: ignore[no-untyped-call]
    return gathered


class _GatherRows(torch.autograd.Function):
    """Ranks pad to the longest, because collective calls want equal sizes, and cut the padding off afterwards."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
        rank = dist.get_rank(group)
        ctx.group, ctx.begin, ctx.count = group, sum(counts[:rank]), counts[rank]
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(gathered, counts)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.to(wide, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.begin : ctx.begin + ctx.count].to(grad.dtype), None, None


def _gather_counts(rows: list[int], texts: int, parts: tuple[Any, ...], group: dist.ProcessGroup | None) -> Tensor:
    """[ranks, 4]: rows of dense, sparse and multi-vector (-1: absent), and texts, on the host."""
    device = next(part.device for part in parts if part is not None)
    own = torch.tensor([*rows, texts], dtype=torch.int64, device=device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    return torch.stack(gathered).cpu()


def _gather_offsets(offsets: Tensor, texts: list[int], group: dist.ProcessGroup | None) -> Tensor:
    return offsets_from_lengths(gather_rows(offsets.diff(), texts, group))
