"""m3 index: make an index of a collection, or add to one."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m3model.cli.options import (
    AsJson,
    BatchTokens,
    Device,
    Dtype,
    Files,
    FloatType,
    Lines,
    MaxLength,
    Model,
    load_model,
    torch_dtype,
)

if TYPE_CHECKING:
    from m3model.embeddings import EncodedTexts


def index(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the index; one that is there is added to.")],
    files: Files = None,
    lines: Lines = False,
    multi_vector: Annotated[bool, typer.Option(help="Keep a vector for every token, to rerank with.")] = True,
    row_dtype: Annotated[FloatType, typer.Option(help="Type in which those vectors are kept.")] = FloatType.float16,
    max_length: MaxLength = 8192,
    batch_tokens: BatchTokens = None,
    block: Annotated[int, typer.Option(min=1, help="Documents encoded and saved at a time.")] = 256,
    device: Device = "cpu",
    dtype: Dtype = FloatType.float32,
    as_json: AsJson = False,
) -> None:
    """Index texts. Documents whose id the index holds are passed over, so a run that was stopped can be repeated."""
    from m3model.cli.inputs import read_documents
    from m3model.cli.output import document_bar, print_json, print_table
    from m3model.retrieval import ExactIndex, fingerprint
    from m3model.retrieval.storage import is_index
    from m3model.retrieval.streaming import ingest_stream

    documents = read_documents(files, lines=lines)
    loaded = load_model(model, device, dtype)
    mark = fingerprint(loaded)
    if is_index(out):
        collection = ExactIndex.load(out)
        collection.check_model(mark)
    else:
        name = os.path.abspath(model) if os.path.isdir(model) else model
        collection = ExactIndex(mark, {"model": name, "max_length": max_length})

    def embed(contents: Sequence[Mapping[str, Any]]) -> EncodedTexts:
        return loaded.encode(
            [content["text"] for content in contents],
            multi_vector=multi_vector,
            multi_vector_dtype=torch_dtype(row_dtype),
            max_length=max_length,
            batch_tokens=batch_tokens,
        )

    begin, before, read = time.monotonic(), len(collection), 0
    stream = ((document.id, {"text": document.text, **document.fields}) for document in documents)
    with document_bar("index") as advance:
        for stored in ingest_stream(collection, stream, embed, folder=str(out), block=block):
            read += len(stored)
            advance(len(stored))
    if not read:
        collection.save(out)
    added = len(collection) - before
    facts = {
        "index": str(out),
        "documents": len(collection),
        "added": added,
        "known": read - added,
        "seconds": round(time.monotonic() - begin, 3),
        "bytes": collection.nbytes,
    }
    if as_json:
        print_json(facts)
    else:
        print_table(list(facts), [[str(value) for value in facts.values()]])
