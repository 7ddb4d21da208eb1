"""Packed rows and offsets, the one convention for batches of texts, and the way to and from padded tensors.

T rows of N sequences lie one after another; sequence i owns rows offsets[i]:offsets[i + 1] of `rows` [T, ...].
(flash-attention calls offsets `cu_seqlens`.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3kernels import _library, gpu_support
from m3kernels._checks import FLOAT_DTYPES, check_offset_values, check_offsets

__all__ = ["offsets_from_lengths", "pack", "sequence_of_row", "unpack"]

_PACKED_DTYPES = (*FLOAT_DTYPES, torch.int32, torch.int64, torch.bool)

_library.define("pack(Tensor padded, Tensor offsets, SymInt total_rows) -> Tensor")
_library.define("unpack(Tensor rows, Tensor offsets, SymInt max_length) -> Tensor")


def offsets_from_lengths(lengths: Tensor, *, limit: int | None = None) -> Tensor:
    """Offsets int32 [N + 1] of sequences with `lengths`, integer [N], on the device of `lengths`.

    Raises:
        TypeError: lengths are not integers.
        ValueError: on the CPU, a length below 0 or above `limit`.
    """
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64) or lengths.dim() != 1:
        given = f"{lengths.dtype} {tuple(lengths.shape)}" if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths must be an int32 or int64 tensor of one dimension, got {given}")
    if lengths.device.type == "cpu" and lengths.numel() and not torch.compiler.is_compiling():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or (limit is not None and high > limit):
            raise ValueError(f"lengths run from {low} to {high}; accepted: 0 to {'any' if limit is None else limit}")
    return torch.nn.functional.pad(torch.cumsum(lengths, 0, dtype=torch.int32), (1, 0))


def sequence_of_row(offsets: Tensor, total_rows: int) -> Tensor:
    """Which sequence each row belongs to: int64 [total_rows], without a synchronisation with the host."""
    rows = torch.arange(total_rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[1:].contiguous(), rows, right=True)


def pack(padded: Tensor, offsets: Tensor, total_rows: int | None = None) -> Tensor:
    """Rows [T, ...] of a padded tensor [N, L, ...]: the first offsets[i + 1] - offsets[i] rows of each sequence.

    Args:
        padded: [N, L, ...], floating, integer or bool.
        offsets: int32 [N + 1] on the same device.
        total_rows: T = offsets[N]. Left out, it is read from `offsets`, which makes the host wait for a GPU.

    Returns:
        [T, ...], differentiable in `padded`.

    Raises:
        TypeError: dtypes other than those above.
        ValueError: offsets do not fit `padded` (by value on the CPU).
    """
    if not isinstance(padded, Tensor) or padded.dtype not in _PACKED_DTYPES:
        raise TypeError(f"padded must be a tensor of a floating, int32, int64 or bool dtype, got {_describe(padded)}")
    if padded.dim() < 2:
        raise ValueError(f"padded must have shape [N, L, ...], got {tuple(padded.shape)}")
    check_offsets("offsets", offsets, padded.device)
    if offsets.shape[0] != padded.shape[0] + 1:
        raise ValueError(
            f"offsets has {offsets.shape[0]} entries; accepted: {padded.shape[0] + 1}, one more than sequences"
        )
    total = int(offsets[-1]) if total_rows is None else total_rows
    packed: Tensor = torch.ops.m3.pack(padded, offsets, total)
    return packed


def unpack(rows: Tensor, offsets: Tensor, max_length: int | None = None) -> Tensor:
    """Padded [N, max_length, ...] of packed rows [T, ...]; what lies past the end of a sequence is 0.

    Args:
        rows: [T, ...], floating, integer or bool.
        offsets: int32 [N + 1] on the same device.
        max_length: L of the result, at least the longest sequence. Left out, it is read from `offsets`, which makes the
            host wait for a GPU.

    Returns:
        [N, L, ...], differentiable in `rows`.

    Raises:
        TypeError: dtypes other than those above.
        ValueError: offsets do not fit `rows`, or a sequence is longer than max_length (by value on the CPU).
    """
    if not isinstance(rows, Tensor) or rows.dtype not in _PACKED_DTYPES:
        raise TypeError(f"rows must be a tensor of a floating, int32, int64 or bool dtype, got {_describe(rows)}")
    if rows.dim() < 1:
        raise ValueError("rows must have shape [T, ...], got a scalar")
    check_offsets("offsets", offsets, rows.device)
    if max_length is None:
        max_length = int(offsets.diff().max()) if offsets.shape[0] > 1 else 0
    padded: Tensor = torch.ops.m3.unpack(rows, offsets, max_length)
    return padded


def _describe(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _pack_reference(padded: Tensor, offsets: Tensor, total_rows: int) -> Tensor:
    sequence = sequence_of_row(offsets, total_rows)
    position = torch.arange(total_rows, device=padded.device) - offsets.long()[sequence]
    return padded[sequence, position]


def _unpack_reference(rows: Tensor, offsets: Tensor, max_length: int) -> Tensor:
    padded = rows.new_zeros((offsets.shape[0] - 1, max_length, *rows.shape[1:]))
    sequence = sequence_of_row(offsets, rows.shape[0])
    position = torch.arange(rows.shape[0], device=rows.device) - offsets.long()[sequence]
    padded[sequence, position] = rows
    return padded


def _check_lengths(offsets: Tensor, total_rows: int, max_length: int) -> None:
    check_offset_values("offsets", offsets, total_rows)
    longest = int(offsets.diff().max()) if offsets.shape[0] > 1 else 0
    if longest > max_length:
        raise ValueError(f"offsets hold a sequence of {longest} rows; accepted: at most {max_length}")


def _pack_cpu(padded: Tensor, offsets: Tensor, total_rows: int) -> Tensor:
    _check_lengths(offsets, total_rows, padded.shape[1])
    kernel = _library.cpu_kernel("pack") or _pack_reference
    packed: Tensor = kernel(padded.contiguous(), offsets.contiguous(), total_rows)
    return packed


def _unpack_cpu(rows: Tensor, offsets: Tensor, max_length: int) -> Tensor:
    _check_lengths(offsets, rows.shape[0], max_length)
    kernel = _library.cpu_kernel("unpack") or _unpack_reference
    padded: Tensor = kernel(rows.contiguous(), offsets.contiguous(), max_length)
    return padded


def _pack_cuda(padded: Tensor, offsets: Tensor, total_rows: int) -> Tensor:
    if gpu_support.reference_wanted():
        return _pack_reference(padded, offsets, total_rows)
    kernel = gpu_support.cuda_kernel("pack", padded.device)
    packed: Tensor = kernel(padded.contiguous(), offsets.contiguous(), total_rows)
    return packed


def _unpack_cuda(rows: Tensor, offsets: Tensor, max_length: int) -> Tensor:
    if gpu_support.reference_wanted():
        return _unpack_reference(rows, offsets, max_length)
    kernel = gpu_support.cuda_kernel("unpack", rows.device)
    padded: Tensor = kernel(rows.contiguous(), offsets.contiguous(), max_length)
    return padded


def _pack_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    padded, offsets, _ = inputs
    ctx.save_for_backward(offsets)
    ctx.max_length = padded.shape[1]


def _pack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.m3.unpack(grad, ctx.saved_tensors[0], ctx.max_length), None, None


def _unpack_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    rows, offsets, _ = inputs
    ctx.save_for_backward(offsets)
    ctx.total_rows = rows.shape[0]


def _unpack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.m3.pack(grad, ctx.saved_tensors[0], ctx.total_rows), None, None


_library.implement("pack", "CPU", _pack_cpu)
_library.implement("unpack", "CPU", _unpack_cpu)
_library.implement("pack", "CUDA", _pack_cuda)
_library.implement("unpack", "CUDA", _unpack_cuda)


@torch.library.register_fake("m3::pack", lib=_library.LIBRARY)
def _pack_fake(padded: Tensor, offsets: Tensor, total_rows: int) -> Tensor:
    return padded.new_empty((total_rows, *padded.shape[2:]))


@torch.library.register_fake("m3::unpack", lib=_library.LIBRARY)
def _unpack_fake(rows: Tensor, offsets: Tensor, max_length: int) -> Tensor:
    return rows.new_empty((offsets.shape[0] - 1, max_length, *rows.shape[1:]))


torch.library.register_autograd("m3::pack", _pack_backward, setup_context=_pack_context, lib=_library.LIBRARY)
torch.library.register_autograd("m3::unpack", _unpack_backward, setup_context=_unpack_context, lib=_library.LIBRARY)
