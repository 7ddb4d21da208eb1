"""Streamed ingest into an index: blocks of documents are encoded, added and stored; then they are acknowledged.
Shards of `m3 encode --out FOLDER` are stored the same way without being encoded again.

What was acknowledged survives a crash; what was not is encoded again when the same stream is given again. A document
that the index holds as it is given is passed over, so that ingest can be stopped and repeated at any time and nothing
is doubled; one whose JSON object has changed is encoded and replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from m3model.embeddings import EncodedTexts, M3Embeddings
from m3model.retrieval.exact import ExactIndex
from m3model.retrieval.fingerprint import document_digest
from m3model.retrieval.milvus import MilvusIndex
from m3model.shards import EncodedShards

__all__ = ["ingest_shards", "ingest_stream"]

Document = tuple[str, Mapping[str, Any]]
"""Id and JSON object of a document."""


def ingest_stream(
    index: ExactIndex | MilvusIndex,
    documents: Iterable[Document],
    encode: Callable[[Sequence[Mapping[str, Any]]], EncodedTexts],
    *,
    folder: str | None = None,
    block: int = 1024,
) -> Iterator[list[str]]:
    """Add a stream of documents; yields the ids of each block once they are stored.

    Args:
        index: an ExactIndex, which is saved to `folder` after every block, or a MilvusIndex.
        documents: ids and JSON objects.
        encode: from the JSON objects of a block to their embeddings; called for new and changed documents only.
        folder: of the ExactIndex.
        block: documents encoded and stored together.

    Raises:
        ValueError: an id comes twice in the stream with different objects, an ExactIndex without folder, or block
            below 1.
    """
    if isinstance(index, ExactIndex) == (folder is None):
        raise ValueError("folder is for an ExactIndex, which needs one; a MilvusIndex stores by itself")
    if block < 1:
        raise ValueError(f"block is {block}; accepted: at least 1")
    stream = iter(documents)
    seen: set[str] = set()
    while taken := list(islice(stream, block)):
        fresh: dict[str, Mapping[str, Any]] = {}
        for document, content in taken:
            if fresh.setdefault(document, content) != content:
                raise _twice(document)
        held = index.digests(list(fresh))
        new = {name: content for name, content in fresh.items() if held.get(name) != document_digest(content)}
        _check_unseen(seen, fresh, new)
        if new:
            contents = list(new.values())
            index.upsert(list(new), encode(contents), contents)
            if isinstance(index, ExactIndex):
                assert folder is not None
                index.save(folder)
        yield list(fresh)


def ingest_shards(
    index: ExactIndex,
    shards: EncodedShards,
    folder: str,
    *,
    multi_vector_dtype: torch.dtype | None = torch.float16,
) -> Iterator[list[str]]:
    """Add encoded documents; yields the ids of each shard once it is stored in `folder`.

    Args:
        index: documents that it holds as they are in the shards are passed over.
        multi_vector_dtype: type in which multi-vectors are kept; None leaves them out.

    Raises:
        ValueError: the texts were encoded as queries, an id comes twice with different objects, or the
            embeddings do not fit those of the index.
    """
    if shards.options["role"] != "passage":
        raise ValueError(f"{shards.folder} was encoded with role {shards.options['role']}; accepted: passage")
    seen: set[str] = set()
    for segment in shards:
        ids = segment.ids.strings()
        fresh: dict[str, int] = {}
        for number, name in enumerate(ids):
            if segment.document(fresh.setdefault(name, number)) != segment.document(number):
                raise _twice(name)
        held = index.digests(list(fresh))
        changed = {name: n for name, n in fresh.items() if held.get(name) != document_digest(segment.document(n))}
        _check_unseen(seen, fresh, changed)
        new = list(changed.values())
        if new:
            embeddings = segment.embeddings
            rows = embeddings.multi_vector
            if rows is not None:
                rows = None if multi_vector_dtype is None else rows._replace(rows=rows.rows.to(multi_vector_dtype))
            chosen = M3Embeddings(embeddings.dense, embeddings.sparse, rows).select(new)
            index.upsert([ids[number] for number in new], chosen, [segment.document(number) for number in new])
            index.save(folder)
        yield ids


def _check_unseen(seen: set[str], block: Iterable[str], new: Iterable[str]) -> None:
    """Raise ValueError if a document that must be written was in a block before; note those of this block."""
    if again := seen.intersection(new):
        raise _twice(min(again))
    seen.update(block)


def _twice(document: str) -> ValueError:
    return ValueError(f"the id {document!r} comes twice with different contents")
