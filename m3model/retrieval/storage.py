"""Index folders: immutable segments and one manifest that names them.

    manifest.json          {"format", "version", "generation", "fingerprint", "metadata", "segments": [...], "crc32"}
    segment-<name>/        ids.npy id_offsets.npy documents.npy ... (m3model.retrieval.segment), plain .npy files;
                           inverted_*.npy, the inverted index of the token weights (m3kernels.SparseIndex);
                           deleted-<state>.npy, the numbers of deleted documents, if there are any

A segment is written and flushed first; then a new manifest takes the place of the old one by rename. Whatever happens
in between, the folder is the old index or the new one. Segments that are in it already are not written again; where
documents were deleted from one, a new file of deletions takes the place of the old one with the manifest. The
manifest holds size and CRC-32 of every file; files are mapped into memory, so an index may be larger than that.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m3model.files import flush, locked, write_whole
from m3model.retrieval.indexed_segment import IndexedSegment

__all__ = ["FORMAT", "VERSION", "Manifest", "is_index", "read_index", "write_index"]

FORMAT = "m3model exact index"
VERSION = 2
MANIFEST = "manifest.json"
_CHUNK = 1 << 22
_DELETED = "deleted"
_INVERTED_DTYPES = {
    "inverted_term_id": "<i4",
    "inverted_term_scale": "<f4",
    "inverted_term_begin": "<i8",
    "inverted_block": "<i4",
    "inverted_block_max": "<f4",
    "inverted_posting_begin": "<i8",
    "inverted_place": "|u1",
    "inverted_weight": "<f4",
}
_PARTS: tuple[set[str], ...] = (
    {"dense"},
    {"token_ids", "token_weights", "token_offsets", *_INVERTED_DTYPES},
    {"rows", "row_offsets"},
    {"row_codes_8", "row_scales", "row_offsets"},
    {"row_codes_1", "row_scales", "row_offsets"},
)
_MATRICES = ("dense", "rows", "row_codes_8", "row_codes_1")
_DTYPES = {
    "ids": "|u1",
    "id_offsets": "<i8",
    "documents": "|u1",
    "document_offsets": "<i8",
    "dense": "<f4",
    "token_ids": "<i4",
    "token_weights": "<f4",
    "token_offsets": "<i4",
    "rows": ("<f4", "<f2", "<u2"),
    "row_offsets": "<i4",
    "row_codes_8": "|u1",
    "row_codes_1": "|u1",
    "row_scales": "<f4",
    _DELETED: "<i8",
    **_INVERTED_DTYPES,
}


class Manifest(NamedTuple):
    """What a manifest says beside its list of segments; generation names one state of the folder."""

    generation: str
    fingerprint: str | None
    metadata: dict[str, Any]


def is_index(folder: Path) -> bool:
    """Whether the folder holds an index, sound or not."""
    return (folder / MANIFEST).is_file()


def write_index(
    folder: Path,
    segments: list[IndexedSegment],
    fingerprint: str | None,
    metadata: dict[str, Any],
    expected_generation: str | None,
) -> str:
    """Write segments that do not lie in this folder, then the manifest; drop what it no longer names.

    Args:
        segments: given the names of their folders, and their deletions marked as saved, once the manifest is written.
        expected_generation: the state of this folder that `segments` came from; None replaces whatever index is there.

    Returns:
        The new generation.

    Raises:
        FileExistsError: `folder` is a file, or a folder with something else in it.
        RuntimeError: another process writes the index, or has changed it since it was loaded.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; an index is saved into a folder")
    if folder.is_dir() and not is_index(folder):
        foreign = [entry.name for entry in folder.iterdir() if not (entry.name.startswith(".") or _is_segment(entry))]
        if foreign:
            raise FileExistsError(f"{folder} is no index and holds {foreign[0]!r}; an index needs a folder of its own")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if expected_generation is not None:
            _check_generation(folder, expected_generation)
        entries = []
        known = {entry["name"]: entry for entry in _read_manifest(folder)["segments"]} if expected_generation else {}
        for held in segments:
            if held.name in known:
                entry = known[held.name]
                if not held.deletions_saved:
                    place = folder / entry["name"]
                    kept = {name: facts for name, facts in entry["files"].items() if not _is_deletions(name)}
                    entry = {**entry, "files": kept | _write_arrays(place, _deletions(held))}
            else:
                name = f"segment-{secrets.token_hex(8)}"
                (folder / name).mkdir()
                files = _write_arrays(folder / name, held.arrays() | _deletions(held))
                entry = {"name": name, "count": len(held), "files": files}
            entries.append(entry)
        generation = secrets.token_hex(8)
        _write_manifest(
            folder,
            {
                "format": FORMAT,
                "version": VERSION,
                "generation": generation,
                "fingerprint": fingerprint,
                "metadata": metadata,
                "segments": entries,
            },
        )
        for held, entry in zip(segments, entries):
            held.name, held.deletions_saved = entry["name"], True
        _drop_unnamed(folder, entries)
    return generation


def read_index(folder: Path, *, verify: bool) -> tuple[Manifest, list[IndexedSegment]]:
    """The manifest and the segments, their arrays mapped into memory (copy on write).

    Args:
        verify: compare every file with its checksum; sizes, dtypes and shapes are compared always.

    Raises:
        FileNotFoundError: no index, or a file of it is missing.
        ValueError: not an index of this format and version, or a file is damaged or truncated.
    """
    values = _read_manifest(folder)
    segments = []
    for entry in values["segments"]:
        place = folder / entry["name"]
        arrays = {_array_name(name): _read_array(place / name, facts, verify) for name, facts in entry["files"].items()}
        _check_arrays(place, arrays, entry["count"])
        deleted = arrays.pop(_DELETED, np.zeros(0, dtype=np.int64))
        try:
            segments.append(IndexedSegment.from_arrays(arrays, entry["name"], deleted))
        except ValueError as error:
            raise ValueError(f"{place} is damaged: {error}") from error
    return Manifest(values["generation"], values["fingerprint"], values["metadata"]), segments


