"""Late interaction on NVIDIA GPUs, in Triton: scores of every pair or of listed pairs, and deterministic gradients.

    score(q, p) = Σ_i max_j q_i · p_j, divided by the query's rows for "mean"

queries [Tq, E], passages [Tp, E] packed rows, E a multiple of 8; offsets int32; scores float32 [Nq, Np] or [P].

forward     A matrix product tiled over E, whose M side are rows of one passage and whose N side are packed query rows
            of whatever queries: a tile of the passage is read once for all of them, and few query rows still fill the
            M side of a tensor core. Similarities stay in registers; the epilogue folds them into the running maximum of
            each query row. A second small kernel sums the maxima [Np, Tq] of a query's rows in a fixed order.
backward_q  One program for each query row and part of E gathers the winning passage rows.
backward_p  One program for each tile of passage rows and part of E: a product of the tile's one-hot rows (which query
            rows chose me, times the incoming gradient) with the query rows. The owner sums, so there are no atomics.
            The one-hot side is float32: 16-bit rows multiply in tf32, which holds them and the range of gradients.

FLOPs: 2·Tq·Tp·E forward and for backward_p. Bytes: E·(Tp·ceil(Tq / BLOCK_N) + Tq·ceil(Tp / BLOCK_M)) rows at most from
L2. Sizes are arguments at run time: no new shape compiles anything. float32 inputs multiply in IEEE float32, off the
tensor cores, unless tf32 is allowed. Equal similarities go to the lowest row. A NaN similarity makes the maximum
NaN. Addresses are a 64-bit base for each tile plus 32-bit offsets within it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3kernels._tiles import TileTable, turned_on
from m3kernels.attention.triton_kernels import find_tile

MOST_QUERY_ROWS = 128
"""Query rows in the widest tile: a call with fewer takes a narrower tile from the table."""
OPTION_SETS = {
    "forward": (
        (), ("FLOOR",), ("SAVE",), ("FLOOR", "SAVE"), ("LISTED", "SAVE"), ("FLOOR", "LISTED", "SAVE"),
    ),
    "pairs_forward": ((), ("FLOOR",), ("MEAN",), ("FLOOR", "MEAN")),
    "sum": ((), ("MEAN",)),
    "backward_q": ((),),
    "backward_p": ((),),
}  # fmt: skip
"""Kernel → the sets of compile-time switches that calls turn on; LISTED is there to find winners again, with SAVE."""
SUM_BLOCKS = {"BLOCK_P": 32, "BLOCK_R": 32}
"""Passages and query rows at a time in the small kernel that sums the maxima."""


def forward(
    queries: Tensor,
    passages: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    zero_floor: Tensor | None,
    mean: bool,
    save_argmax: bool,
    allow_tf32: bool,
    tiles: TileTable,
) -> tuple[Tensor, Tensor]:
    """Scores float32 [Nq, Np], and the winning packed passage rows int32 [Tq, Np] (−1: none) if `save_argmax`."""
    count = passage_offsets.shape[0] - 1
    best, argmax = _best_rows(
        queries, passages, passage_offsets, zero_floor, None, None, save_argmax, allow_tf32, tiles
    )
    scores = torch.empty((query_offsets.shape[0] - 1, count), dtype=torch.float32, device=queries.device)
    if scores.numel():
        sum_kernel[(scores.shape[0], triton.cdiv(count, SUM_BLOCKS["BLOCK_P"]))](
            best, query_offsets, scores, queries.shape[0], count, MEAN=mean, **SUM_BLOCKS
        )
    return scores, argmax


def backward(
    grad: Tensor,
    queries: Tensor,
    passages: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    zero_floor: Tensor | None,
    argmax: Tensor,
    mean: bool,
    allow_tf32: bool,
    tiles: TileTable,
) -> tuple[Tensor, Tensor]:
    """Gradients to queries and passages; an argmax that was not saved (no rows) is computed again."""
    if argmax.shape[0] != queries.shape[0]:
        argmax = _best_rows(queries, passages, passage_offsets, zero_floor, None, None, True, allow_tf32, tiles)[1]
    query_of_row = _query_of_row(query_offsets, queries.shape[0])
    weights = _row_weights(grad, query_offsets, mean)
    return _gather(weights, queries, passages, passage_offsets, query_of_row, argmax, allow_tf32, tiles)


def pairs_forward(
    queries: Tensor,
    passages: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    pairs: Tensor,
    zero_floor: Tensor | None,
    mean: bool,
    allow_tf32: bool,
    tiles: TileTable,
) -> Tensor:
    """Scores float32 [P] of the listed pairs, one program for each."""
    scores = torch.empty(pairs.shape[0], dtype=torch.float32, device=queries.device)
    if not pairs.shape[0]:
        return scores
    switches = {"FLOOR": zero_floor is not None, "MEAN": mean}
    tile = tiles.find("pairs_forward", queries.dtype, 32, allow_tf32, turned_on(switches))
    pairs_forward_kernel[(pairs.shape[0],)](
        queries.contiguous(), passages.contiguous(), query_offsets, passage_offsets, pairs.contiguous(),
        passage_offsets if zero_floor is None else zero_floor, scores, queries.shape[1],
        **switches, PRECISION=_precision(allow_tf32), **tile.launch_options(),
    )  # fmt: skip
    return scores


def pairs_backward(
    grad: Tensor,
    queries: Tensor,
    passages: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    pairs: Tensor,
    zero_floor: Tensor | None,
    mean: bool,
    allow_tf32: bool,
    tiles: TileTable,
) -> tuple[Tensor, Tensor]:
    """Gradients of listed pairs: those of every pair, with weight 0 and no winner outside the list.

    Winners are computed again, only in tiles that hold a listed pair; a pair listed twice sums its gradients.
    """
    shape = (query_offsets.shape[0] - 1, passage_offsets.shape[0] - 1)
    numbers = pairs[:, 0].long(), pairs[:, 1].long()
    weights = grad.new_zeros(shape).index_put_(numbers, grad, accumulate=True)
    listed = torch.zeros(shape, dtype=torch.bool, device=queries.device)
    listed.index_put_(numbers, listed.new_ones(()))
    query_of_row = _query_of_row(query_offsets, queries.shape[0])
    rows = (queries, passages, passage_offsets)
    argmax = _best_rows(*rows, zero_floor, listed, query_of_row, True, allow_tf32, tiles)[1]
    weights = _row_weights(weights, query_offsets, mean)
    return _gather(weights, *rows, query_of_row, argmax, allow_tf32, tiles)


def _best_rows(
    queries: Tensor,
    passages: Tensor,
    passage_offsets: Tensor,
    zero_floor: Tensor | None,
    listed: Tensor | None,
    query_of_row: Tensor | None,
    save_argmax: bool,
    allow_tf32: bool,
    tiles: TileTable,
) -> tuple[Tensor, Tensor]:
    """Best similarity of every query row in every passage [Np, Tq], and its row [Tq, Np] if `save_argmax`."""
    rows, width = queries.shape
    count = passage_offsets.shape[0] - 1
    best = torch.empty((count, rows), dtype=torch.float32, device=queries.device)
    argmax = passage_offsets.new_empty((rows if save_argmax else 0, count))
    if not best.numel():
        return best, argmax
    switches = {"FLOOR": zero_floor is not None, "LISTED": listed is not None, "SAVE": save_argmax}
    tile = tiles.find("forward", queries.dtype, min(rows, MOST_QUERY_ROWS), allow_tf32, turned_on(switches))
    forward_kernel[(count * triton.cdiv(rows, tile.block_n),)](
        queries.contiguous(), passages.contiguous(), passage_offsets,
        passage_offsets if zero_floor is None else zero_floor,
        passage_offsets if listed is None else listed,
        passage_offsets if query_of_row is None else query_of_row,
        best, argmax, rows, count, width, **switches,
        PRECISION=_precision(allow_tf32), **tile.launch_options(),
    )  # fmt: skip
    return best, argmax


def _gather(
    weights: Tensor,
    queries: Tensor,
    passages: Tensor,
    passage_offsets: Tensor,
    query_of_row: Tensor,
    argmax: Tensor,
    allow_tf32: bool,
    tiles: TileTable,
) -> tuple[Tensor, Tensor]:
    """Gradients from the winners [Tq, Np] and the weight of each (query, passage)."""
    queries, passages, argmax = queries.contiguous(), passages.contiguous(), argmax.contiguous()
    grad_queries, grad_passages = torch.zeros_like(queries), torch.zeros_like(passages)
    rows, width = queries.shape
    count = passage_offsets.shape[0] - 1
    if not rows or not count or not passages.shape[0]:
        return grad_queries, grad_passages
    tile = tiles.find("backward_q", queries.dtype, width, allow_tf32)
    backward_q_kernel[(rows, triton.cdiv(width, tile.block_n))](
        passages, weights, argmax, query_of_row, grad_queries, count, width,
        PRECISION=_precision(allow_tf32), **tile.launch_options(),
    )  # fmt: skip
    tile = tiles.find("backward_p", queries.dtype, width, allow_tf32)
    backward_p_kernel[(passages.shape[0] // tile.block_m + count, triton.cdiv(width, tile.block_n))](
        queries, weights, argmax, query_of_row, passage_offsets, grad_passages, rows, count, width,
        PRECISION=_precision(allow_tf32), **tile.launch_options(),
    )  # fmt: skip
    return grad_queries, grad_passages


def compiled_arguments(
    kernel: Any, dtype: str, width: int, options: Collection[str]
) -> tuple[dict[str, str], dict[str, Any], tuple[str, ...]]:
    """For ahead-of-time compilation: Triton types of a kernel's arguments, its constants with only these switches on,
    and the arguments that are multiples of 16 bytes or elements at every usual width."""
    types = {
        "best_ptr": "*fp32",
        "scores_ptr": "*fp32",
        "weights_ptr": "*fp32",
        "floor_ptr": "*i1",
        "listed_ptr": "*i1",
    }
    types |= dict.fromkeys(
        ("argmax_ptr", "query_of_row_ptr", "query_offsets_ptr", "passage_offsets_ptr", "pairs_ptr"), "*i32"
    )
    signature = {}
    for name in kernel.arg_names:
        default = f"*{dtype}" if name.endswith("_ptr") else "constexpr" if name.isupper() else "i32"
        signature[name] = types.get(name, default)
    switches = {name: name in options for name in ("FLOOR", "LISTED", "SAVE", "MEAN")}
    aligned = tuple(name for name in signature if name.endswith("_ptr") or name == "width")
    return signature, {name: value for name, value in switches.items() if name in signature}, aligned


def _precision(allow_tf32: bool) -> str:
    return "tf32" if allow_tf32 else "ieee"


def _query_of_row(query_offsets: Tensor, rows: int) -> Tensor:
    """The query that owns each packed row, int32 [Tq]."""
    numbers = torch.arange(rows, dtype=torch.int32, device=query_offsets.device)
    return torch.searchsorted(query_offsets[1:].contiguous(), numbers, right=True, out_int32=True)


def _row_weights(grad: Tensor, query_offsets: Tensor, mean: bool) -> Tensor:
    """What a query's rows pass on for each passage [Nq, Np]: grad, divided by the query's rows for the mean."""
    if not mean:
        return grad.contiguous()
    return grad / query_offsets.diff().clamp(min=1)[:, None]


_RUN_TIME_VALUES = ["query_rows", "passages"]


@triton.jit(do_not_specialize=_RUN_TIME_VALUES)
def forward_kernel(
    queries_ptr, rows_ptr, passage_offsets_ptr, floor_ptr, listed_ptr, query_of_row_ptr, best_ptr, argmax_ptr,
    query_rows, passages, width,
    FLOOR: tl.constexpr, LISTED: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: one passage against BLOCK_N packed query rows. Neighbouring programs share the passage (L2)."""
    query_tiles = tl.cdiv(query_rows, BLOCK_N)
    passage = tl.program_id(0) // query_tiles
    first = (tl.program_id(0) % query_tiles) * BLOCK_N
    begin = tl.load(passage_offsets_ptr + passage)
    length = tl.load(passage_offsets_ptr + passage + 1) - begin
    columns = tl.arange(0, BLOCK_N)
    column_ok = first + columns < query_rows
    scanned = length
    if LISTED:
        query = tl.load(query_of_row_ptr + first + columns, mask=column_ok, other=0)
        wanted = tl.load(listed_ptr + query.to(tl.int64) * passages + passage, mask=column_ok, other=0) != 0
        scanned = tl.where(tl.max(wanted.to(tl.int32), 0) > 0, length, 0)
    best, winner = best_of_passage(
        queries_ptr, rows_ptr, first, column_ok, begin, scanned, width,
        SAVE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    best, winner = settle(best, winner, length, passage, floor_ptr, FLOOR)
    tl.store(best_ptr + passage.to(tl.int64) * query_rows + first + columns, best, mask=column_ok)
    if SAVE:
        if LISTED:
            winner = tl.where(wanted, winner, -1)
        tl.store(argmax_ptr + (first + columns).to(tl.int64) * passages + passage, winner, mask=column_ok)


@triton.jit
def pairs_forward_kernel(
    queries_ptr, rows_ptr, query_offsets_ptr, passage_offsets_ptr, pairs_ptr, floor_ptr, scores_ptr, width,
    FLOOR: tl.constexpr, MEAN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: one listed pair, its query BLOCK_N rows at a time."""
    pair = tl.program_id(0).to(tl.int64)
    query = tl.load(pairs_ptr + 2 * pair)
    passage = tl.load(pairs_ptr + 2 * pair + 1)
    query_begin = tl.load(query_offsets_ptr + query)
    query_length = tl.load(query_offsets_ptr + query + 1) - query_begin
    begin = tl.load(passage_offsets_ptr + passage)
    length = tl.load(passage_offsets_ptr + passage + 1) - begin
    columns = tl.arange(0, BLOCK_N)
    score = 0.0
    for first in range(0, query_length, BLOCK_N):
        column_ok = first + columns < query_length
        best, winner = best_of_passage(
            queries_ptr, rows_ptr, query_begin + first, column_ok, begin, length, width,
            False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        best, winner = settle(best, winner, length, passage, floor_ptr, FLOOR)
        score += tl.sum(tl.where(column_ok, best, 0.0), 0)
    if MEAN:
        score = score / tl.maximum(query_length, 1).to(tl.float32)
    tl.store(scores_ptr + pair, score)


@triton.jit
def best_of_passage(
    queries_ptr, rows_ptr, first, column_ok, begin, length, width,
    SAVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Maximum over `length` passage rows from `begin` of BLOCK_N query rows from `first`, and the lowest such row."""
    rows, columns, part = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    best = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    winner = tl.zeros((BLOCK_N,), tl.int32) + begin
    query_ptrs = queries_ptr + first.to(tl.int64) * width + columns[None, :] * width + part[:, None]
    for start in range(0, length, BLOCK_M):
        row_ok = start + rows < length
        row_ptrs = rows_ptr + (begin + start).to(tl.int64) * width + rows[:, None] * width + part[None, :]
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for at in range(0, width, BLOCK_K):
            part_ok = at + part < width
            passage_tile = tl.load(row_ptrs + at, mask=row_ok[:, None] & part_ok[None, :], other=0.0)
            query_tile = tl.load(query_ptrs + at, mask=part_ok[:, None] & column_ok[None, :], other=0.0)
            sums = tl.dot(passage_tile, query_tile, sums, input_precision=PRECISION)
        similarities = tl.where(row_ok[:, None], sums, -float("inf"))
        # tl.max drops NaN on a GPU, which would hide a broken model.
        spoiled = tl.max((similarities != similarities).to(tl.int32), 0) > 0
        tile_best = tl.where(spoiled, float("nan"), tl.max(similarities, 0))
        if SAVE:
            lowest = tl.min(tl.where(similarities == tile_best[None, :], rows[:, None], BLOCK_M), 0)
            winner = tl.where(tile_best > best, begin + start + lowest, winner)
        best = tl.maximum(best, tile_best, propagate_nan=tl.PropagateNan.ALL)
    if SAVE:
        winner = tl.where(best != best, begin, winner)
    return best, winner


@triton.jit
def settle(best, winner, length, passage, floor_ptr, FLOOR: tl.constexpr):
    """An empty passage gives 0 and no winner; so does a negative maximum where a zero vector takes part."""
    none = length == 0
    lost = tl.zeros_like(best) < -1.0
    if FLOOR:
        lost = (best < 0.0) & (tl.load(floor_ptr + passage) != 0)
    lost = lost | none
    return tl.where(lost, 0.0, best), tl.where(lost, -1, winner)


@triton.jit(do_not_specialize=_RUN_TIME_VALUES)
def sum_kernel(
    best_ptr, query_offsets_ptr, scores_ptr, query_rows, passages,
    MEAN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program: scores of one query with BLOCK_P passages, from the maxima [Np, Tq]."""
    query = tl.program_id(0)
    passage = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    passage_ok = passage < passages
    begin = tl.load(query_offsets_ptr + query)
    length = tl.load(query_offsets_ptr + query + 1) - begin
    rows = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_P,), tl.float32)
    base = best_ptr + passage.to(tl.int64)[:, None] * query_rows + begin
    for start in range(0, length, BLOCK_R):
        ok = passage_ok[:, None] & (start + rows < length)[None, :]
        total += tl.sum(tl.load(base + (start + rows)[None, :], mask=ok, other=0.0), 1)
    if MEAN:
        total = total / tl.maximum(length, 1).to(tl.float32)
    tl.store(scores_ptr + query.to(tl.int64) * passages + passage, total, mask=passage_ok)


@triton.jit(do_not_specialize=_RUN_TIME_VALUES)
def backward_q_kernel(
    rows_ptr, weights_ptr, argmax_ptr, query_of_row_ptr, grad_queries_ptr, passages, width,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N values of the gradient of one query row, over all passages BLOCK_M at a time."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part_ok = part < width
    query = tl.load(query_of_row_ptr + row).to(tl.int64)
    # Each thread adds up its own passages; they meet once, after the loop.
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, passages, BLOCK_M):
        passage = start + tl.arange(0, BLOCK_M)
        passage_ok = passage < passages
        winner = tl.load(argmax_ptr + row * passages + passage, mask=passage_ok, other=-1)
        weight = tl.load(weights_ptr + query * passages + passage, mask=passage_ok, other=0.0)
        won = (winner >= 0)[:, None] & part_ok[None, :]
        chosen = tl.load(rows_ptr + winner.to(tl.int64)[:, None] * width + part[None, :], mask=won, other=0.0)
        sums += chosen.to(tl.float32) * weight[:, None]
    total = tl.sum(sums, 0)
    tl.store(grad_queries_ptr + row * width + part, total.to(grad_queries_ptr.dtype.element_ty), mask=part_ok)


@triton.jit(do_not_specialize=_RUN_TIME_VALUES)
def backward_p_kernel(
    queries_ptr, weights_ptr, argmax_ptr, query_of_row_ptr, passage_offsets_ptr, grad_passages_ptr,
    query_rows, passages, width,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N values of the gradients of BLOCK_M passage rows, over all query rows BLOCK_K at a time."""
    passage, begin, length, first = find_tile(passage_offsets_ptr, passages, BLOCK_M)
    if first >= length:
        return
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    part = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part_ok = part < width
    query_ptrs = queries_ptr + columns[:, None] * width + part[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, query_rows, BLOCK_K):
        column_ok = start + columns < query_rows
        query_row = (start + columns).to(tl.int64)
        winner = tl.load(argmax_ptr + query_row * passages + passage, mask=column_ok, other=-1)
        query = tl.load(query_of_row_ptr + query_row, mask=column_ok, other=0)
        weight = tl.load(weights_ptr + query.to(tl.int64) * passages + passage, mask=column_ok, other=0.0)
        chose_me = winner[None, :] == (begin + first + rows)[:, None]
        one_hot = tl.where(chose_me, weight[None, :], 0.0)
        query_tile = tl.load(query_ptrs, mask=column_ok[:, None] & part_ok[None, :], other=0.0)
        if queries_ptr.dtype.element_ty == tl.float32:
            sums = tl.dot(one_hot, query_tile, sums, input_precision=PRECISION)
        else:
            sums = tl.dot(one_hot, query_tile.to(tl.float32), sums, input_precision="tf32")
        query_ptrs += BLOCK_K * width
    pointers = grad_passages_ptr + (begin + first).to(tl.int64) * width + rows[:, None] * width + part[None, :]
    mask = (first + rows < length)[:, None] & part_ok[None, :]
    tl.store(pointers, sums.to(grad_passages_ptr.dtype.element_ty), mask=mask)
