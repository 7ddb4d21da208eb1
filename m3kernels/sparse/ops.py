"""Registration of the sparse ops `m3::sparse_pool`, `m3::sparse_embed`, `m3::sparse_scores` and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from m3kernels import _library, gpu_support
from m3kernels._checks import check_offset_values
from m3kernels.sparse import reference
from m3kernels.sparse.batch import NO_ID

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


def _kernel(name: str, values: Tensor) -> Callable[..., Any]:
    """What computes op `name` for the device and dtype of `values`."""
    compiled = None
    if values.dtype != torch.float64:
        if values.device.type == "cpu":
            compiled = _library.cpu_kernel(name)
        elif not gpu_support.reference_wanted():
            compiled = gpu_support.cuda_kernel(name, values.device)
    meaning: Callable[..., Any] = getattr(reference, name)
    return meaning if compiled is None else compiled


def _check_token_values(token_ids: Tensor, offsets: Tensor) -> None:
    """Values are read on the CPU only: on a GPU the host would have to wait."""
    if token_ids.device.type != "cpu":
        return
    check_offset_values("offsets", offsets, token_ids.shape[0])
    ids = token_ids.numpy()
    if ids.size and (ids.min() < 0 or ids.max() >= NO_ID):
        raise ValueError(f"token_ids run from {ids.min()} to {ids.max()}; accepted: 0 to {NO_ID - 1}")


def check_batch_values(name: str, token_ids: Tensor, offsets: Tensor) -> None:
    """Check offsets, capacity and the order of ids of a SparseBatch; reads values, on the CPU only."""
    if token_ids.device.type != "cpu":
        return
    count = int(offsets[-1])
    check_offset_values(f"{name}.offsets", offsets, count)
    if count > token_ids.shape[0]:
        raise ValueError(f"{name}.offsets ends at {count}, but there are {token_ids.shape[0]} entries")
    ids = token_ids.numpy()[:count]
    falls = ids[1:] <= ids[:-1]
    starts = offsets.numpy()
    falls[starts[(starts > 0) & (starts < count)] - 1] = False
    if falls.any():
        at = int(falls.argmax())
        raise ValueError(f"{name}.token_ids must increase within a text, got {ids[at]}, {ids[at + 1]} at entry {at}")


def _pool(token_weights: Tensor, token_ids: Tensor, offsets: Tensor, ignored_ids: list[int]) -> Entries:
    _check_token_values(token_ids, offsets)
    tensors = (x.contiguous() for x in (token_weights, token_ids, offsets))
    entries: Entries = _kernel("sparse_pool", token_weights)(*tensors, ignored_ids)
    return entries


def _pool_backward(grad_weights: Tensor, rows: Tensor) -> Tensor:
    grad: Tensor = _kernel("sparse_pool_backward", grad_weights)(grad_weights.contiguous(), rows)
    return grad


def _embed(
    hidden: Tensor, weight: Tensor, bias: Tensor, token_ids: Tensor, offsets: Tensor, ignored_ids: list[int]
) -> Entries:
    _check_token_values(token_ids, offsets)
    tensors = (x.contiguous() for x in (hidden, weight, bias, token_ids, offsets))
    entries: Entries = _kernel("sparse_embed", hidden)(*tensors, ignored_ids)
    return entries


def _embed_backward(
    grad_weights: Tensor, hidden: Tensor, weight: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (x.contiguous() for x in (grad_weights, hidden, weight, rows))
    grads: tuple[Tensor, Tensor, Tensor] = _kernel("sparse_embed_backward", hidden)(*tensors)
    return grads


def _scores(*sides: Tensor) -> Tensor:
    check_batch_values("queries", sides[0], sides[2])
    check_batch_values("passages", sides[3], sides[5])
    scores: Tensor = _kernel("sparse_scores", sides[1])(*(x.contiguous() for x in sides))
    return scores


def _scores_backward(grad: Tensor, *sides: Tensor) -> tuple[Tensor, Tensor]:
    kernel = _kernel("sparse_scores_backward", sides[1])
    grads: tuple[Tensor, Tensor] = kernel(grad.contiguous(), *(x.contiguous() for x in sides))
    return grads


for _name, _function in (
    ("sparse_pool", _pool),
    ("sparse_pool_backward", _pool_backward),
    ("sparse_embed", _embed),
    ("sparse_embed_backward", _embed_backward),
    ("sparse_scores", _scores),
    ("sparse_scores_backward", _scores_backward),
):
    for _device in ("CPU", "CUDA"):
        _library.implement(_name, _device, _function)


def _entries_fake(weights: Tensor, offsets: Tensor, total: int) -> Entries:
    ids = offsets.new_empty((total,))
    return weights.new_empty((total,)), ids, torch.empty_like(offsets), torch.empty_like(ids)


@torch.library.register_fake("m3::sparse_pool", lib=_library.LIBRARY)
def _pool_fake(token_weights: Tensor, token_ids: Tensor, offsets: Tensor, ignored_ids: list[int]) -> Entries:
    return _entries_fake(token_weights, offsets, token_weights.shape[0])


@torch.library.register_fake("m3::sparse_pool_backward", lib=_library.LIBRARY)
def _pool_backward_fake(grad_weights: Tensor, rows: Tensor) -> Tensor:
    return grad_weights.new_empty(grad_weights.shape)


@torch.library.register_fake("m3::sparse_embed", lib=_library.LIBRARY)
def _embed_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor, token_ids: Tensor, offsets: Tensor, ignored_ids: list[int]
) -> Entries:
    return _entries_fake(hidden, offsets, hidden.shape[0])


@torch.library.register_fake("m3::sparse_embed_backward", lib=_library.LIBRARY)
def _embed_backward_fake(
    grad_weights: Tensor, hidden: Tensor, weight: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), weight.new_empty((1,))


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
    return query_weights.new_empty(query_weights.shape), passage_weights.new_empty(passage_weights.shape)


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
