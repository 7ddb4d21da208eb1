"""Registration of `m3::flash_attention_forward` and its gradient: schema, fake, autograd, dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3kernels import _library, gpu_support
from m3kernels._checks import check_offset_values
from m3kernels.attention import reference

_OPTIONS = "SymInt max_length, float scale, float? keep_probability, float dropout_p, int seed, bool allow_tf32"
_library.define(
    f"flash_attention_forward(Tensor q, Tensor k, Tensor v, Tensor offsets, {_OPTIONS}) -> (Tensor, Tensor)"
)
_library.define(
    "flash_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sum_exp,"
    f" Tensor offsets, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)


def _forward_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_length: int,
    scale: float,
    keep_probability: float | None,
    dropout_p: float,
    seed: int,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    check_offset_values("offsets", offsets, q.shape[0])
    kernel = _library.cpu_kernel("flash_attention_forward")
    if kernel is None or q.dtype == torch.float64:
        return reference.flash_attention_varlen(q, k, v, offsets, scale, keep_probability, dropout_p, seed)
    result: tuple[Tensor, Tensor] = kernel(q, k, v, offsets, scale, keep_probability, dropout_p, seed)
    return result


def _backward_cpu(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    offsets: Tensor,
    max_length: int,
    scale: float,
    keep_probability: float | None,
    dropout_p: float,
    seed: int,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (grad_out, q, k, v, out, log_sum_exp, offsets, scale, keep_probability, dropout_p, seed)
    kernel = _library.cpu_kernel("flash_attention_backward")
    if kernel is None or q.dtype == torch.float64:
        return reference.flash_attention_varlen_backward(*arguments)
    result: tuple[Tensor, Tensor, Tensor] = kernel(*arguments)
    return result


def _forward_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_length: int,
    scale: float,
    keep_probability: float | None,
    dropout_p: float,
    seed: int,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    if q.dtype == torch.float64 or gpu_support.reference_wanted():
        return reference.flash_attention_varlen(q, k, v, offsets, scale, keep_probability, dropout_p, seed)
    kernels, tiles = gpu_support.triton_kernels("attention", q.device)
    options = kernels.Options(scale, keep_probability, dropout_p, seed, allow_tf32)
    with torch.cuda.device(q.device):
        result: tuple[Tensor, Tensor] = kernels.forward(q, k, v, offsets, options, tiles)
    return result


def _backward_cuda(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    offsets: Tensor,
    max_length: int,
    scale: float,
    keep_probability: float | None,
    dropout_p: float,
    seed: int,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (grad_out, q, k, v, out, log_sum_exp, offsets)
    if q.dtype == torch.float64 or gpu_support.reference_wanted():
        return reference.flash_attention_varlen_backward(*tensors, scale, keep_probability, dropout_p, seed)
    kernels, tiles = gpu_support.triton_kernels("attention", q.device)
    options = kernels.Options(scale, keep_probability, dropout_p, seed, allow_tf32)
    with torch.cuda.device(q.device):
        grads: tuple[Tensor, Tensor, Tensor] = kernels.backward(*tensors, options, tiles)
    return grads


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *_options: Any) -> tuple[Tensor, Tensor]:
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty((q.shape[1], q.shape[0]), dtype=sums)


def _backward_fake(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    return grads[0], grads[1], grads[2]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, offsets, *ctx.options = inputs
    out, log_sum_exp = output
    ctx.mark_non_differentiable(log_sum_exp)
    ctx.save_for_backward(q, k, v, out, log_sum_exp, offsets)


def _autograd_backward(ctx: Any, grad_out: Tensor, _grad_log_sum_exp: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, log_sum_exp, offsets = ctx.saved_tensors
    grads = torch.ops.m3.flash_attention_backward(grad_out, q, k, v, out, log_sum_exp, offsets, *ctx.options)
    return (*grads, None, *(None for _ in ctx.options))


_library.implement("flash_attention_forward", "CPU", _forward_cpu)
_library.implement("flash_attention_backward", "CPU", _backward_cpu)
_library.implement("flash_attention_forward", "CUDA", _forward_cuda)
_library.implement("flash_attention_backward", "CUDA", _backward_cuda)
torch.library.register_fake("m3::flash_attention_forward", _forward_fake, lib=_library.LIBRARY)
torch.library.register_fake("m3::flash_attention_backward", _backward_fake, lib=_library.LIBRARY)
torch.library.register_autograd(
    "m3::flash_attention_forward", _autograd_backward, setup_context=_setup_context, lib=_library.LIBRARY
)
