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

from m3kernels import QuantizedRows, SparseBatch
from m3model.embeddings import EncodedTexts, M3Embeddings, MultiVectors
from m3model.retrieval.coded_vectors import CodedVectors, RowBits

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
    """Documents of one segment: ids, JSON objects and embeddings, whose multi-vectors may be kept as codes instead."""

    ids: PackedStrings
    documents: PackedStrings
    embeddings: EncodedTexts
    codes: CodedVectors | None = None

    @classmethod
    def of(
        cls,
        ids: Sequence[str],
        documents: Sequence[Mapping[str, Any]],
        embeddings: EncodedTexts,
        row_bits: RowBits | None = None,
    ) -> Segment:
        """A segment of these documents; row_bits: of an element of the multi-vectors, None keeps them as they are."""
        if embeddings.sparse is not None:
            sparse = embeddings.sparse.compact()
            sparse = SparseBatch(sparse.token_ids, sparse.weights.float(), sparse.offsets)
            embeddings = M3Embeddings(embeddings.dense, sparse, embeddings.multi_vector)
        codes = None
        if row_bits is not None and embeddings.multi_vector is not None:
            codes = CodedVectors.of(embeddings.multi_vector, row_bits)
            embeddings = M3Embeddings(embeddings.dense, embeddings.sparse)
        texts = [json.dumps(document, ensure_ascii=False) for document in documents]
        return cls(PackedStrings.of(ids), PackedStrings.of(texts), embeddings, codes)

    @classmethod
    def concatenate(cls, parts: Sequence[Segment]) -> Segment:
        return cls(
            PackedStrings.concatenate([part.ids for part in parts]),
            PackedStrings.concatenate([part.documents for part in parts]),
            M3Embeddings.concatenate([part.embeddings for part in parts]),
            None if not (codes := [part.codes for part in parts if part.codes]) else CodedVectors.concatenate(codes),
        )

    def select(self, numbers: Sequence[int]) -> Segment:
        """A copy of the documents with these numbers."""
        codes = None if self.codes is None else self.codes.select(numbers)
        return Segment(self.ids.select(numbers), self.documents.select(numbers), self.embeddings.select(numbers), codes)

    @property
    def multi_vector(self) -> MultiVectors | CodedVectors | None:
        return self.embeddings.multi_vector if self.codes is None else self.codes

    def only(self, parts: Sequence[str]) -> Segment:
        """The same documents with these of dense, sparse and multi_vector, which it must hold.

        Raises:
            ValueError: it does not hold one.
        """
        held = {"dense": self.embeddings.dense, "sparse": self.embeddings.sparse, "multi_vector": self.multi_vector}
        if absent := [part for part in parts if held.get(part) is None]:
            raise ValueError(f"parts are {list(parts)}, but an index has no {', '.join(absent)}")
        kept = {part: getattr(self.embeddings, part) for part in parts}
        return Segment(self.ids, self.documents, M3Embeddings(**kept), self.codes if "multi_vector" in parts else None)

    def __len__(self) -> int:
        return len(self.ids.offsets) - 1

    @cached_property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())

    def document(self, number: int) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.documents[number])
        return loaded

    def arrays(self) -> dict[str, Array]:
        """All content by name; rows in bfloat16, which numpy does not know, as uint16; codes name their bits."""
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
            floats = multi_vector.rows
            found["rows"] = (floats.view(torch.uint16) if floats.dtype == torch.bfloat16 else floats).numpy()
            found["row_offsets"] = multi_vector.offsets.numpy()
        if self.codes is not None:
            rows = self.codes.rows
            found[f"row_codes_{rows.bits}"] = rows.codes.numpy()
            found["row_scales"] = rows.scales.numpy()
            found["row_offsets"] = self.codes.offsets.numpy()
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Segment:
        """The inverse of `arrays`, without copying."""
        sparse = multi_vector = codes = None
        if "token_ids" in arrays:
            names = ("token_ids", "token_weights", "token_offsets")
            sparse = SparseBatch(*(torch.from_numpy(arrays[name]) for name in names))
        if "rows" in arrays:
            rows = torch.from_numpy(arrays["rows"])
            if rows.dtype == torch.uint16:
                rows = rows.view(torch.bfloat16)
            multi_vector = MultiVectors(rows, torch.from_numpy(arrays["row_offsets"]))
        for bits in (8, 1):
            if f"row_codes_{bits}" in arrays:
                stored, scales = (torch.from_numpy(arrays[name]) for name in (f"row_codes_{bits}", "row_scales"))
                codes = CodedVectors(QuantizedRows(stored, scales, bits), torch.from_numpy(arrays["row_offsets"]))
        return cls(
            PackedStrings(arrays["ids"], arrays["id_offsets"]),
            PackedStrings(arrays["documents"], arrays["document_offsets"]),
            M3Embeddings(arrays.get("dense"), sparse, multi_vector),
            codes,
        )
