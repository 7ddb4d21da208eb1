"""Segments: the immutable parts of an index, each a run of documents in packed arrays that can lie on disk.

Everything of varying length is packed: ids and documents as UTF-8 bytes with int64 offsets, token weights and
multi-vector rows as in M3Embeddings. So a segment is a handful of flat arrays, and a file of it can be mapped into
memory and searched in place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from m3kernels import SparseBatch
from m3model.embeddings import EncodedTexts, M3Embeddings, MultiVectors

__all__ = ["PackedStrings", "Segment"]

Array = NDArray[Any]


@dataclass(frozen=True)
class PackedStrings:
    """Strings as UTF-8 bytes uint8 [B] and offsets int64 [N + 1]; lone surrogates survive."""

    data: Array
    offsets: Array

    @classmethod
    def of(cls, strings: Sequence[str]) -> PackedStrings:
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(string) for string in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets)

    @classmethod
    def concatenate(cls, parts: Sequence[PackedStrings]) -> PackedStrings:
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(np.concatenate([part.data for part in parts]), offsets)

    def select(self, numbers: Sequence[int]) -> PackedStrings:
        return PackedStrings.of([self[number] for number in numbers])

    def __getitem__(self, number: int) -> str:
        begin, end = self.offsets[number : number + 2]
        return bytes(self.data[begin:end]).decode("utf-8", "surrogatepass")

    def strings(self) -> list[str]:
        data = self.data.tobytes()
        bounds = self.offsets.tolist()
        return [data[begin:end].decode("utf-8", "surrogatepass") for begin, end in zip(bounds, bounds[1:])]


@dataclass(frozen=True)
class Segment:
    """Documents of one segment: ids, JSON objects and embeddings."""

    ids: PackedStrings
    documents: PackedStrings
    embeddings: EncodedTexts

    @classmethod
    def of(cls, ids: Sequence[str], documents: Sequence[Mapping[str, Any]], embeddings: EncodedTexts) -> Segment:
        if embeddings.sparse is not None:
            sparse = embeddings.sparse.compact()
            sparse = SparseBatch(sparse.token_ids, sparse.weights.float(), sparse.offsets)
            embeddings = M3Embeddings(embeddings.dense, sparse, embeddings.multi_vector)
        texts = [json.dumps(document, ensure_ascii=False) for document in documents]
        return cls(PackedStrings.of(ids), PackedStrings.of(texts), embeddings)

    @classmethod
    def concatenate(cls, parts: Sequence[Segment]) -> Segment:
        return cls(
            PackedStrings.concatenate([part.ids for part in parts]),
            PackedStrings.concatenate([part.documents for part in parts]),
            M3Embeddings.concatenate([part.embeddings for part in parts]),
        )

    def select(self, numbers: Sequence[int]) -> Segment:
        """A copy of the documents with these numbers."""
        return Segment(self.ids.select(numbers), self.documents.select(numbers), self.embeddings.select(numbers))

    def __len__(self) -> int:
        return len(self.ids.offsets) - 1

    @cached_property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())

    def document(self, number: int) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.documents[number])
        return loaded

    def arrays(self) -> dict[str, Array]:
        """All content by name; rows in bfloat16, which numpy does not know, as uint16."""
        found: dict[str, Array] = {
            "ids": self.ids.data,
            "id_offsets": self.ids.offsets,
            "documents": self.documents.data,
            "document_offsets": self.documents.offsets,
        }
        dense, sparse, multi_vector = self.embeddings.dense, self.embeddings.sparse, self.embeddings.multi_vector
        if dense is not None:
            found["dense"] = dense
        if sparse is not None:
            found["token_ids"] = sparse.token_ids.numpy()
            found["token_weights"] = sparse.weights.numpy()
            found["token_offsets"] = sparse.offsets.numpy()
        if multi_vector is not None:
            rows = multi_vector.rows
            found["rows"] = (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()
            found["row_offsets"] = multi_vector.offsets.numpy()
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Segment:
        """The inverse of `arrays`, without copying."""
        sparse = multi_vector = None
        if "token_ids" in arrays:
            names = ("token_ids", "token_weights", "token_offsets")
            sparse = SparseBatch(*(torch.from_numpy(arrays[name]) for name in names))
        if "rows" in arrays:
            rows = torch.from_numpy(arrays["rows"])
            if rows.dtype == torch.uint16:
                rows = rows.view(torch.bfloat16)
            multi_vector = MultiVectors(rows, torch.from_numpy(arrays["row_offsets"]))
        return cls(
            PackedStrings(arrays["ids"], arrays["id_offsets"]),
            PackedStrings(arrays["documents"], arrays["document_offsets"]),
            M3Embeddings(arrays.get("dense"), sparse, multi_vector),
        )
