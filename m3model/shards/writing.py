"""Encoding of a collection larger than memory into shards, by one process or several, to be stopped at any moment.

    1. the input is read once: which documents make shard 0, 1, ... (about shard_characters each), and their digests
    2. the manifest is written, or the one that is there compared: model, options and input must be the same
    3. the input is read again; shards that are not there yet are encoded, one window each, and written

The cut into shards depends on input and options alone. So a run that was killed goes on with the first shard that is
missing, whichever rank of however many it belonged to: rank r of R makes the shards with number % R == r.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from m3model.encoding import DEFAULT_WINDOW_CHARACTERS, EncodingOptions, encode_windows, windows
from m3model.retrieval.fingerprint import fingerprint, same_model
from m3model.retrieval.segment import Segment
from m3model.shards.files import (
    Manifest,
    ShardOrigin,
    check_folder,
    locked,
    present_shards,
    read_manifest,
    read_origin,
    write_manifest,
    write_shard,
)
from m3model.tokenizer import Role

if TYPE_CHECKING:
    from m3model.model import M3Model

__all__ = ["Document", "ShardReport", "encode_shards"]

Document = tuple[str, Mapping[str, Any]]
"""Id and JSON object of a document; the object's "text" is encoded."""


class ShardReport(NamedTuple):
    """Texts and shards of the whole input, and the shards that this call has encoded."""

    texts: int
    shards: int
    encoded: int


def encode_shards(
    model: M3Model,
    documents: Iterable[Document],
    folder: str | os.PathLike[str],
    *,
    dense: bool = True,
    sparse: bool = True,
    multi_vector: bool = True,
    max_length: int = 8192,
    batch_tokens: int | None = None,
    role: Role = "passage",
    multi_vector_dtype: torch.dtype = torch.float32,
    shard_characters: int | None = None,
    model_name: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
) -> ShardReport:
    """Encode documents into `folder`, or go on with what a run that was stopped has left there.

    Args:
        documents: ids and JSON objects with a "text"; iterated twice, with the same documents both times.
        folder: made if need be; read it with EncodedShards.
        shard_characters: of the texts of one shard, which is encoded in memory and lost if the run is killed within it.
            Default what `folder` was begun with, otherwise 2**18 on a CPU and 2**21 on a GPU.
        model_name: kept in the manifest for people to read.
        rank, world_size: this process and the number of processes that share the work on one file system.
        dense, sparse, multi_vector, max_length, batch_tokens, role, multi_vector_dtype, progress: as M3Model.encode.

    Raises:
        FileExistsError: `folder` is a file, or holds something else.
        TypeError: documents can be iterated only once; as M3Model.encode.
        ValueError: `folder` was begun with another model, other options or another input, a shard is damaged, a
            document has no "text", rank is not below world_size; as M3Model.encode.
        RuntimeError: another process encodes into `folder`, or the input changed while it was read.
        OSError: the disk is full or the folder cannot be written. What is done stays; the same call goes on.
    """
    folder = Path(folder)
    if iter(documents) is documents:
        raise TypeError("documents can be iterated only once; accepted: a list, or an object that can start again")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} and world_size {world_size}; accepted: 0 <= rank < world_size")
    if shard_characters is not None and shard_characters < 1:
        raise ValueError(f"shard_characters is {shard_characters}; accepted: at least 1")
    options = EncodingOptions(dense, sparse, multi_vector, max_length, batch_tokens, role, multi_vector_dtype)
    encode_windows(model, [], options)  # an option that is wrong is told before a long input is read
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, rank):
        begun = read_manifest(folder)
        if shard_characters is None:
            usual = DEFAULT_WINDOW_CHARACTERS[model.device.type]
            shard_characters = usual if begun is None else int(begun.options["shard_characters"])
        plan, summary = _planned(documents, shard_characters)
        described = _described(model, options, shard_characters, model_name)
        manifest = Manifest(fingerprint(model), described, summary, len(plan))
        if begun is None:
            write_manifest(folder, manifest, rank)
            begun = read_manifest(folder)  # of another rank, if that was quicker or slower
            assert begun is not None
        _check_same(folder, begun, manifest)
        present = _checked_shards(folder, plan)
        wanted = [number for number in range(rank, len(plan), world_size) if number not in present]
        total = sum(plan[number].texts for number in wanted)
        _encode(model, _chosen(documents, plan, wanted), folder, rank, options, total, progress)
    return ShardReport(summary["texts"], len(plan), len(wanted))


