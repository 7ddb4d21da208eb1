"""The meaning of late interaction (MaxSim), in plain PyTorch.

    score(q, p) = Σ_i max_j q_i · p_j, divided by the query's rows for "mean"     (paper arXiv 2402.03216, section 3.2)

An empty query or passage scores 0. Of equal similarities the lowest passage row wins and alone gets the gradient. Where
`zero_floor` is set for a passage, a zero vector takes part in its maximum (and gets no gradient): so score padded
passages in FlagEmbedding and PyLate.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _best_rows(query: Tensor, passage: Tensor, floor: bool) -> tuple[Tensor, Tensor]:
    """Maximum similarity of each query row [n] and the passage row that has it [n], -1 where the zero vector won."""
    best, winners = (query @ passage.T).max(dim=1)
    # torch.max may return any of several equal maxima; the first is the contract.
    winners = ((query @ passage.T) == best[:, None]).to(torch.int8).argmax(dim=1) if len(winners) else winners
    if floor:
        below = best < 0
        best, winners = torch.where(below, 0.0, best), torch.where(below, -1, winners)
    return best, winners


def maxsim(
    queries: Tensor,
    passages: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    zero_floor: Tensor | None = None,
    mean: bool = True,
) -> tuple[Tensor, Tensor]:
    """Scores of every pair and the winning rows; differentiable in queries and passages.

    Args:
        queries [Tq, E], passages [Tp, E], query_offsets int32 [Nq + 1], passage_offsets int32 [Np + 1].
        zero_floor: bool [Np] or None.
    Returns:
        scores [Nq, Np], float32 (float64 for float64); argmax int32 [Tq, Np]: packed passage row, -1 where none won.
    """
    queries, passages = _widen(queries), _widen(passages)
    query_bounds, passage_bounds = query_offsets.tolist(), passage_offsets.tolist()
    count = len(passage_bounds) - 1
    argmax = torch.full((queries.shape[0], count), -1, dtype=torch.int32, device=queries.device)
    rows = []
    for begin, end in zip(query_bounds, query_bounds[1:]):
        scores = []
        for column, (first, last) in enumerate(zip(passage_bounds, passage_bounds[1:])):
            if begin == end or first == last:
                scores.append(queries.new_zeros(()))
                continue
            floor = zero_floor is not None and bool(zero_floor[column])
            best, winners = _best_rows(queries[begin:end], passages[first:last], floor)
            argmax[begin:end, column] = torch.where(winners < 0, -1, winners + first).to(torch.int32)
            scores.append(best.sum() / (end - begin if mean else 1))
        rows.append(torch.stack(scores) if scores else queries.new_zeros((0,)))
    return (torch.stack(rows) if rows else queries.new_zeros((0, count))), argmax


def maxsim_backward(
    grad: Tensor,
    queries: Tensor,
    passages: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    argmax: Tensor,
    mean: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients to queries and passages: each query row passes grad (/ rows) times its winner, and back."""
    wide_queries, wide_passages = _widen(queries), _widen(passages)
    grad_queries, grad_passages = torch.zeros_like(wide_queries), torch.zeros_like(wide_passages)
    bounds = query_offsets.tolist()
    for query, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        for passage in range(argmax.shape[1]):
            _accumulate(
                grad[query, passage] / (end - begin if mean and end > begin else 1),
                argmax[begin:end, passage].long(),
                wide_queries[begin:end],
                wide_passages,
                grad_queries[begin:end],
                grad_passages,
            )
    return grad_queries.to(queries.dtype), grad_passages.to(passages.dtype)


def _accumulate(
    grad: Tensor, winners: Tensor, query: Tensor, passages: Tensor, grad_query: Tensor, grad_passages: Tensor
) -> None:
    won = winners >= 0
    grad_query[won] += grad * passages[winners[won]]
    grad_passages.index_add_(0, winners[won], grad * query[won])


def maxsim_pairs(
    queries: Tensor,
    passages: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    pairs: Tensor,
    zero_floor: Tensor | None = None,
    mean: bool = True,
) -> Tensor:
    """Scores of the listed (query, passage) pairs int32 [P, 2]: [P]; differentiable in queries and passages."""
    queries, passages = _widen(queries), _widen(passages)
    query_bounds, passage_bounds = query_offsets.tolist(), passage_offsets.tolist()
    scores = []
    for query, passage in pairs.tolist():
        begin, end = query_bounds[query : query + 2]
        first, last = passage_bounds[passage : passage + 2]
        if begin == end or first == last:
            scores.append(queries.new_zeros(()))
            continue
        floor = zero_floor is not None and bool(zero_floor[passage])
        best, _ = _best_rows(queries[begin:end], passages[first:last], floor)
        scores.append(best.sum() / (end - begin if mean else 1))
    return torch.stack(scores) if scores else queries.new_zeros((0,))


def maxsim_pairs_backward(
    grad: Tensor,
    queries: Tensor,
    passages: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    pairs: Tensor,
    zero_floor: Tensor | None = None,
    mean: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients to queries and passages; the winning rows are computed again."""
    wide_queries, wide_passages = _widen(queries), _widen(passages)
    grad_queries, grad_passages = torch.zeros_like(wide_queries), torch.zeros_like(wide_passages)
    query_bounds, passage_bounds = query_offsets.tolist(), passage_offsets.tolist()
    for at, (query, passage) in enumerate(pairs.tolist()):
        begin, end = query_bounds[query : query + 2]
        first, last = passage_bounds[passage : passage + 2]
        if begin == end or first == last:
            continue
        floor = zero_floor is not None and bool(zero_floor[passage])
        _, winners = _best_rows(wide_queries[begin:end], wide_passages[first:last], floor)
        _accumulate(
            grad[at] / (end - begin if mean else 1),
            torch.where(winners < 0, -1, winners + first),
            wide_queries[begin:end],
            wide_passages,
            grad_queries[begin:end],
            grad_passages,
        )
    return grad_queries.to(queries.dtype), grad_passages.to(passages.dtype)
