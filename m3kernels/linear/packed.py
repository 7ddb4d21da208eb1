"""Weights of a linear layer in the layout that the CPU kernels read, made once: `pack_linear`.

    panels of 16 output columns, N filled up with zeros to whole pairs of them
    float32, bfloat16, float16   [N / 16, K, 16]
    int8                         [N / 16, K / 4, 16, 4], K filled up to a multiple of 4, and scales [N]:
                                 weight[n] ≈ scales[n] · codes[n]

int8 layers multiply with activations of 8 bits, 0 ... 255, quantized row by row while they are read
(m3kernels.linear.reference). AVX2 adds two products in 16 bits, saturating: so scales[n] is 1/127 of the largest sum of
like-signed weights 2k and 2k + 1, which makes codes -127 ... 127 and no such sum of codes above 128: 255 · 128 < 2^15.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from m3kernels._checks import check_tensor

PANEL_COLUMNS = 16
STEP_BYTES = 4
MOST_CODE = 127
MOST_PAIR = 128
MOST_BYTE_DEPTH = 131072
"""Inputs of an int8 layer, so that sums of products with 8-bit activations stay below 2^31."""
FLOAT_STORAGE = (torch.float32, torch.bfloat16, torch.float16)


class PackedLinear(NamedTuple):
    """Weights [N, K] as panels; scales float32 [N] of int8 panels, else None; columns N, depth K."""

    panels: Tensor
    scales: Tensor | None
    columns: int
    depth: int

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def unpack(self) -> Tensor:
        """The weights that the panels stand for, [N, K]: float32 of int8, else in the dtype of the panels."""
        if self.scales is None:
            return self.panels.transpose(1, 2).flatten(0, 1)[: self.columns]
        codes = self.panels.transpose(1, 2).flatten(2).flatten(0, 1)[: self.columns, : self.depth]
        return codes.float() * self.scales[:, None]

    def codes(self) -> Tensor:
        """The codes of int8 panels, int8 [N, K]."""
        return self.panels.transpose(1, 2).flatten(2).flatten(0, 1)[: self.columns, : self.depth]


def pack_linear(weight: Tensor, dtype: torch.dtype | None = None) -> PackedLinear:
    """Pack weights [N, K] of a linear layer for `linear`.

    Args:
        weight: float32, bfloat16 or float16; gradients do not flow back to it.
        dtype: of the stored panels: float32, bfloat16, float16 or int8; default that of the weights.

    Raises:
        TypeError: weight is no such tensor.
        ValueError: weight is empty or no matrix, dtype is another, or an int8 layer has more than 131072 inputs.
    """
    check_tensor("weight", weight, dims=2, dtypes=FLOAT_STORAGE)
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in (*FLOAT_STORAGE, torch.int8):
        raise ValueError(f"dtype is {dtype}; accepted: float32, bfloat16, float16, int8")
    columns, depth = weight.shape
    if columns == 0 or depth == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; accepted: at least one row and one column")
    filled = -(-columns // (2 * PANEL_COLUMNS)) * 2 * PANEL_COLUMNS
    values = weight.detach()
    if dtype != torch.int8:
        rows = values.new_zeros((filled, depth), dtype=dtype)
        rows[:columns] = values
        panels = rows.view(filled // PANEL_COLUMNS, PANEL_COLUMNS, depth).transpose(1, 2).contiguous()
        return PackedLinear(panels, None, columns, depth)
    if depth > MOST_BYTE_DEPTH:
        raise ValueError(f"weight has {depth} inputs; accepted for int8: at most {MOST_BYTE_DEPTH}")
    scales = _pair_sums(values.float()).amax(dim=1) / MOST_CODE
    codes = (values.float() / torch.where(scales > 0, scales, 1.0)[:, None]).round()
    return _pack_codes(codes.to(torch.int8), scales)


def pack_codes(codes: Tensor, scales: Tensor) -> PackedLinear:
    """Int8 panels of codes int8 [N, K] with scales float32 [N], both as `pack_linear` makes them.

    Raises:
        ValueError: like-signed neighbours add up to more than 128.
    """
    if not codes.is_meta and int(_pair_sums(codes.short()).max()) > MOST_PAIR:
        raise ValueError(f"codes of like-signed weights 2k and 2k + 1 add up to more than {MOST_PAIR}")
    return _pack_codes(codes, scales)


def _pack_codes(codes: Tensor, scales: Tensor) -> PackedLinear:
    columns, depth = codes.shape
    filled = -(-columns // (2 * PANEL_COLUMNS)) * 2 * PANEL_COLUMNS
    steps = -(-depth // STEP_BYTES)
    rows = codes.new_zeros((filled, steps * STEP_BYTES))
    rows[:columns, :depth] = codes
    panels = rows.view(filled // PANEL_COLUMNS, PANEL_COLUMNS, steps, STEP_BYTES).transpose(1, 2).contiguous()
    return PackedLinear(panels, scales, columns, depth)


def _pair_sums(values: Tensor) -> Tensor:
    """Of weights 2k and 2k + 1, the larger one of the sums of the positive and of the negative ones, [N, ⌈K/2⌉]."""
    pairs = torch.nn.functional.pad(values, (0, values.shape[1] % 2)).unflatten(1, (-1, 2))
    return torch.maximum(pairs.clamp(min=0).sum(2), -pairs.clamp(max=0).sum(2))


def check_packed(name: str, packed: PackedLinear, device: torch.device) -> None:
    """Raise TypeError or ValueError, naming the field, unless `packed` is as `pack_linear` makes it."""
    by_bytes = packed.scales is not None
    storage = (torch.int8,) if by_bytes else FLOAT_STORAGE
    check_tensor(f"{name}.panels", packed.panels, dims=4 if by_bytes else 3, dtypes=storage, device=device)
    pairs = -(-packed.columns // (2 * PANEL_COLUMNS))
    shape: tuple[int, ...] = (2 * pairs, packed.depth, PANEL_COLUMNS)
    if packed.scales is not None:
        check_tensor(f"{name}.scales", packed.scales, dims=1, dtypes=(torch.float32,), device=device)
        if packed.scales.shape[0] != packed.columns:
            raise ValueError(
                f"{name}.scales has {packed.scales.shape[0]} entries, but there are {packed.columns} columns"
            )
        shape = (2 * pairs, -(-packed.depth // STEP_BYTES), PANEL_COLUMNS, STEP_BYTES)
    if packed.panels.shape != shape or not packed.panels.is_contiguous():
        raise ValueError(f"{name}.panels has shape {tuple(packed.panels.shape)}; expected {shape}, contiguous")
