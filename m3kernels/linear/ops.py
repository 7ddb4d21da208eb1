"""Registration of `m3::linear`, `m3::linear_packed`, `m3::layer_norm` and `m3::embed_tokens`.

On a GPU all of them are torch's own products and functions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3kernels import _library
from m3kernels._checks import check_offset_values
from m3kernels.linear import reference
from m3kernels.linear.packed import PackedLinear

_library.define("linear(Tensor x, Tensor weight, Tensor? bias, bool gelu, Tensor? residual) -> Tensor")
_library.define(
    "linear_packed(Tensor x, Tensor panels, Tensor? scales, int columns, Tensor? bias, bool gelu, Tensor? residual)"
    " -> Tensor"
)
_library.define("layer_norm(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps) -> Tensor")
_library.define(
    "embed_tokens(Tensor token_ids, Tensor offsets, Tensor words, Tensor positions, Tensor type_row, Tensor weight,"
    " Tensor bias, int first_position, float eps) -> Tensor"
)

LEAST_PACKED_ROWS = 32
"""Fewer rows than these do not repay the packing of plain weights; torch multiplies them as they are."""


def _linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, residual: Tensor | None) -> Tensor:
    kernel = _library.cpu_kernel("linear")
    if kernel is None or x.dtype == torch.float64 or x.shape[0] < LEAST_PACKED_ROWS:
        return reference.linear(x, weight, bias, gelu, residual)
    out: Tensor = kernel(x, weight, bias, gelu, residual)
    return out


def _linear_cuda(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, residual: Tensor | None) -> Tensor:
    out = torch.nn.functional.linear(x, weight, bias)
    if gelu:
        out = torch.nn.functional.gelu(out)
    return out if residual is None else out + residual


def _packed(x: Tensor, panels: Tensor, scales: Tensor | None, columns: int) -> PackedLinear:
    return PackedLinear(panels, scales, columns, x.shape[1])


def _linear_packed_cpu(
    x: Tensor,
    panels: Tensor,
    scales: Tensor | None,
    columns: int,
    bias: Tensor | None,
    gelu: bool,
    residual: Tensor | None,
) -> Tensor:
    kernel = _library.cpu_kernel("linear_packed")
    if kernel is None or x.dtype == torch.float64:
        return reference.linear_packed(x, _packed(x, panels, scales, columns), bias, gelu, residual)
    out: Tensor = kernel(x, panels, scales, columns, bias, gelu, residual)
    return out


def _linear_packed_cuda(
    x: Tensor,
    panels: Tensor,
    scales: Tensor | None,
    columns: int,
    bias: Tensor | None,
    gelu: bool,
    residual: Tensor | None,
) -> Tensor:
    weight = _packed(x, panels, scales, columns).unpack().to(x.dtype)
    return _linear_cuda(x, weight, bias, gelu, residual)


def _layer_norm_cpu(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float) -> Tensor:
    kernel = _library.cpu_kernel("layer_norm")
    if kernel is None or x.dtype == torch.float64:
        return reference.layer_norm(x, weight, bias, residual, eps)
    out: Tensor = kernel(x, weight, bias, residual, eps)
    return out


def _layer_norm_cuda(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float) -> Tensor:
    summed = x if residual is None else x + residual
    return torch.nn.functional.layer_norm(summed, summed.shape[1:], weight, bias, eps)


def _embed_tokens_cpu(
    token_ids: Tensor,
    offsets: Tensor,
    words: Tensor,
    positions: Tensor,
    type_row: Tensor,
    weight: Tensor,
    bias: Tensor,
    first_position: int,
    eps: float,
) -> Tensor:
    check_offset_values("offsets", offsets, token_ids.shape[0])
    if token_ids.shape[0]:
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= words.shape[0]:
            raise ValueError(f"token_ids run from {low} to {high}, but words has {words.shape[0]} rows")
        longest = int((offsets[1:] - offsets[:-1]).max())
        if first_position + longest > positions.shape[0]:
            raise ValueError(
                f"offsets has a sequence of {longest} tokens, but positions has"
                f" {positions.shape[0] - first_position} rows from {first_position} on"
            )
    arguments = (token_ids, offsets, words, positions, type_row, weight, bias, first_position, eps)
    kernel = _library.cpu_kernel("embed_tokens")
    if kernel is None or words.dtype == torch.float64:
        return reference.embed_tokens(*arguments)
    out: Tensor = kernel(*arguments)
    return out


def _linear_fake(x: Tensor, weight: Tensor, *_rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _linear_packed_fake(x: Tensor, panels: Tensor, scales: Tensor | None, columns: int, *_rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], columns))


def _layer_norm_fake(x: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _embed_tokens_fake(token_ids: Tensor, offsets: Tensor, words: Tensor, *_rest: Any) -> Tensor:
    return words.new_empty((token_ids.shape[0], words.shape[1]))


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.gelu, _residual = inputs
    ctx.save_for_backward(x, weight, bias)


def _linear_packed_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, panels, scales, ctx.columns, bias, ctx.gelu, _residual = inputs
    ctx.save_for_backward(x, panels, scales, bias)


def _grad_of_product(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """Gradient to u = x weightᵀ + bias, which is computed again where the GELU's slope depends on it."""
    if not gelu:
        return grad
    sloped: Tensor = torch.ops.aten.gelu_backward(grad, torch.nn.functional.linear(x, weight, bias))
    return sloped


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _, needs_residual = ctx.needs_input_grad
    upper = _grad_of_product(grad, x, weight, bias, ctx.gelu)
    return (
        upper @ weight if needs_x else None,
        upper.t() @ x if needs_weight else None,
        upper.sum(0) if needs_bias else None,
        None,
        grad if needs_residual else None,
    )