class _ChecksummedWriter(io.RawIOBase):
    """Passes bytes on to a file and keeps their number and CRC-32."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.written = 0
        self.crc32 = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.file.write(view)
        self.written += len(view)
        self.crc32 = zlib.crc32(view, self.crc32)
        return len(view)


def _write_arrays(folder: Path, arrays: Mapping[str, NDArray[Any]]) -> dict[str, dict[str, int]]:
    facts = {}
    for name, array in arrays.items():
        with open(folder / f"{name}.npy", "xb") as file:
            writer = _ChecksummedWriter(file)
            np.lib.format.write_array(writer, np.ascontiguousarray(array), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        facts[f"{name}.npy"] = {"bytes": writer.written, "crc32": writer.crc32}
    flush(folder)
    return facts


def _deletions(held: IndexedSegment) -> dict[str, NDArray[np.int64]]:
    """Under a name of its own for every state, so that the file of the state before stays until the manifest is new."""
    if held.deleted is None:
        return {}
    return {f"{_DELETED}-{secrets.token_hex(8)}": np.flatnonzero(held.deleted).astype(np.int64)}


def _array_name(file: str) -> str:
    return _DELETED if _is_deletions(file) else file.removesuffix(".npy")


def _is_deletions(file: str) -> bool:
    return file.startswith(f"{_DELETED}-")


def _drop_unnamed(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Remove segments and files of deletions that are not in the manifest."""
    files = {entry["name"]: entry["files"] for entry in entries}
    for place in folder.iterdir():
        if _is_segment(place) and place.name not in files:
            shutil.rmtree(place)
        elif _is_segment(place):
            for path in place.iterdir():
                if _is_deletions(path.name) and path.name not in files[place.name]:
                    path.unlink()


def _write_manifest(folder: Path, values: dict[str, Any]) -> None:
    content = json.dumps({**values, "crc32": zlib.crc32(_canonical(values))}, indent=1, ensure_ascii=True)
    flush(folder)
    write_whole(folder / MANIFEST, content)
    flush(folder.parent)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.exists():
        raise FileNotFoundError(f"there is no index folder {str(folder)!r}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; an index is a folder with a {MANIFEST}")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no index: it has no {MANIFEST}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path} is no manifest of an index: its format is not {FORMAT!r}")
    if values.get("version") != VERSION:
        raise ValueError(
            f"{folder} is an index of version {values.get('version')!r}; this program reads version {VERSION}:"
            " make the index again"
        )
    crc32 = values.pop("crc32", None)
    if crc32 != zlib.crc32(_canonical(values)):
        raise ValueError(f"{path} is damaged: its checksum does not fit its content")
    for entry in values["segments"]:
        if not all(_is_plain(name) for name in (entry["name"], *entry["files"])):
            raise ValueError(f"{path} names files outside the index")
    return values


def _canonical(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, ensure_ascii=True).encode()


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _is_segment(path: Path) -> bool:
    return path.name.startswith("segment-") and path.is_dir()


def _check_generation(folder: Path, expected: str) -> None:
    found = _read_manifest(folder)["generation"]
    if found != expected:
        raise RuntimeError(f"{folder} was changed by another process since it was loaded; load it again")


def _read_array(path: Path, facts: dict[str, int], verify: bool) -> NDArray[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, although the index's {MANIFEST} names it")
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise ValueError(f"{path} is truncated or foreign: it has {size} bytes, the {MANIFEST} says {facts['bytes']}")
    if verify and _crc32(path) != facts["crc32"]:
        raise ValueError(f"{path} is damaged: its checksum is not that of the {MANIFEST}")
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, _ = np.lib.format.read_array_header_1_0(file)
        mapped: NDArray[Any] = np.load(path, mmap_mode="c" if 0 not in shape else None, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} is no .npy file: {error}") from error
    return mapped.view(np.ndarray)


def _check_arrays(folder: Path, arrays: dict[str, NDArray[Any]], count: int) -> None:
    """Names, dtypes and shapes; values of offsets are checked by the ops that read them."""
    names = {"ids", "id_offsets", "documents", "document_offsets"}
    for part in _PARTS:
        if (part - {"row_offsets", "row_scales"}) & arrays.keys():
            names |= part
    if arrays.keys() - {_DELETED} != names:
        raise ValueError(f"{folder} has the arrays {sorted(arrays)}; expected {sorted(names)}")
    for name, array in arrays.items():
        if array.dtype.str not in _DTYPES[name]:
            raise ValueError(f"{folder / name}.npy has dtype {array.dtype.str}; expected {_DTYPES[name]}")
        if array.ndim != (2 if name in _MATRICES else 1):
            raise ValueError(f"{folder / name}.npy has shape {array.shape}")
        wanted = {"dense": count}.get(name, count + 1 if name.endswith("_offsets") else None)
        if wanted is not None and len(array) != wanted:
            raise ValueError(f"{folder / name}.npy has {len(array)} rows; expected {wanted} for {count} documents")
    deleted = arrays.get(_DELETED)
    if deleted is not None and len(deleted) and not (0 <= deleted.min() <= deleted.max() < count):
        raise ValueError(f"{folder} has deletions outside its {count} documents")


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _locked(folder: Path) -> AbstractContextManager[None]:
    return locked(folder / ".lock", f"another process is writing the index {folder}")
