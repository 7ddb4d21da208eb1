"""Layers of an encoder, fused: `linear` with bias, GELU and residual, `layer_norm`, `embed_tokens`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from m3kernels._checks import check_offsets, check_tensor
from m3kernels.linear import ops as _ops  # noqa: F401  (registers the ops)
from m3kernels.linear.packed import PackedLinear, check_packed, pack_linear

__all__ = ["PackedLinear", "embed_tokens", "layer_norm", "linear", "pack_linear"]


def linear(
    x: Tensor,
    weight: Tensor | PackedLinear,
    bias: Tensor | None = None,
    *,
    activation: Literal["gelu"] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(x weightᵀ + bias) + residual; the GELU is the exact one. Sums run in float32.

    On the CPU the product, bias, activation and residual are one pass; a plain weight is packed in every call, a
    PackedLinear (`pack_linear`) was packed once. With AMX float32 numbers are multiplied in three bfloat16 parts, to
    the same precision; there each number and product is taken to the nearest 2^-126. On a GPU all parts are torch's.

    Args:
        x: rows [T, K]; float32, bfloat16, float16 (float64 through the reference).
        weight: [N, K] in the same dtype, or a PackedLinear of those sizes in any of its dtypes. With int8 weights the
            CPU rounds each row of x to 8 bits of the span of its elements; a GPU multiplies x as it is.
        bias: [N] in the dtype of x.
        activation: None or "gelu".
        residual: [T, N] in the dtype of x.

    Returns:
        [T, N] in the dtype of x, differentiable in x, bias, residual and a plain weight. A packed weight is constant,
        and the gradient takes no notice of the rounding of x.

    Raises:
        TypeError: no tensors, or dtypes not as described.
        ValueError: shapes, devices or activation not as described.
    """
    check_tensor("x", x, dims=2)
    if isinstance(weight, PackedLinear):
        check_packed("weight", weight, x.device)
        columns, depth = weight.columns, weight.depth
    else:
        check_tensor("weight", weight, dims=2, dtypes=(x.dtype,), device=x.device)
        columns, depth = weight.shape
    if depth != x.shape[1]:
        raise ValueError(f"weight has {depth} inputs, but x has width {x.shape[1]}")
    if columns == 0 or depth == 0:
        raise ValueError(f"weight has {columns} outputs and {depth} inputs; accepted: at least one of each")
    if bias is not None:
        check_tensor("bias", bias, dims=1, dtypes=(x.dtype,), device=x.device)
        if bias.shape[0] != columns:
            raise ValueError(f"bias has {bias.shape[0]} entries, but weight has {columns} outputs")
    if activation not in (None, "gelu"):
        raise ValueError(f"activation is {activation!r}; accepted: None, 'gelu'")
    if residual is not None:
        check_tensor("residual", residual, dims=2, dtypes=(x.dtype,), device=x.device)
        if residual.shape != (x.shape[0], columns):
            raise ValueError(f"residual has shape {tuple(residual.shape)}; expected {(x.shape[0], columns)}")
    gelu = activation == "gelu"
    if isinstance(weight, PackedLinear):
        out: Tensor = torch.ops.m3.linear_packed(x, weight.panels, weight.scales, weight.columns, bias, gelu, residual)
        return out
    plain: Tensor = torch.ops.m3.linear(x, weight, bias, gelu, residual)
    return plain


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """(s - mean) / sqrt(variance + eps) · weight + bias of each row of s = x + residual (Ba et al., arXiv 1607.06450).

    Args:
        x: rows [T, E]; float32, bfloat16, float16 (float64 through the reference). Sums run in float32.
        weight, bias: [E]; residual: [T, E] or None; all in the dtype of x.
        eps: above 0.

    Returns:
        [T, E] in the dtype of x, differentiable in x, weight, bias and residual.

    Raises:
        TypeError: no tensors, or dtypes not as described.
        ValueError: shapes, devices or eps not as described.
    """
    check_tensor("x", x, dims=2)
    width = x.shape[1]
    if width == 0:
        raise ValueError("x has width 0; accepted: at least 1")
    _check_normalisation(weight, bias, width, x, eps)
    if residual is not None:
        check_tensor("residual", residual, dims=2, dtypes=(x.dtype,), device=x.device)
        if residual.shape != x.shape:
            raise ValueError(f"residual has shape {tuple(residual.shape)}, but x has {tuple(x.shape)}")
    out: Tensor = torch.ops.m3.layer_norm(x, weight, bias, residual, float(eps))
    return out


@torch.no_grad()
def embed_tokens(
    token_ids: Tensor,
    offsets: Tensor,
    words: Tensor,
    positions: Tensor,
    type_row: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    first_position: int = 0,
    eps: float = 1e-5,
) -> Tensor:
    """The input of an encoder's first layer, without gradients, in one pass:

        layer_norm(words[id] + positions[first_position + index within the sequence] + type_row)

    Args:
        token_ids: int32 [T]; offsets: int32 [N + 1].
        words: [V, E]; positions: [P, E]; type_row, weight, bias: [E]; float32, bfloat16, float16 (float64 through the
            reference), all of one dtype.
        first_position: row of `positions` of a sequence's first token.
        eps: above 0.

    Returns:
        [T, E] in the dtype of the tables.

    Raises:
        TypeError: no tensors, or dtypes not as described.
        ValueError: shapes or devices not as described; on the CPU also offsets that are no offsets, ids without a row
            in `words`, a sequence longer than the positions.
    """
    check_tensor("words", words, dims=2)
    width = words.shape[1]
    check_tensor("token_ids", token_ids, dims=1, dtypes=(torch.int32,), device=words.device)
    check_offsets("offsets", offsets, words.device)
    check_tensor("positions", positions, dims=2, dtypes=(words.dtype,), device=words.device)
    if positions.shape[1] != width:
        raise ValueError(f"positions has width {positions.shape[1]}, but words has {width}")
    _check_entries("type_row", type_row, width, words)
    _check_normalisation(weight, bias, width, words, eps)
    if first_position < 0:
        raise ValueError(f"first_position is {first_position}; it cannot be negative")
    out: Tensor = torch.ops.m3.embed_tokens(
        token_ids, offsets, words, positions, type_row, weight, bias, first_position, float(eps)
    )
    return out


def _check_normalisation(weight: Tensor, bias: Tensor, width: int, like: Tensor, eps: float) -> None:
    _check_entries("weight", weight, width, like)
    _check_entries("bias", bias, width, like)
    if not eps > 0:
        raise ValueError(f"eps is {eps}; accepted: above 0")


def _check_entries(name: str, value: Tensor, width: int, like: Tensor) -> None:
    check_tensor(name, value, dims=1, dtypes=(like.dtype,), device=like.device)
    if value.shape[0] != width:
        raise ValueError(f"{name} has {value.shape[0]} entries; expected {width}")
