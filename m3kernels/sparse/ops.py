"""Registration of the sparse ops `m3::sparse_pool`, `m3::sparse_embed`, `m3::sparse_scores` and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3kernels import _library
from m3kernels._checks import check_offset_values
from m3kernels.sparse import reference

_ENTRIES = "(Tensor weights, Tensor token_ids, Tensor offsets, Tensor rows)"
_SIDES = (
    "Tensor query_ids, Tensor query_weights, Tensor query_offsets,"
    " Tensor passage_ids, Tensor passage_weights, Tensor passage_offsets"
)
_library.define(f"sparse_pool(Tensor token_weights, Tensor token_ids, Tensor offsets, int[] ignored_ids) -> {_ENTRIES}")
_library.define("sparse_pool_backward(Tensor grad_weights, Tensor rows) -> Tensor")
_library.define(
    "sparse_embed(Tensor hidden, Tensor weight, Tensor bias, Tensor token_ids, Tensor offsets, int[] ignored_ids)"
    f" -> {_ENTRIES}"
)
_library.define(
    "sparse_embed_backward(Tensor grad_weights, Tensor hidden, Tensor weight, Tensor rows) -> (Tensor, Tensor, Tensor)"
)
_library.define(f"sparse_scores({_SIDES}) -> Tensor")
_library.define(f"sparse_scores_backward(Tensor grad, {_SIDES}) -> (Tensor, Tensor)")

Entries = tuple[Tensor, Tensor, Tensor, Tensor]


def _pool_cpu(token_weights: Tensor, token_ids: Tensor, offsets: Tensor, ignored_ids: list[int]) -> Entries:
    check_offset_values("offsets", offsets, token_weights.shape[0])
    return reference.sparse_pool(token_weights, token_ids, offsets, ignored_ids)


def _pool_backward_cpu(grad_weights: Tensor, rows: Tensor) -> Tensor:
    return reference.sparse_pool_backward(grad_weights, rows)


def _embed_cpu(
    hidden: Tensor, weight: Tensor, bias: Tensor, token_ids: Tensor, offsets: Tensor, ignored_ids: list[int]
) -> Entries:
    check_offset_values("offsets", offsets, hidden.shape[0])
    return reference.sparse_embed(hidden, weight, bias, token_ids, offsets, ignored_ids)


def _embed_backward_cpu(
    grad_weights: Tensor, hidden: Tensor, weight: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.sparse_embed_backward(grad_weights, hidden, weight, rows)


def _scores_cpu(*sides: Tensor) -> Tensor:
    return reference.sparse_scores(*sides)


def _scores_backward_cpu(grad: Tensor, *sides: Tensor) -> tuple[Tensor, Tensor]:
    return reference.sparse_scores_backward(grad, *sides)


for _name, _function in (
    ("sparse_pool", _pool_cpu),
    ("sparse_pool_backward", _pool_backward_cpu),
    ("sparse_embed", _embed_cpu),
    ("sparse_embed_backward", _embed_backward_cpu),
    ("sparse_scores", _scores_cpu),
    ("sparse_scores_backward", _scores_backward_cpu),
):
    _library.implement(_name, "CPU", _function)


def _entries_fake(weights: Tensor, offsets: Tensor, total: int) -> Entries:
    ids = offsets.new_empty((total,))
    return weights.new_empty((total,)), ids, torch.empty_like(offsets), torch.empty_like(ids)


@torch.library.register_fake("m3::sparse_pool", lib=_library.LIBRARY)
def _pool_fake(token_weights: Tensor, token_ids: Tensor, offsets: Tensor, ignored_ids: list[int]) -> Entries:
    return _entries_fake(token_weights, offsets, token_weights.shape[0])


@torch.library.register_fake("m3::sparse_pool_backward", lib=_library.LIBRARY)
def _pool_backward_fake(grad_weights: Tensor, rows: Tensor) -> Tensor:
    return torch.empty_like(grad_weights)


@torch.library.register_fake("m3::sparse_embed", lib=_library.LIBRARY)
def _embed_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor, token_ids: Tensor, offsets: Tensor, ignored_ids: list[int]
) -> Entries:
    return _entries_fake(hidden, offsets, hidden.shape[0])


@torch.library.register_fake("m3::sparse_embed_backward", lib=_library.LIBRARY)
def _embed_backward_fake(
    grad_weights: Tensor, hidden: Tensor, weight: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(weight), weight.new_empty((1,))


@torch.library.register_fake("m3::sparse_scores", lib=_library.LIBRARY)
def _scores_fake(
    query_ids: Tensor,
    query_weights: Tensor,
    query_offsets: Tensor,
    passage_ids: Tensor,
    passage_weights: Tensor,
    passage_offsets: Tensor,
) -> Tensor:
    dtype = torch.float64 if query_weights.dtype == torch.float64 else torch.float32
    return query_weights.new_empty((query_offsets.shape[0] - 1, passage_offsets.shape[0] - 1), dtype=dtype)


@torch.library.register_fake("m3::sparse_scores_backward", lib=_library.LIBRARY)
def _scores_backward_fake(
    grad: Tensor,
    query_ids: Tensor,
    query_weights: Tensor,
    query_offsets: Tensor,
    passage_ids: Tensor,
    passage_weights: Tensor,
    passage_offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query_weights), torch.empty_like(passage_weights)


def _pool_context(ctx: Any, inputs: tuple[Any, ...], output: Entries) -> None:
    _, ids, offsets, rows = output
    ctx.mark_non_differentiable(ids, offsets, rows)
    ctx.save_for_backward(rows)


def _pool_autograd(ctx: Any, grad_weights: Tensor, *_rest: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.m3.sparse_pool_backward(grad_weights, *ctx.saved_tensors), None, None, None


def _embed_context(ctx: Any, inputs: tuple[Any, ...], output: Entries) -> None:
    hidden, weight, *_ = inputs
    _, ids, offsets, rows = output
    ctx.mark_non_differentiable(ids, offsets, rows)
    ctx.save_for_backward(hidden, weight, rows)


def _embed_autograd(ctx: Any, grad_weights: Tensor, *_rest: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.m3.sparse_embed_backward(grad_weights, *ctx.saved_tensors), None, None, None)


def _scores_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _scores_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_queries, grad_passages = torch.ops.m3.sparse_scores_backward(grad, *ctx.saved_tensors)
    return None, grad_queries, None, None, grad_passages, None


for _name, _backward, _context in (
    ("sparse_pool", _pool_autograd, _pool_context),
    ("sparse_embed", _embed_autograd, _embed_context),
    ("sparse_scores", _scores_autograd, _scores_context),
):
    torch.library.register_autograd(f"m3::{_name}", _backward, setup_context=_context, lib=_library.LIBRARY)
