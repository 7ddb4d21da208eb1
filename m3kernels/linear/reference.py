"""Plain PyTorch meaning of the linear layers, LayerNorm and embeddings, in any float dtype, differentiable.

    linear        gelu(x weightᵀ + bias) + residual, the GELU exact: u Φ(u)     (Hendrycks and Gimpel, arXiv 1606.08415)
    of int8       u[t, n] = row_scale[t] · scale[n] · Σ_k (code_x[t, k] - zero[t]) · code[n, k] + bias[n];
                  row_scale[t] = (high - low) / 255 with high = max(0, x[t]), low = min(0, x[t]),
                  zero[t] = round(-low / row_scale), code_x = round(x / row_scale + zero), 0 ... 255
    layer_norm    (s - mean) / sqrt(variance + eps) · weight + bias,  s = x + residual     (Ba et al., arXiv 1607.06450)
    embed_tokens  layer_norm(words[id] + positions[first_position + index within the sequence] + type_row)

float16 and bfloat16 are summed in float32 and rounded once, as the kernels do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from m3kernels.linear.packed import PackedLinear
from m3kernels.packing import sequence_of_row

MOST_ACTIVATION_CODE = 255.0


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, residual: Tensor | None) -> Tensor:
    dtype = _sum_dtype(x)
    return _finished(x.to(dtype) @ weight.to(dtype).t(), x, bias, gelu, residual)


def linear_packed(x: Tensor, weight: PackedLinear, bias: Tensor | None, gelu: bool, residual: Tensor | None) -> Tensor:
    if weight.scales is None:
        return linear(x, weight.unpack(), bias, gelu, residual)
    dtype = _sum_dtype(x)
    codes, row_scales = quantize_activations(x)
    # Sums of integers below 2^31 are exact in float64.
    sums = (codes.double() @ weight.codes().double().t()).to(dtype)
    return _finished(sums * (weight.scales.to(dtype) * row_scales[:, None].to(dtype)), x, bias, gelu, residual)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes of rows x [T, K] less the row's zero, as floats, and float32 scales [T]: NaN for a row that holds a
    NaN or an infinity."""
    values = x.float()
    low = -values.amin(dim=1).clamp(max=0)
    span = values.amax(dim=1).clamp(min=0) + low
    inverse = MOST_ACTIVATION_CODE / torch.where(span > 0, span, 1.0)
    zeros = (low * inverse).round()[:, None]
    codes = (values * inverse[:, None] + zeros).clamp(0, MOST_ACTIVATION_CODE).round() - zeros
    odd = ~torch.isfinite(values).all(dim=1)
    scales = torch.where(odd, torch.nan, span / MOST_ACTIVATION_CODE)
    return torch.where(odd[:, None], 0.0, codes), scales


def _finished(sums: Tensor, x: Tensor, bias: Tensor | None, gelu: bool, residual: Tensor | None) -> Tensor:
    if bias is not None:
        sums = sums + bias.to(sums.dtype)
    if gelu:
        sums = F.gelu(sums)
    if residual is not None:
        sums = sums + residual.to(sums.dtype)
    return sums.to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float) -> Tensor:
    dtype = _sum_dtype(x)
    summed = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
    return F.layer_norm(summed, summed.shape[1:], weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to s = x + residual, weight and bias: with h = (s - mean) / sqrt(variance + eps), g = grad · weight,
    ds = (g - mean(g) - h · mean(g · h)) / sqrt(variance + eps)."""
    dtype = _sum_dtype(x)
    summed = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
    centred = summed - summed.mean(dim=1, keepdim=True)
    factor = torch.rsqrt(centred.square().mean(dim=1, keepdim=True) + eps)
    normal = centred * factor
    upper = grad.to(dtype)
    g = upper * weight.to(dtype)
    grad_sum = factor * (g - g.mean(dim=1, keepdim=True) - normal * (g * normal).mean(dim=1, keepdim=True))
    return grad_sum.to(x.dtype), (upper * normal).sum(0).to(weight.dtype), upper.sum(0).to(weight.dtype)


def embed_tokens(
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
    total = token_ids.shape[0]
    index = torch.arange(total, device=offsets.device) - offsets.long()[sequence_of_row(offsets, total)]
    dtype = _sum_dtype(words)
    summed = F.embedding(token_ids, words).to(dtype) + type_row.to(dtype)
    summed = summed + F.embedding(index + first_position, positions).to(dtype)
    return layer_norm(summed, weight, bias, None, eps).to(words.dtype)
