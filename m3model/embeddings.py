"""M3Embeddings: the dense, sparse and multi-vector representations of N texts, in the order of the texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3kernels import SparseBatch

__all__ = ["EncodedTexts", "M3Embeddings", "MultiVectors"]

Dense = TypeVar("Dense", Tensor, NDArray[np.float32])


class MultiVectors(NamedTuple):
    """Packed multi-vectors: rows [T', E] of unit length, text i owns rows offsets[i]:offsets[i + 1], int32 [N + 1]."""

    rows: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class M3Embeddings(Generic[Dense]):
    """What M3Model computes of N texts; a part that was not asked for is None.

    Attributes:
        dense: [N, E], rows of unit length: a tensor with gradient from `forward`, a float32 array from `encode`.
        sparse: token weights, sorted by id within each text.
        multi_vector: a row for every token but the first of each text.
    """

    dense: Dense | None = None
    sparse: SparseBatch | None = None
    multi_vector: MultiVectors | None = None

    def __len__(self) -> int:
        if self.dense is not None:
            return int(self.dense.shape[0])
        for part in (self.sparse, self.multi_vector):
            if part is not None:
                return part.offsets.shape[0] - 1
        return 0

    def select(self, texts: Sequence[int] | slice) -> M3Embeddings[Dense]:
        """The embeddings of the texts with these numbers, in the order of the numbers."""
        numbers = torch.arange(len(self))[texts] if isinstance(texts, slice) else torch.as_tensor(texts).long()
        dense: Any = None
        if isinstance(self.dense, Tensor):
            dense = self.dense[numbers.to(self.dense.device)]
        elif self.dense is not None:
            dense = self.dense[numbers.numpy()]
        sparse, multi_vector = self.sparse, self.multi_vector
        if sparse is not None:
            rows, offsets = rows_of(sparse.offsets, numbers)
            sparse = SparseBatch(sparse.token_ids[rows], sparse.weights[rows], offsets)
        if multi_vector is not None:
            rows, offsets = rows_of(multi_vector.offsets, numbers)
            multi_vector = MultiVectors(multi_vector.rows[rows], offsets)
        return M3Embeddings(dense, sparse, multi_vector)

    @staticmethod
    def concatenate(parts: Sequence[M3Embeddings[Dense]]) -> M3Embeddings[Dense]:
        """All texts of `parts`, one part after another.

        Raises:
            ValueError: there are no parts, or one has a representation that another lacks.
        """
        if not parts:
            raise ValueError("parts is empty; accepted: at least one M3Embeddings")
        dense: Any = _all_or_none([part.dense for part in parts], "dense")
        if dense is not None:
            dense = torch.cat(dense) if isinstance(dense[0], Tensor) else np.concatenate(dense)
        sparse: SparseBatch | None = None
        if batches := _all_or_none([part.sparse for part in parts], "sparse"):
            batches = [batch.compact() for batch in batches]
            ids, weights, offsets = zip(*batches)
            sparse = SparseBatch(torch.cat(ids), torch.cat(weights), chain(offsets))
        multi_vector: MultiVectors | None = None
        if vectors := _all_or_none([part.multi_vector for part in parts], "multi_vector"):
            rows, offsets = zip(*vectors)
            multi_vector = MultiVectors(torch.cat(rows), chain(offsets))
        return M3Embeddings(dense, sparse, multi_vector)


EncodedTexts = M3Embeddings[NDArray[np.float32]]
"""What `M3Model.encode` returns."""

Part = TypeVar("Part")


def _all_or_none(parts: list[Part | None], name: str) -> list[Part] | None:
    present = [part for part in parts if part is not None]
    if present and len(present) < len(parts):
        raise ValueError(f"{len(present)} of {len(parts)} parts have {name}; accepted: all of them or none")
    return present or None


def rows_of(offsets: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers of the chosen texts one after another, and their offsets."""
    numbers = numbers.to(offsets.device)
    begins, ends = offsets[numbers].long(), offsets[numbers + 1].long()
    lengths = ends - begins
    chosen = torch.zeros(len(numbers) + 1, dtype=torch.int32, device=offsets.device)
    chosen[1:] = lengths.cumsum(0)
    shift = torch.repeat_interleave(begins - chosen[:-1], lengths)
    return shift + torch.arange(shift.shape[0], device=offsets.device), chosen


def chain(offsets: Sequence[Tensor]) -> Tensor:
    """Offsets of sequences that follow one another."""
    lengths = torch.cat([part.diff() for part in offsets])
    chained = torch.zeros(lengths.shape[0] + 1, dtype=torch.int32, device=lengths.device)
    chained[1:] = lengths.cumsum(0)
    return chained
