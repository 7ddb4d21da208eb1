"""Registration of `m3::maxsim_forward`, `m3::maxsim_pairs_forward` with gradients, and both on quantized passages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3kernels import _library, gpu_support
from m3kernels._checks import check_offset_values
from m3kernels.maxsim import mapped, reference
from m3kernels.maxsim.quantized import QuantizedRows

_ROWS = "Tensor queries, Tensor passages, Tensor query_offsets, Tensor passage_offsets"
_library.define(
    f"maxsim_forward({_ROWS}, Tensor? zero_floor, bool mean, bool save_argmax, bool allow_tf32) -> (Tensor, Tensor)"
)
_library.define(
    f"maxsim_backward(Tensor grad, {_ROWS}, Tensor? zero_floor, Tensor argmax, bool mean, bool allow_tf32)"
    " -> (Tensor, Tensor)"
)
_library.define(
    f"maxsim_pairs_forward({_ROWS}, Tensor pairs, Tensor? zero_floor, bool mean, bool allow_tf32) -> Tensor"
)
_library.define(
    f"maxsim_pairs_backward(Tensor grad, {_ROWS}, Tensor pairs, Tensor? zero_floor, bool mean, bool allow_tf32)"
    " -> (Tensor, Tensor)"
)
_QUANTIZED = "Tensor queries, Tensor codes, Tensor scales, Tensor query_offsets, Tensor passage_offsets"
_library.define(f"maxsim_quantized({_QUANTIZED}, Tensor? zero_floor, int bits, bool mean) -> Tensor")
_library.define(
    f"maxsim_pairs_quantized({_QUANTIZED}, Tensor pairs, Tensor? zero_floor, int bits, bool mean) -> Tensor"
)


def _check_values(queries: Tensor, passages: Tensor, query_offsets: Tensor, passage_offsets: Tensor) -> None:
    check_offset_values("query_offsets", query_offsets, queries.shape[0])
    check_offset_values("passage_offsets", passage_offsets, passages.shape[0])


def _check_pairs(pairs: Tensor, query_offsets: Tensor, passage_offsets: Tensor) -> None:
    for column, (side, offsets) in enumerate((("queries", query_offsets), ("passages", passage_offsets))):
        numbers = pairs[:, column].numpy()
        count = offsets.shape[0] - 1
        if numbers.size and (numbers.min() < 0 or numbers.max() >= count):
            raise ValueError(
                f"pairs[:, {column}] runs from {numbers.min()} to {numbers.max()}, but there are {count} {side}"
            )


def _forward_cpu(
    queries: Tensor,
    passages: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    zero_floor: Tensor | None,
    mean: bool,
    save_argmax: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    _check_values(queries, passages, query_offsets, passage_offsets)
    rows = (queries, passages, query_offsets, passage_offsets)
    kernel = _library.cpu_kernel("maxsim_forward")
    if kernel is None or queries.dtype == torch.float64:
        scores, argmax = reference.maxsim(*rows, zero_floor, mean)
        return scores, argmax if save_argmax else argmax[:0].clone()
    if save_argmax:
        result: tuple[Tensor, Tensor] = kernel(*rows, zero_floor, mean, True)
        return result
    parts = [
        kernel(
            queries,
            mapped.window_rows(passages, passage_offsets, *window),
            query_offsets,
            mapped.shifted_offsets(passage_offsets, *window),
            mapped.window_floor(zero_floor, *window),
            mean,
            False,
        )[0]
        for window in mapped.windows(passages, passage_offsets)
    ]
    return mapped.join(parts), query_offsets.new_empty((0, passage_offsets.shape[0] - 1))


def _backward_cpu(
    grad: Tensor,
    queries: Tensor,
    passages: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    zero_floor: Tensor | None,
    argmax: Tensor,
    mean: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    rows = (queries, passages, query_offsets, passage_offsets)
    if argmax.shape[0] != queries.shape[0]:
        argmax = _forward_cpu(*rows, zero_floor, mean, True, allow_tf32)[1]
    kernel = _library.cpu_kernel("maxsim_backward")
    if kernel is None or queries.dtype == torch.float64:
        return reference.maxsim_backward(grad, *rows, argmax, mean)
    result: tuple[Tensor, Tensor] = kernel(grad, *rows, argmax, mean)
    return result


def _pairs_forward_cpu(
    queries: Tensor,
    passages: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    pairs: Tensor,
    zero_floor: Tensor | None,
    mean: bool,
    allow_tf32: bool,
) -> Tensor:
    _check_values(queries, passages, query_offsets, passage_offsets)
    _check_pairs(pairs, query_offsets, passage_offsets)
    rows = (queries, passages, query_offsets, passage_offsets)
    kernel = _library.cpu_kernel("maxsim_pairs_forward")
    if kernel is None or queries.dtype == torch.float64:
        return reference.maxsim_pairs(*rows, pairs, zero_floor, mean)
    scores: Tensor = kernel(*rows, pairs, zero_floor, mean)
    return scores


def _pairs_backward_cpu(
    grad: Tensor,
    queries: Tensor,
    passages: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    pairs: Tensor,
    zero_floor: Tensor | None,
    mean: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    rows = (queries, passages, query_offsets, passage_offsets)
    kernel = _library.cpu_kernel("maxsim_pairs_backward")
    if kernel is None or queries.dtype == torch.float64:
        return reference.maxsim_pairs_backward(grad, *rows, pairs, zero_floor, mean)
    result: tuple[Tensor, Tensor] = kernel(grad, *rows, pairs, zero_floor, mean)
    return result


def _quantized_cpu(
    queries: Tensor,
    codes: Tensor,
    scales: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    zero_floor: Tensor | None,
    bits: int,
    mean: bool,
) -> Tensor:
    _check_values(queries, codes, query_offsets, passage_offsets)
    kernel = _library.cpu_kernel("maxsim_quantized")
    if kernel is None or queries.dtype == torch.float64:
        return _quantized_by_floats(queries, codes, scales, query_offsets, passage_offsets, zero_floor, bits, mean)
    parts = [
        kernel(
            queries,
            mapped.window_rows(codes, passage_offsets, *window),
            mapped.window_rows(scales, passage_offsets, *window),
            query_offsets,
            mapped.shifted_offsets(passage_offsets, *window),
            mapped.window_floor(zero_floor, *window),
            bits,
            mean,
        )
        for window in mapped.windows(codes, passage_offsets)
    ]
    return mapped.join(parts)


def _pairs_quantized_cpu(
    queries: Tensor,
    codes: Tensor,
    scales: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    pairs: Tensor,
    zero_floor: Tensor | None,
    bits: int,
    mean: bool,
) -> Tensor:
    _check_values(queries, codes, query_offsets, passage_offsets)
    _check_pairs(pairs, query_offsets, passage_offsets)
    arguments = (queries, codes, scales, query_offsets, passage_offsets, pairs, zero_floor, bits, mean)
    kernel = _library.cpu_kernel("maxsim_pairs_quantized")
    if kernel is None or queries.dtype == torch.float64:
        return _pairs_quantized_by_floats(*arguments)
    scores: Tensor = kernel(*arguments)
    return scores


def _quantized_by_floats(
    queries: Tensor,
    codes: Tensor,
    scales: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    zero_floor: Tensor | None,
    bits: int,
    mean: bool,
) -> Tensor:
    """Scores of the rows that the codes stand for; holds them all in the dtype of the queries."""
    passages = QuantizedRows(codes, scales, bits).dequantize().to(queries.dtype)
    rows = (queries, passages, query_offsets, passage_offsets)
    scores: Tensor = torch.ops.m3.maxsim_forward(*rows, zero_floor, mean, False, False)[0]
    return scores


def _pairs_quantized_by_floats(
    queries: Tensor,
    codes: Tensor,
    scales: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    pairs: Tensor,
    zero_floor: Tensor | None,
    bits: int,
    mean: bool,
) -> Tensor:
    """Scores of the rows that the codes stand for; holds them all in the dtype of the queries."""
    passages = QuantizedRows(codes, scales, bits).dequantize().to(queries.dtype)
    rows = (queries, passages, query_offsets, passage_offsets)
    scores: Tensor = torch.ops.m3.maxsim_pairs_forward(*rows, pairs, zero_floor, mean, False)
    return scores


def _forward_cuda(
    queries: Tensor,
    passages: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    zero_floor: Tensor | None,
    mean: bool,
    save_argmax: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    rows = (queries, passages, query_offsets, passage_offsets)
    if queries.dtype == torch.float64 or gpu_support.reference_wanted():
        scores, argmax = reference.maxsim(*rows, zero_floor, mean)
        return scores, argmax if save_argmax else argmax[:0].clone()
    kernels, tiles = gpu_support.triton_kernels("maxsim", queries.device)
    with torch.cuda.device(queries.device):
        result: tuple[Tensor, Tensor] = kernels.forward(*rows, zero_floor, mean, save_argmax, allow_tf32, tiles)
    return result


def _backward_cuda(
    grad: Tensor,
    queries: Tensor,
    passages: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    zero_floor: Tensor | None,
    argmax: Tensor,
    mean: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    rows = (queries, passages, query_offsets, passage_offsets)
    if queries.dtype == torch.float64 or gpu_support.reference_wanted():
        if argmax.shape[0] != queries.shape[0]:
            argmax = reference.maxsim(*rows, zero_floor, mean)[1]
        return reference.maxsim_backward(grad, *rows, argmax, mean)
    kernels, tiles = gpu_support.triton_kernels("maxsim", queries.device)
    with torch.cuda.device(queries.device):
        grads: tuple[Tensor, Tensor] = kernels.backward(grad, *rows, zero_floor, argmax, mean, allow_tf32, tiles)
    return grads


def _pairs_forward_cuda(
    queries: Tensor,
    passages: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    pairs: Tensor,
    zero_floor: Tensor | None,
    mean: bool,
    allow_tf32: bool,
) -> Tensor:
    rows = (queries, passages, query_offsets, passage_offsets)
    if queries.dtype == torch.float64 or gpu_support.reference_wanted():
        return reference.maxsim_pairs(*rows, pairs, zero_floor, mean)
    kernels, tiles = gpu_support.triton_kernels("maxsim", queries.device)
    with torch.cuda.device(queries.device):
        scores: Tensor = kernels.pairs_forward(*rows, pairs, zero_floor, mean, allow_tf32, tiles)
    return scores


def _pairs_backward_cuda(
    grad: Tensor,
    queries: Tensor,
    passages: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    pairs: Tensor,
    zero_floor: Tensor | None,
    mean: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    rows = (queries, passages, query_offsets, passage_offsets)
    if queries.dtype == torch.float64 or gpu_support.reference_wanted():
        return reference.maxsim_pairs_backward(grad, *rows, pairs, zero_floor, mean)
    kernels, tiles = gpu_support.triton_kernels("maxsim", queries.device)
    with torch.cuda.device(queries.device):
        grads: tuple[Tensor, Tensor] = kernels.pairs_backward(grad, *rows, pairs, zero_floor, mean, allow_tf32, tiles)
    return grads


for _name, _function in (
    ("maxsim_forward", _forward_cuda),
    ("maxsim_backward", _backward_cuda),
    ("maxsim_pairs_forward", _pairs_forward_cuda),
    ("maxsim_pairs_backward", _pairs_backward_cuda),
    ("maxsim_quantized", _quantized_by_floats),
    ("maxsim_pairs_quantized", _pairs_quantized_by_floats),
):
    _library.implement(_name, "CUDA", _function)

for _name, _function in (
    ("maxsim_forward", _forward_cpu),
    ("maxsim_backward", _backward_cpu),
    ("maxsim_pairs_forward", _pairs_forward_cpu),
    ("maxsim_pairs_backward", _pairs_backward_cpu),
    ("maxsim_quantized", _quantized_cpu),
    ("maxsim_pairs_quantized", _pairs_quantized_cpu),
):
    _library.implement(_name, "CPU", _function)


def _score_dtype(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


@torch.library.register_fake("m3::maxsim_forward", lib=_library.LIBRARY)
def _forward_fake(
    queries: Tensor,
    passages: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    zero_floor: Tensor | None,
    mean: bool,
    save_argmax: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    count = passage_offsets.shape[0] - 1
    scores = queries.new_empty((query_offsets.shape[0] - 1, count), dtype=_score_dtype(queries))
    return scores, query_offsets.new_empty((queries.shape[0] if save_argmax else 0, count))


@torch.library.register_fake("m3::maxsim_backward", lib=_library.LIBRARY)
def _backward_fake(grad: Tensor, queries: Tensor, passages: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(queries), torch.empty_like(passages)


@torch.library.register_fake("m3::maxsim_pairs_forward", lib=_library.LIBRARY)
def _pairs_forward_fake(
    queries: Tensor, passages: Tensor, query_offsets: Tensor, passage_offsets: Tensor, pairs: Tensor, *_options: Any
) -> Tensor:
    return queries.new_empty((pairs.shape[0],), dtype=_score_dtype(queries))


@torch.library.register_fake("m3::maxsim_pairs_backward", lib=_library.LIBRARY)
def _pairs_backward_fake(grad: Tensor, queries: Tensor, passages: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(queries), torch.empty_like(passages)


@torch.library.register_fake("m3::maxsim_quantized", lib=_library.LIBRARY)
def _quantized_fake(
    queries: Tensor, codes: Tensor, scales: Tensor, query_offsets: Tensor, passage_offsets: Tensor, *_options: Any
) -> Tensor:
    shape = (query_offsets.shape[0] - 1, passage_offsets.shape[0] - 1)
    return queries.new_empty(shape, dtype=_score_dtype(queries))


@torch.library.register_fake("m3::maxsim_pairs_quantized", lib=_library.LIBRARY)
def _pairs_quantized_fake(
    queries: Tensor,
    codes: Tensor,
    scales: Tensor,
    query_offsets: Tensor,
    passage_offsets: Tensor,
    pairs: Tensor,
    *_options: Any,
) -> Tensor:
    return queries.new_empty((pairs.shape[0],), dtype=_score_dtype(queries))


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    queries, passages, query_offsets, passage_offsets, zero_floor, ctx.mean, _, ctx.allow_tf32 = inputs
    argmax = output[1]
    ctx.mark_non_differentiable(argmax)
    ctx.save_for_backward(queries, passages, query_offsets, passage_offsets, zero_floor, argmax)


def _autograd(ctx: Any, grad: Tensor, _grad_argmax: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.m3.maxsim_backward(grad.contiguous(), *ctx.saved_tensors, ctx.mean, ctx.allow_tf32)
    return (*grads, None, None, None, None, None, None)


def _pairs_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.mean, ctx.allow_tf32 = inputs
    ctx.save_for_backward(*tensors)


def _pairs_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.m3.maxsim_pairs_backward(grad.contiguous(), *ctx.saved_tensors, ctx.mean, ctx.allow_tf32)
    return (*grads, None, None, None, None, None, None)


torch.library.register_autograd("m3::maxsim_forward", _autograd, setup_context=_context, lib=_library.LIBRARY)
torch.library.register_autograd(
    "m3::maxsim_pairs_forward", _pairs_autograd, setup_context=_pairs_context, lib=_library.LIBRARY
)