def _planned(documents: Iterable[Document], characters: int) -> tuple[list[ShardOrigin], dict[str, Any]]:
    """Origin of every shard, and what the manifest says of the input."""
    plan: list[ShardOrigin] = []
    first = total = 0
    for window in windows(documents, characters, _text):
        plan.append(ShardOrigin(first, len(window), _digest(window)))
        first += len(window)
        total += sum(len(_text(document)) for document in window)
    digest = hashlib.blake2b("".join(origin.digest for origin in plan).encode(), digest_size=16).hexdigest()
    return plan, {"texts": first, "characters": total, "digest": digest}


def _chosen(
    documents: Iterable[Document], plan: Sequence[ShardOrigin], wanted: Sequence[int]
) -> Iterator[tuple[int, ShardOrigin, list[Document]]]:
    """The documents of the wanted shards; the others are read and passed over."""
    source = iter(documents)
    place = 0
    for number in wanted:
        origin = plan[number]
        window = list(islice(source, origin.first - place, origin.first - place + origin.texts))
        place = origin.first + origin.texts
        if _digest(window) != origin.digest:
            raise RuntimeError(f"the input changed while it was read: documents {origin.first} to {place - 1}")
        yield number, origin, window


def _encode(
    model: M3Model,
    shards: Iterator[tuple[int, ShardOrigin, list[Document]]],
    folder: Path,
    rank: int,
    options: EncodingOptions,
    total: int,
    progress: bool,
) -> None:
    """Encode and write shards; while one is written, the next is computed."""
    read: deque[tuple[int, ShardOrigin, list[Document]]] = deque()

    def texts() -> Iterator[list[str]]:
        for shard in shards:
            read.append(shard)
            yield [_text(document) for document in shard[2]]

    writing: Future[None] | None = None
    with ThreadPoolExecutor(1) as writer:
        for embeddings in encode_windows(model, texts(), options, progress=progress, total=total):
            number, origin, documents = read.popleft()
            segment = Segment.of([name for name, _ in documents], [content for _, content in documents], embeddings)
            if writing is not None:
                writing.result()
            writing = writer.submit(write_shard, folder, number, origin, segment, rank)
        if writing is not None:
            writing.result()


def _described(
    model: M3Model, options: EncodingOptions, shard_characters: int, model_name: str | None
) -> dict[str, Any]:
    return {
        "model": model_name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.config.quantization,
        "dense": options.dense,
        "sparse": options.sparse,
        "multi_vector": options.multi_vector,
        "multi_vector_dtype": str(options.multi_vector_dtype).removeprefix("torch."),
        "max_length": min(options.max_length, model.max_length),
        "role": options.role,
        "shard_characters": shard_characters,
    }


def _check_same(folder: Path, begun: Manifest, now: Manifest) -> None:
    if not same_model(begun.fingerprint, now.fingerprint):
        made_by = f" ({begun.options['model']})" if begun.options["model"] else ""
        raise ValueError(f"{folder} was begun with another model{made_by}; their vectors do not fit")
    for name, value in now.options.items():
        if name != "model" and begun.options.get(name) != value:
            raise ValueError(f"{folder} was begun with {name} {begun.options.get(name)}, now it is {value}")
    if begun.input != now.input:
        raise ValueError(
            f"{folder} was begun with another input: {begun.input['texts']} texts of {begun.input['characters']}"
            f" characters, now {now.input['texts']} of {now.input['characters']}, or other ids, contents or order"
        )


def _checked_shards(folder: Path, plan: Sequence[ShardOrigin]) -> set[int]:
    """Numbers of the shards that are there, each of them whole by its header and of the right documents."""
    present = present_shards(folder)
    for number in present:
        if number >= len(plan) or read_origin(folder, number) != plan[number]:
            raise ValueError(f"shard {number} in {folder} is of another input; delete it and it is encoded again")
    return set(present)


def _text(document: Document) -> str:
    text = document[1].get("text")
    if not isinstance(text, str):
        raise ValueError(f'document {document[0]!r} has no "text" that is a string')
    return text


def _digest(documents: Sequence[Document]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for name, content in documents:
        state.update(json.dumps([name, content], ensure_ascii=True).encode() + b"\n")
    return state.hexdigest()