def _linear_packed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, panels, scales, bias = ctx.saved_tensors
    needs_x, _, _, _, needs_bias, _, needs_residual = ctx.needs_input_grad
    weight = _packed(x, panels, scales, ctx.columns).unpack().to(x.dtype)
    upper = _grad_of_product(grad, x, weight, bias, ctx.gelu)
    return (
        upper @ weight if needs_x else None,
        None,
        None,
        None,
        upper.sum(0) if needs_bias else None,
        None,
        grad if needs_residual else None,
    )


def _layer_norm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _bias, residual, ctx.eps = inputs
    ctx.save_for_backward(x, weight, residual)


def _layer_norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, residual = ctx.saved_tensors
    grad_sum, grad_weight, grad_bias = reference.layer_norm_backward(grad, x, weight, residual, ctx.eps)
    return grad_sum, grad_weight, grad_bias, None if residual is None else grad_sum.clone(), None


_library.implement("linear", "CPU", _linear_cpu)
_library.implement("linear", "CUDA", _linear_cuda)
_library.implement("linear_packed", "CPU", _linear_packed_cpu)
_library.implement("linear_packed", "CUDA", _linear_packed_cuda)
_library.implement("layer_norm", "CPU", _layer_norm_cpu)
_library.implement("layer_norm", "CUDA", _layer_norm_cuda)
_library.implement("embed_tokens", "CPU", _embed_tokens_cpu)
_library.implement("embed_tokens", "CUDA", reference.embed_tokens)
for _name, _fake in (
    ("linear", _linear_fake),
    ("linear_packed", _linear_packed_fake),
    ("layer_norm", _layer_norm_fake),
    ("embed_tokens", _embed_tokens_fake),
):
    torch.library.register_fake(f"m3::{_name}", _fake, lib=_library.LIBRARY)
for _name, _backward, _context in (
    ("linear", _linear_backward, _linear_context),
    ("linear_packed", _linear_packed_backward, _linear_packed_context),
    ("layer_norm", _layer_norm_backward, _layer_norm_context),
):
    torch.library.register_autograd(f"m3::{_name}", _backward, setup_context=_context, lib=_library.LIBRARY)
