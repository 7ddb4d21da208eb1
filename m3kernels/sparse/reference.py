"""The meaning of the sparse head and its scores, in plain PyTorch.

Token weights become one sparse vector a text: an id that occurs several times keeps its largest weight (paper arXiv
2402.03216, section 3.2, "Lexical retrieval"); of equal weights the first row wins and alone gets the gradient (torch's
scatter_reduce("amax") would split it). Weights that are 0 and ignored ids are left out; a NaN weight is kept and wins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from m3kernels.packing import sequence_of_row
from m3kernels.sparse.batch import NO_ID


def _float32_unless_float64(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def sparse_pool(
    token_weights: Tensor, token_ids: Tensor, offsets: Tensor, ignored_ids: Sequence[int] = ()
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maximum over equal ids within each sequence, differentiable in token_weights.

    Args:
        token_weights: [T]; token_ids: int32 [T]; offsets: int32 [N + 1].
    Returns:
        weights [T], ids int32 [T], offsets int32 [N + 1], rows int32 [T]: winner of each entry, -1 past the end.
    """
    total = token_weights.shape[0]
    device = token_weights.device
    ignored = torch.tensor(list(ignored_ids), dtype=token_ids.dtype, device=device)
    usable = ~(token_weights.detach() <= 0) & ~torch.isin(token_ids, ignored)
    sequence = sequence_of_row(offsets, total)
    # Stable sorts from the least significant key: row, weight (falling, NaN first), id, sequence, usable first.
    order = torch.argsort(token_weights.detach(), descending=True, stable=True)
    for key in (token_ids, sequence, (~usable).to(torch.int32)):
        order = order[torch.argsort(key[order], stable=True)]
    first = usable[order]
    if total > 1:
        same = (token_ids[order][1:] == token_ids[order][:-1]) & (sequence[order][1:] == sequence[order][:-1])
        first = first & torch.cat([first.new_ones(1), ~same])
    winners = order[torch.argsort(~first, stable=True)]
    counts = torch.zeros(offsets.shape[0] - 1, dtype=torch.int64, device=device)
    counts.index_add_(0, sequence[order], first.to(torch.int64))
    pooled = torch.zeros_like(offsets)
    pooled[1:] = torch.cumsum(counts, 0)
    live = torch.arange(total, device=device) < pooled[-1]
    ids = torch.where(live, token_ids[winners], NO_ID).to(torch.int32)
    weights = torch.where(live, token_weights[winners], 0)
    return weights, ids, pooled, torch.where(live, winners, -1).to(torch.int32)


def sparse_pool_backward(grad_weights: Tensor, rows: Tensor) -> Tensor:
    """Gradient to token_weights [T]: each entry's gradient goes to its winning row."""
    grad = torch.zeros_like(grad_weights)
    live = rows >= 0
    grad[rows[live].long()] = grad_weights[live]
    return grad


def token_weights(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """ReLU(hidden · weight + bias): [T], computed in float32 (float64 for float64) and returned in that dtype."""
    hidden, weight, bias = (_float32_unless_float64(x) for x in (hidden, weight, bias))
    return torch.relu(hidden @ weight + bias)


def sparse_embed(
    hidden: Tensor, weight: Tensor, bias: Tensor, token_ids: Tensor, offsets: Tensor, ignored_ids: Sequence[int] = ()
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token weights of hidden states [T, E] by the head weight [E], bias [1], then `sparse_pool`; differentiable.

    The maximum compares float32 weights; the result is rounded to the dtype of hidden, and what that rounds to 0 is 0.
    """
    dense = token_weights(hidden, weight, bias)
    dense = dense.masked_fill(dense.detach().to(hidden.dtype) == 0, 0)
    weights, ids, pooled, rows = sparse_pool(dense, token_ids, offsets, ignored_ids)
    return weights.to(hidden.dtype), ids, pooled, rows


def sparse_embed_backward(
    grad_weights: Tensor, hidden: Tensor, weight: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to hidden [T, E] (only winning rows are not 0), weight [E] and bias [1]."""
    live = rows >= 0
    winners = rows[live].long()
    grad = _float32_unless_float64(grad_weights)[live]
    grad_hidden = torch.zeros_like(hidden)
    grad_hidden[winners] = (grad[:, None] * _float32_unless_float64(weight)).to(hidden.dtype)
    grad_weight = grad @ _float32_unless_float64(hidden)[winners]
    return grad_hidden, grad_weight.to(weight.dtype), grad.sum().reshape(1).to(weight.dtype)


def sparse_scores(
    query_ids: Tensor,
    query_weights: Tensor,
    query_offsets: Tensor,
    passage_ids: Tensor,
    passage_weights: Tensor,
    passage_offsets: Tensor,
) -> Tensor:
    """Σ over shared ids of query weight · passage weight, for every pair: [Nq, Np], differentiable in the weights.

    Each passage in turn looks up the ids of all query entries by binary search, so that a weight which is not finite
    touches only the pairs that share its id.
    """
    count = int(query_offsets[-1])
    owner = sequence_of_row(query_offsets, count)
    weights = _float32_unless_float64(query_weights)[:count]
    texts = query_offsets.shape[0] - 1
    columns = []
    for at, found in _look_up(query_ids[:count], passage_ids, passage_offsets):
        products = weights[found] * _float32_unless_float64(passage_weights)[at]
        columns.append(weights.new_zeros(texts).index_add(0, owner[found], products))
    return torch.stack(columns, 1) if columns else weights.new_zeros((texts, 0))


def sparse_scores_backward(
    grad: Tensor,
    query_ids: Tensor,
    query_weights: Tensor,
    query_offsets: Tensor,
    passage_ids: Tensor,
    passage_weights: Tensor,
    passage_offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients to the weights: that of a query entry is Σ over the passages with its id of grad · passage weight."""
    queries = (query_ids, query_weights, query_offsets)
    passages = (passage_ids, passage_weights, passage_offsets)
    return _gather_side(grad, queries, passages), _gather_side(grad.T, passages, queries)


def _gather_side(grad: Tensor, side: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Gradient of every weight of `side`."""
    ids, weights, offsets = side
    other_ids, other_weights, other_offsets = other
    count = int(offsets[-1])
    owner = sequence_of_row(offsets, count)
    result = torch.zeros_like(_float32_unless_float64(weights))
    for column, (at, found) in enumerate(_look_up(ids[:count], other_ids, other_offsets)):
        result[found] += grad[owner[found], column] * _float32_unless_float64(other_weights)[at]
    return result.to(weights.dtype)


def _look_up(ids: Tensor, other_ids: Tensor, other_offsets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each text of the other side: its entries whose ids are among `ids`, and where in `ids` those stand."""
    bounds = other_offsets.tolist()
    for begin, end in zip(bounds, bounds[1:]):
        own = other_ids[begin:end].contiguous()
        at = torch.searchsorted(own, ids).clamp_max(max(end - begin - 1, 0))
        found = (own[at] == ids).nonzero()[:, 0] if end > begin else at[:0]
        yield begin + at[found], found
