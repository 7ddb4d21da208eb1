"""A segment as an index holds it: with the inverted index of its token weights, and with marks on deleted documents.

Segments do not change; what is deleted is marked, passed over by every search, and left out when the segment is merged
with another or written anew. The inverted index lies in the segment's folder, so it is mapped like everything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from m3kernels import SparseIndex
from m3model.retrieval.segment import Segment

__all__ = ["INVERTED", "IndexedSegment"]

INVERTED = "inverted_"
"""How names of arrays of the inverted index begin (m3kernels.SparseIndex.segments)."""

Mask = NDArray[np.bool_]


class IndexedSegment:
    """A segment, its inverted index, its deletions.

    Attributes:
        segment: the documents, those deleted included.
        deleted: bool [N], or None if there are none.
        name: of its folder where the index was loaded from or saved to, or None.
        deletions_saved: whether that folder has `deleted` as it is.
    """

    def __init__(
        self,
        segment: Segment,
        *,
        name: str | None = None,
        deleted: Mask | None = None,
        inverted: SparseIndex | None = None,
    ) -> None:
        self.segment = segment
        self.deleted = deleted
        self.name = name
        self.deletions_saved = True
        self._inverted = inverted

    def __len__(self) -> int:
        """Number of documents, those deleted included."""
        return len(self.segment)

    @property
    def living(self) -> int:
        """Number of documents that are not deleted."""
        return len(self) - (0 if self.deleted is None else int(self.deleted.sum()))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; of the inverted index if it has been made."""
        return self.segment.nbytes + (0 if self._inverted is None else self._inverted.nbytes)

    @property
    def inverted(self) -> SparseIndex:
        """The inverted index of all documents, made when it is first needed."""
        if self._inverted is None:
            sparse = self.segment.embeddings.sparse
            assert sparse is not None
            self._inverted = SparseIndex.build(sparse)
        return self._inverted

    def delete(self, numbers: Sequence[int]) -> None:
        if self.deleted is None:
            self.deleted = np.zeros(len(self), dtype=np.bool_)
        self.deleted[list(numbers)] = True
        self.deletions_saved = False

    def living_ids(self) -> list[tuple[int, str]]:
        """Number and id of every document that is not deleted."""
        ids = enumerate(self.segment.ids.strings())
        return list(ids) if self.deleted is None else [(n, name) for n, name in ids if not self.deleted[n]]

    def compacted(self) -> Segment:
        """The documents without those deleted."""
        return self.segment if self.deleted is None else self.segment.select(np.flatnonzero(~self.deleted).tolist())

    def share(self, segment: Segment) -> IndexedSegment:
        """The same documents in an index of its own, with the representations of `segment`."""
        deleted = None if self.deleted is None else self.deleted.copy()
        inverted = None if segment.embeddings.sparse is None else self._inverted
        return IndexedSegment(segment, deleted=deleted, inverted=inverted)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything that does not change, by name."""
        found = self.segment.arrays()
        if self.segment.embeddings.sparse is not None:
            ((_, lists),) = self.inverted.segments()
            found |= {f"{INVERTED}{name}": array.numpy() for name, array in lists.items()}
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], name: str, deleted: NDArray[np.int64]) -> IndexedSegment:
        """The inverse of `arrays`, without copying, and the numbers of deleted documents.

        Raises:
            ValueError: arrays of the inverted index do not fit each other.
        """
        segment = Segment.from_arrays(arrays)
        lists = {
            part.removeprefix(INVERTED): torch.from_numpy(array)
            for part, array in arrays.items()
            if part.startswith(INVERTED)
        }
        inverted = SparseIndex.of_segments([(len(segment), lists)]) if lists else None
        held = cls(segment, name=name, inverted=inverted)
        if len(deleted):
            held.delete(deleted.tolist())
            held.deletions_saved = True
        return held
