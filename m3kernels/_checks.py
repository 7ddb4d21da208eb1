"""Checks of arguments shared by the ops: every message names the argument, what was given and what is accepted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(
    name: str,
    value: object,
    *,
    dims: int,
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
    device: torch.device | None = None,
) -> Tensor:
    """Return `value` if it is a tensor of `dims` dimensions, one of `dtypes`, on `device`.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: another number of dimensions or another device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} has dtype {value.dtype}; accepted: {accepted}")
    if value.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}, but the other arguments are on {device}")
    return value


def check_same(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless shape, and TypeError unless dtype, of `value` equal those of `other`."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {value.dtype}, but {other_name} has {other.dtype}; they must be equal")
    if value.shape != other.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but {other_name} has {tuple(other.shape)}")


def check_offsets(name: str, offsets: object, device: torch.device) -> Tensor:
    """Check dtype, shape and device of `offsets`; its values are checked by `check_offset_values`."""
    checked = check_tensor(name, offsets, dims=1, dtypes=(torch.int32,), device=device)
    if checked.shape[0] < 1:
        raise ValueError(f"{name} must have N + 1 entries, the first of them 0, got none")
    return checked


def check_offset_values(name: str, offsets: Tensor, total: int) -> None:
    """Check that `offsets` starts at 0, never decreases and ends at `total`; reads values, so for CPU tensors only.

    Raises:
        ValueError: naming the first entry at fault.
    """
    values = offsets.numpy()
    if values[0] != 0:
        raise ValueError(f"{name}[0] is {values[0]}; offsets start at 0")
    steps = values[1:] < values[:-1]
    if steps.any():
        at = int(steps.argmax())
        raise ValueError(f"{name} decreases from {values[at]} to {values[at + 1]} at entry {at + 1}")
    if values[-1] != total:
        raise ValueError(f"{name} ends at {values[-1]}, but there are {total} rows")
