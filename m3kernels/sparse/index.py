"""SparseIndex: exact top-k lexical retrieval over many passages, in memory or mapped from a file.

An inverted index: for every token id the blocks of 64 passages that hold it, each with its largest weight and its
postings. A search bounds every block's scores by those maxima and scores blocks whole, best bound first, until no block
can reach the k best (block-max pruning, Mallia, Suel and Tonellotto, SIGIR 2024, arXiv 2405.01117; here always exact).
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m3kernels import _library
from m3kernels.sparse.batch import SparseBatch
from m3kernels.sparse.ops import check_batch_values

__all__ = ["SparseIndex", "SparseSearchResult"]

# Name and dtype of the arrays of a segment, in the order of csrc/cpu/sparse_index.cpp; None: the stored precision.
_ARRAYS: tuple[tuple[str, torch.dtype | None], ...] = (
    ("term_id", torch.int32),
    ("term_scale", torch.float32),
    ("term_begin", torch.int64),
    ("block", torch.int32),
    ("block_max", torch.float32),
    ("posting_begin", torch.int64),
    ("place", torch.uint8),
    ("weight", None),
)
_PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "uint8": torch.uint8}
_LARGEST = {"float32": torch.finfo(torch.float32).max, "float16": 65504.0, "uint8": torch.finfo(torch.float32).max}

# File: magic, version, length and CRC-32 of the header, header (JSON), arrays at multiples of 64 bytes.
_MAGIC = b"M3SPARSE"
_VERSION = 1
_PREFIX = struct.Struct("<8sIII")
_ALIGNMENT = 64


class SparseSearchResult(NamedTuple):
    """The k best passages of each query, best first; of equal scores the lower passage.

    scores: float32 [Nq, k]. passages: int64 [Nq, k], numbered in the order of adding. Where fewer than k passages share
    a token id with the query, the rest is score 0 and passage -1.
    """

    scores: Tensor
    passages: Tensor


class _Segment(NamedTuple):
    """Consecutive passages and their arrays in the order of `_ARRAYS`."""

    passages: int
    arrays: tuple[Tensor, ...]


class SparseIndex:
    """Exact top-k search over sparse vectors, made by `build` or `load`; runs on the CPU, in parallel over queries.

    precision: how weights are stored. "float32" scores exactly as `sparse_scores`; "float16" rounds each weight once;
    "uint8" stores a weight in steps of 1/255 of the largest weight of its token id (at least one, so none vanishes).
    The search is exact in the stored weights.
    """

    def __init__(self, precision: str, segments: list[_Segment]) -> None:
        self.precision = precision
        self._segments = segments

    @classmethod
    def build(cls, passages: SparseBatch, *, precision: str = "float32") -> SparseIndex:
        """Index `passages`; their numbers are their places in the batch.

        Raises:
            TypeError: not a SparseBatch.
            ValueError: precision is not one of float32, float16, uint8; ids do not increase within a text; a weight is
                negative, not finite or too large for the precision.
            RuntimeError: the compiled CPU kernels are missing.
        """
        if precision not in _PRECISIONS:
            raise ValueError(f"precision is {precision!r}; accepted: {', '.join(_PRECISIONS)}")
        index = cls(precision, [])
        index.add(passages)
        return index

    def add(self, passages: SparseBatch) -> None:
        """Append passages; they get the numbers from len(self) on.

        Small parts are merged as they come, so adding n passages one batch at a time costs O(n log n). A uint8 index
        keeps its parts (merging would round twice): add large batches to it.

        Raises:
            TypeError, ValueError, RuntimeError: as `build`.
        """
        checked = _checked("passages", passages, _LARGEST[self.precision])
        count = checked.offsets.shape[0] - 1
        if count == 0:
            return
        self._segments.append(_Segment(count, tuple(_kernel("sparse_index_build")(*_entries(checked), self.precision))))
        while (
            self.precision != "uint8"
            and len(self._segments) > 1
            and self._segments[-2].passages <= 2 * self._segments[-1].passages
        ):
            right, left = self._segments.pop(), self._segments.pop()
            merged = _concatenate([_segment_entries(left), _segment_entries(right)])
            arrays = tuple(_kernel("sparse_index_build")(*_entries(merged), self.precision))
            self._segments.append(_Segment(left.passages + right.passages, arrays))

    def search(self, queries: SparseBatch, k: int = 100) -> SparseSearchResult:
        """The k passages with the largest Σ over shared ids of query weight · passage weight, for every query.

        Raises:
            TypeError: not a SparseBatch.
            ValueError: k below 1; ids do not increase within a text; a weight is negative or not finite.
        """
        if k < 1:
            raise ValueError(f"k is {k}; accepted: at least 1")
        checked = _checked("queries", queries, _LARGEST["float32"])
        arrays = [array for segment in self._segments for array in segment.arrays]
        counts = [segment.passages for segment in self._segments]
        scores, found = _kernel("sparse_index_search")(*_entries(checked), arrays, counts, k)
        return SparseSearchResult(scores, found)

    def __len__(self) -> int:
        """Number of passages."""
        return sum(segment.passages for segment in self._segments)

    def segments(self) -> list[tuple[int, dict[str, Tensor]]]:
        """The parts of the index: number of passages and named arrays of each, shared, not copied.

        They can be stored anywhere and make the index again, alone or after those of others (`of_segments`).
        """
        names = [name for name, _ in _ARRAYS]
        return [(segment.passages, dict(zip(names, segment.arrays))) for segment in self._segments]

    @classmethod
    def of_segments(cls, segments: Sequence[tuple[int, Mapping[str, Tensor]]]) -> SparseIndex:
        """An index of the segments of one or several indexes, in this order; passages are numbered through.

        Args:
            segments: of `segments`, all of one precision; the arrays are used where they lie (mapped files too).

        Raises:
            ValueError: names, dtypes or lengths of arrays do not fit each other. Values inside are not checked.
        """
        held = [_checked_segment(number, passages, arrays) for number, (passages, arrays) in enumerate(segments)]
        kinds = {segment.arrays[-1].dtype for segment in held} or {torch.float32}
        precisions = [name for name, dtype in _PRECISIONS.items() if dtype in kinds]
        if len(kinds) > 1:
            raise ValueError(f"segments have the precisions {', '.join(precisions)}; accepted: one")
        return cls(precisions[0], held)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for segment in self._segments for array in segment.arrays)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to one file; whoever reads `path` sees the old file or the whole new one, never a part.

        Raises:
            OSError: the file cannot be written.
        """
        path = Path(path)
        tables, begin = [], 0
        for segment in self._segments:
            table = []
            for array in segment.arrays:
                table.append({"count": array.numel(), "begin": begin, "crc32": zlib.crc32(_bytes_of(array))})
                begin = _aligned(begin + array.nbytes)
            tables.append({"passages": segment.passages, "arrays": table})
        header = json.dumps({"precision": self.precision, "data_bytes": begin, "segments": tables}).encode()
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_PREFIX.pack(_MAGIC, _VERSION, len(header), zlib.crc32(header)))
                file.write(header)
                file.write(b"\0" * (_aligned(file.tell()) - file.tell()))
                for segment in self._segments:
                    for array in segment.arrays:
                        file.write(_bytes_of(array))
                        file.write(b"\0" * (_aligned(array.nbytes) - array.nbytes))
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = False) -> SparseIndex:
        """Map a saved index into memory: pages are read when a search first touches them.

        Args:
            verify: also read everything and compare the checksums of the arrays.

        Raises:
            OSError: the file cannot be read.
            ValueError: not a file of `save`, of another version, cut off, or its checksums differ.
        """
        path = Path(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            header = _read_header(path, file.read(_PREFIX.size), file)
        first = _aligned(_PREFIX.size + header.bytes)
        wanted = first + header.content["data_bytes"]
        if size != wanted:
            raise ValueError(f"{path} has {size} bytes, but its header says {wanted}: it was cut off or written to")
        precision = header.content["precision"]
        memory = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        segments = []
        for number, table in enumerate(header.content["segments"]):
            arrays = []
            for (name, dtype), place in zip(_ARRAYS, table["arrays"]):
                kind = dtype or _PRECISIONS[precision]
                begin = first + place["begin"]
                array = memory[begin : begin + place["count"] * kind.itemsize]
                if verify and zlib.crc32(_bytes_of(array)) != place["crc32"]:
                    raise ValueError(f"{path}: the checksum of {name} in segment {number} differs; the file is damaged")
                arrays.append(array.view(kind))
            segments.append(_Segment(table["passages"], tuple(arrays)))
        return cls(precision, segments)


class _Header(NamedTuple):
    bytes: int
    content: dict[str, Any]


def _read_header(path: Path, prefix: bytes, file: Any) -> _Header:
    if not prefix.startswith(_MAGIC):
        raise ValueError(f"{path} is not a SparseIndex file: it begins with {prefix[:8]!r}, not {_MAGIC!r}")
    if len(prefix) < _PREFIX.size:
        raise ValueError(f"{path} was cut off: it has {len(prefix)} bytes")
    _, version, length, checksum = _PREFIX.unpack(prefix)
    if version != _VERSION:
        raise ValueError(f"{path} has version {version} of the format; accepted: {_VERSION}")
    header = file.read(length)
    if len(header) < length:
        raise ValueError(f"{path} was cut off: its header has {len(header)} of {length} bytes")
    if zlib.crc32(header) != checksum:
        raise ValueError(f"{path}: the checksum of the header differs; the file is damaged")
    return _Header(length, json.loads(header))


def _bytes_of(array: Tensor) -> memoryview:
    return array.contiguous().view(torch.uint8).numpy().data


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def _checked_segment(number: int, passages: int, arrays: Mapping[str, Tensor]) -> _Segment:
    if arrays.keys() != {name for name, _ in _ARRAYS}:
        raise ValueError(f"segment {number} has the arrays {sorted(arrays)}; accepted: those of SparseIndex.segments")
    for name, dtype in _ARRAYS:
        array, accepted = arrays[name], [dtype] if dtype else list(_PRECISIONS.values())
        if array.dtype not in accepted or array.dim() != 1 or not array.is_contiguous():
            raise ValueError(
                f"{name} of segment {number} is {array.dtype} {tuple(array.shape)}; accepted: {accepted} [n]"
            )
    terms, blocks, postings = (arrays[name].shape[0] for name in ("term_id", "block", "place"))
    lengths = {
        "term_scale": terms,
        "term_begin": terms + 1,
        "block_max": blocks,
        "posting_begin": blocks + 1,
        "weight": postings,
    }
    for name, length in lengths.items():
        if arrays[name].shape[0] != length:
            raise ValueError(f"{name} of segment {number} has {arrays[name].shape[0]} entries; expected {length}")
    for name, end in (("term_begin", blocks), ("posting_begin", postings)):
        if int(arrays[name][-1]) != end:
            raise ValueError(f"{name} of segment {number} ends with {int(arrays[name][-1])}; expected {end}")
    return _Segment(passages, tuple(arrays[name] for name, _ in _ARRAYS))


def _kernel(name: str) -> Any:
    kernel = _library.cpu_kernel(name)
    if kernel is None:
        raise RuntimeError("SparseIndex needs the compiled CPU kernels, which are missing; see m3kernels.build_info()")
    return kernel


def _checked(name: str, batch: SparseBatch, largest: float) -> SparseBatch:
    """`batch` without unused entries, on the CPU, in float32."""
    if not isinstance(batch, SparseBatch):
        raise TypeError(f"{name} must be a SparseBatch, got {type(batch).__name__}")
    check_batch_values(name, batch.token_ids.cpu(), batch.offsets.cpu())
    ids, weights, offsets = (x.detach().cpu().contiguous() for x in batch.compact())
    weights = weights.float()
    bad = ~((weights >= 0) & (weights <= largest))
    if bad.any():
        entry = int(bad.nonzero()[0])
        text = int(torch.searchsorted(offsets, entry, right=True)) - 1
        raise ValueError(f"{name}: text {text} has the weight {float(weights[entry])}; accepted: 0 to {largest:g}")
    return SparseBatch(ids, weights, offsets)


def _entries(batch: SparseBatch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.token_ids, batch.weights, batch.offsets


def _segment_entries(segment: _Segment) -> SparseBatch:
    return SparseBatch(*_kernel("sparse_index_entries")(list(segment.arrays), segment.passages))


def _concatenate(batches: list[SparseBatch]) -> SparseBatch:
    offsets = [batches[0].offsets]
    for batch in batches[1:]:
        offsets.append(batch.offsets[1:] + offsets[-1][-1])
    return SparseBatch(
        torch.cat([batch.token_ids for batch in batches]),
        torch.cat([batch.weights for batch in batches]),
        torch.cat(offsets),
    )
