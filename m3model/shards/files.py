"""The files of an encoded collection.

    manifest.json               model, options, input and number of shards; written before the first shard
    shard-00000000.safetensors  consecutive documents: ids, JSON objects, embeddings (m3model.retrieval.segment)
    .lock-<rank>                held by the process that encodes

A file is written under another name, flushed to disk and renamed, so whatever bears its final name is whole: which
shards are missing is seen from their names alone. Every file holds a CRC-32 of its content, and every shard which
documents of the input it was made of.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from m3model import files
from m3model.retrieval.segment import Segment

__all__ = [
    "Manifest",
    "ShardOrigin",
    "check_folder",
    "locked",
    "present_shards",
    "read_manifest",
    "read_origin",
    "read_shard",
    "write_manifest",
    "write_shard",
]

FORMAT = "m3model encoded shards"
VERSION = 1
MANIFEST = "manifest.json"


class Manifest(NamedTuple):
    """What all shards have in common.

    Attributes:
        fingerprint: of the model (m3model.retrieval.fingerprint).
        options: what was computed and how; equal options, model and input give equal shards.
        input: number of texts, their characters, and a digest of ids and JSON objects.
        shards: how many there are when the encoding is finished.
    """

    fingerprint: str
    options: dict[str, Any]
    input: dict[str, Any]
    shards: int


class ShardOrigin(NamedTuple):
    """The documents of one shard: place of the first in the input, how many, digest of their ids and JSON objects."""

    first: int
    texts: int
    digest: str


def check_folder(folder: Path) -> None:
    """Raise FileExistsError unless `folder` is free for an encoding or holds one."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; shards are written into a folder")
    if folder.is_dir() and not (folder / MANIFEST).is_file():
        foreign = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
        if foreign:
            raise FileExistsError(f"{folder} holds {foreign[0]!r}, but no encoding; shards need a folder of their own")


def locked(folder: Path, rank: int) -> AbstractContextManager[None]:
    """The lock of one rank. Every run has a rank 0.

    Raises:
        RuntimeError: another process holds it.
    """
    return files.locked(folder / f".lock-{rank}", f"another process encodes into {folder}")


def write_manifest(folder: Path, manifest: Manifest, rank: int) -> None:
    values = {"format": FORMAT, "version": VERSION, **manifest._asdict()}
    content = json.dumps({**values, "crc32": zlib.crc32(_canonical(values))}, indent=1, sort_keys=True)
    files.write_whole(folder / MANIFEST, content, f"rank-{rank}")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest; None where there is none.

    Raises:
        ValueError: it is damaged, or of another format or version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is no manifest of encoded shards: its format is not {FORMAT!r}")
    version, crc32 = values.pop("version", None), values.pop("crc32", None)
    if version != VERSION:
        raise ValueError(f"{folder} was encoded in version {version!r} of the format; this program knows {VERSION}")
    if crc32 != zlib.crc32(_canonical({"format": FORMAT, "version": version, **values})):
        raise ValueError(f"{path} is damaged: its checksum does not fit its content")
    return Manifest(**values)


def write_shard(folder: Path, number: int, origin: ShardOrigin, segment: Segment, rank: int) -> None:
    """Write shard `number`; `rank` is that of the process, whose lock is held.

    Raises:
        OSError: the disk is full, or the folder cannot be written; nothing of the shard is left then.
    """
    path = _shard_path(folder, number)
    for leftover in folder.glob(f".{path.name}.*.new"):  # of a process that was killed while it wrote this shard
        leftover.unlink(missing_ok=True)
    arrays = {name: np.ascontiguousarray(array) for name, array in segment.arrays().items()}
    facts = {"number": number, **origin._asdict()}
    header = json.dumps({**facts, "crc32": _checksum(facts, arrays)})
    files.write_whole(path, safetensors.numpy.save(arrays, {"shard": header}), f"rank-{rank}")


def present_shards(folder: Path) -> list[int]:
    """Numbers of the shards that are there, ascending."""
    names = [path.name for path in folder.glob("shard-*.safetensors")]
    return sorted(int(name.removeprefix("shard-").removesuffix(".safetensors")) for name in names)


def read_origin(folder: Path, number: int) -> ShardOrigin:
    """What a shard says of its documents.

    Raises:
        ValueError: it is truncated, or its header is damaged.
    """
    facts, _ = _opened(_shard_path(folder, number), with_arrays=False)
    return _origin(facts, _shard_path(folder, number), number)


def read_shard(folder: Path, number: int, *, verify: bool) -> tuple[ShardOrigin, Segment]:
    """Shard `number`, mapped into memory.

    Args:
        verify: read all of it and compare with its checksum.

    Raises:
        FileNotFoundError: there is no such shard.
        ValueError: it is truncated or damaged.
    """
    path = _shard_path(folder, number)
    facts, arrays = _opened(path, with_arrays=True)
    origin = _origin(facts, path, number)
    if verify and facts["crc32"] != _checksum(facts, arrays):
        raise ValueError(f"{path} is damaged: its checksum does not fit its content")
    return origin, Segment.from_arrays(arrays)


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:08d}.safetensors"


def _opened(path: Path, *, with_arrays: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        with safe_open(path, framework="pt") as file:
            arrays = {name: file.get_tensor(name).numpy() for name in (file.keys() if with_arrays else ())}
            return json.loads((file.metadata() or {}).get("shard", "{}")), arrays
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}); delete it and it is encoded again") from error


def _origin(facts: Mapping[str, Any], path: Path, number: int) -> ShardOrigin:
    if facts.get("number") != number or not {"first", "texts", "digest", "crc32"} <= facts.keys():
        raise ValueError(f"{path} is not shard {number} of an encoding; delete it and it is encoded again")
    return ShardOrigin(facts["first"], facts["texts"], facts["digest"])


def _checksum(facts: Mapping[str, Any], arrays: Mapping[str, Any]) -> int:
    """CRC-32 of the facts (but for itself) and of names, dtypes, shapes and contents of the arrays."""
    value = zlib.crc32(_canonical({name: fact for name, fact in facts.items() if name != "crc32"}))
    for name in sorted(arrays):
        array = arrays[name]
        value = zlib.crc32(_canonical([name, array.dtype.str, list(array.shape)]), value)
        value = zlib.crc32(array.reshape(-1).view(np.uint8), value)
    return value


def _canonical(values: Any) -> bytes:
    return json.dumps(values, sort_keys=True, ensure_ascii=True).encode()
