"""Quantized multi-vectors for stored indexes: a byte or a bit for each element, and one float32 scale for each row.

    8 bits: row ≈ scale · (code - 128), codes 1 ... 255, scale = max |row| / 127
    1 bit:  row ≈ scale · sign(row), bit e % 8 of byte e // 8 set where row[e] >= 0

The 1-bit scale is ‖row‖² / ‖row‖₁, so that row · (scale · sign(row)) = ‖row‖²: the similarity of a query row that
points along the passage row is exact and, after a random rotation, every similarity is unbiased (RaBitQ, arXiv
2405.12497, theorem 3.2). The mean of |row|, the least-squares choice, would shrink all similarities.

A row of E float32 takes 4·E bytes; its codes E + 4 (8 bits, 4 times less) or E / 8 + 4 (1 bit, about 31 times less).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from m3kernels._checks import check_tensor

ZERO_POINT = 128
MOST_CODE = 127


class QuantizedRows(NamedTuple):
    """Packed rows in `bits` bits an element.

    codes: uint8 [T, E] (8 bits) or [T, E / 8] (1 bit). scales: float32 [T]. bits: 8 or 1.
    """

    codes: Tensor
    scales: Tensor
    bits: int

    @property
    def width(self) -> int:
        """E, the elements of a row."""
        return self.codes.shape[1] * 8 // self.bits

    def dequantize(self) -> Tensor:
        """The rows that the codes stand for: float32 [T, E]."""
        if self.bits == 8:
            values = self.codes.float() - ZERO_POINT
        else:
            places = torch.arange(8, dtype=torch.uint8, device=self.codes.device)
            set_bits = (self.codes[:, :, None] >> places) & 1
            values = set_bits.flatten(1).float() * 2 - 1
        return values * self.scales[:, None]

    def slice_rows(self, begin: int, end: int) -> QuantizedRows:
        """Rows begin to end, without a copy."""
        return QuantizedRows(self.codes[begin:end], self.scales[begin:end], self.bits)


def quantize_rows(rows: Tensor, bits: Literal[8, 1] = 8) -> QuantizedRows:
    """Quantize rows [T, E] of a floating dtype for `maxsim`, `maxsim_pairs`, `maxsim_topk`; codes as above.

    Raises:
        TypeError: rows are not a floating tensor.
        ValueError: shape, width (a multiple of 8) or bits are not as described.
    """
    check_tensor("rows", rows, dims=2)
    if rows.shape[1] % 8:
        raise ValueError(f"rows have width {rows.shape[1]}; accepted: multiples of 8")
    if bits not in (8, 1):
        raise ValueError(f"bits is {bits!r}; accepted: 8, 1")
    values = rows.detach().float()
    if bits == 8:
        scales = values.abs().amax(dim=1) / MOST_CODE if values.numel() else values.new_zeros(values.shape[0])
        codes = (values / torch.where(scales > 0, scales, 1.0)[:, None]).round_() + ZERO_POINT
        return QuantizedRows(codes.to(torch.uint8), scales, bits)
    total = values.abs().sum(dim=1)
    scales = values.square().sum(dim=1) / torch.where(total > 0, total, 1.0)
    places = torch.arange(8, dtype=torch.int32, device=rows.device)
    set_bits = (values >= 0).unflatten(1, (rows.shape[1] // 8, 8)).int() << places
    return QuantizedRows(set_bits.sum(dim=2).to(torch.uint8), scales, bits)


def check_quantized(name: str, rows: QuantizedRows, device: torch.device) -> None:
    """Raise TypeError or ValueError, naming the field, unless `rows` is as `quantize_rows` makes it."""
    check_tensor(f"{name}.codes", rows.codes, dims=2, dtypes=(torch.uint8,), device=device)
    check_tensor(f"{name}.scales", rows.scales, dims=1, dtypes=(torch.float32,), device=device)
    if rows.bits not in (8, 1):
        raise ValueError(f"{name}.bits is {rows.bits!r}; accepted: 8, 1")
    if rows.scales.shape[0] != rows.codes.shape[0]:
        raise ValueError(f"{name}.scales has {rows.scales.shape[0]} entries, but there are {rows.codes.shape[0]} rows")
