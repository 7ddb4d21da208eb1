"""Multi-vectors as an index stores them in 8 bits or 1 bit an element (m3kernels.QuantizedRows), packed by document.

A row of 1024 elements (bge-m3) takes 1028 bytes in 8 bits and 132 in 1 bit, where float16 takes 2048. MaxSim runs on
the codes as they are; the query stays in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from m3kernels import QuantizedRows, quantize_rows
from m3model.embeddings import MultiVectors, chain, rows_of

__all__ = ["CodedVectors", "RowBits"]

RowBits = Literal[8, 1]


class CodedVectors(NamedTuple):
    """Rows of N documents; document i owns rows offsets[i]:offsets[i + 1], int32 [N + 1]."""

    rows: QuantizedRows
    offsets: Tensor

    @classmethod
    def of(cls, vectors: MultiVectors, bits: RowBits) -> CodedVectors:
        """Raises ValueError unless the width is a multiple of 8."""
        return cls(quantize_rows(vectors.rows, bits), vectors.offsets)

    @classmethod
    def concatenate(cls, parts: Sequence[CodedVectors]) -> CodedVectors:
        codes = torch.cat([part.rows.codes for part in parts])
        scales = torch.cat([part.rows.scales for part in parts])
        return cls(QuantizedRows(codes, scales, parts[0].rows.bits), chain([part.offsets for part in parts]))

    def select(self, documents: Sequence[int]) -> CodedVectors:
        numbers, offsets = rows_of(self.offsets, torch.as_tensor(documents).long())
        return CodedVectors(QuantizedRows(self.rows.codes[numbers], self.rows.scales[numbers], self.rows.bits), offsets)
