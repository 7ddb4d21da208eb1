"""The sparse (lexical) head and its scores, without any tensor that has a vocabulary axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m3kernels._checks import check_offsets, check_tensor
from m3kernels.sparse import ops as _ops  # noqa: F401  (registers the ops)
from m3kernels.sparse.batch import SparseBatch
from m3kernels.sparse.index import SparseIndex, SparseSearchResult

__all__ = ["SparseBatch", "SparseIndex", "SparseSearchResult", "sparse_embed", "sparse_pool", "sparse_scores"]


def sparse_pool(
    token_weights: Tensor, token_ids: Tensor, offsets: Tensor, ignored_ids: Sequence[int] = ()
) -> SparseBatch:
    """Sparse vector of each sequence: the largest weight of every token id (paper section 3.2, arXiv 2402.03216).

    Of equal weights the first row wins and alone gets the gradient, as in FlagEmbedding's training formula (torch.max
    over a dimension); torch.amax and scatter_reduce("amax") would split it among them. Weights that are 0 are left out,
    so they get no gradient; a NaN wins and stays NaN.

    Args:
        token_weights: [T], at least 0; float32, bfloat16, float16 (float64 through the reference).
        token_ids: int32 [T], from 0 to 2**31 - 2.
        offsets: int32 [N + 1].
        ignored_ids: ids that never enter the vector (cls, eos, pad, unk in M3).

    Returns:
        SparseBatch of capacity C = T, weights in the dtype of token_weights, differentiable.

    Raises:
        TypeError: a dtype other than those above.
        ValueError: shapes or devices do not fit; on the CPU also by value: offsets, token ids out of range.
    """
    check_tensor("token_weights", token_weights, dims=1)
    _check_tokens(token_ids, offsets, token_weights.shape[0], token_weights.device)
    weights, ids, pooled, _ = torch.ops.m3.sparse_pool(token_weights, token_ids, offsets, list(ignored_ids))
    return SparseBatch(ids, weights, pooled)


def sparse_embed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    token_ids: Tensor,
    offsets: Tensor,
    ignored_ids: Sequence[int] = (),
) -> SparseBatch:
    """The whole sparse head: `sparse_pool` of ReLU(hidden · weight + bias), one pass over the hidden states.

    Args:
        hidden: [T, E]; float32, bfloat16, float16 (float64 through the reference); summed in float32.
        weight: [E] and bias: [1] of the linear layer, in the dtype of hidden.
        token_ids, offsets, ignored_ids: as in `sparse_pool`.

    Returns:
        SparseBatch of capacity C = T, weights in the dtype of hidden, differentiable in hidden, weight and bias.

    Raises:
        TypeError, ValueError: as `sparse_pool`.
    """
    check_tensor("hidden", hidden, dims=2)
    check_tensor("weight", weight, dims=1, dtypes=(hidden.dtype,), device=hidden.device)
    check_tensor("bias", bias, dims=1, dtypes=(hidden.dtype,), device=hidden.device)
    if hidden.shape[1] == 0:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; accepted: a width of at least 1")
    if weight.shape[0] != hidden.shape[1]:
        raise ValueError(f"weight has {weight.shape[0]} entries, but hidden has width {hidden.shape[1]}")
    if bias.shape[0] != 1:
        raise ValueError(f"bias has {bias.shape[0]} entries; accepted: 1")
    _check_tokens(token_ids, offsets, hidden.shape[0], hidden.device)
    weights, ids, pooled, _ = torch.ops.m3.sparse_embed(hidden, weight, bias, token_ids, offsets, list(ignored_ids))
    return SparseBatch(ids, weights, pooled)


def sparse_scores(queries: SparseBatch, passages: SparseBatch) -> Tensor:
    """Lexical scores of every pair: Σ over shared token ids of query weight · passage weight (paper section 3.2).

    Args:
        queries, passages: of equal weight dtype and on one device; the ids of each text increase.

    Returns:
        float32 [Nq, Np] (float64 for float64 weights), differentiable in both weights.

    Raises:
        TypeError: not SparseBatches, or dtypes that are not accepted or differ.
        ValueError: shapes or devices do not fit; on the CPU also by value: offsets, ids that do not increase in a text.
    """
    for name, batch in (("queries", queries), ("passages", passages)):
        if not isinstance(batch, SparseBatch):
            raise TypeError(f"{name} must be a SparseBatch, got {type(batch).__name__}")
        weights = check_tensor(f"{name}.weights", batch.weights, dims=1, device=queries.weights.device)
        ids = check_tensor(f"{name}.token_ids", batch.token_ids, dims=1, dtypes=(torch.int32,), device=weights.device)
        if ids.shape != weights.shape:
            raise ValueError(f"{name} has {ids.shape[0]} token_ids, but {weights.shape[0]} weights")
        check_offsets(f"{name}.offsets", batch.offsets, weights.device)
    if queries.weights.dtype != passages.weights.dtype:
        raise TypeError(f"queries have weights of {queries.weights.dtype}, passages of {passages.weights.dtype}")
    scores: Tensor = torch.ops.m3.sparse_scores(*queries, *passages)
    return scores


def _check_tokens(token_ids: Tensor, offsets: Tensor, total: int, device: torch.device) -> None:
    check_tensor("token_ids", token_ids, dims=1, dtypes=(torch.int32,), device=device)
    if token_ids.shape[0] != total:
        raise ValueError(f"token_ids has {token_ids.shape[0]} entries, but there are {total} rows")
    if total >= 2**31:
        raise ValueError(f"there are {total} rows; accepted: fewer than 2**31, because offsets are int32")
    check_offsets("offsets", offsets, device)
