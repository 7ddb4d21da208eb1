"""m3 index: make an index of a collection, or add to one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
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
    OptionalModel,
    Quantize,
    load_model,
    torch_dtype,
)

if TYPE_CHECKING:
    import torch

    from m3model.embeddings import EncodedTexts
    from m3model.quantization import Quantization
    from m3model.retrieval import ExactIndex
    from m3model.retrieval.coded_vectors import RowBits


class RowType(str, Enum):
    """How multi-vectors are kept, by name."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"
    one_bit = "1bit"

    @property
    def bits(self) -> RowBits | None:
        """Of an element, where codes are kept."""
        return {RowType.int8: 8, RowType.one_bit: 1}.get(self)  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """In which the vectors come; codes are made of the exact ones."""
        return torch_dtype(FloatType.float32 if self.bits else FloatType(self.value))


def index(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the index; one that is there is added to.")],
    model: OptionalModel = None,
    files: Files = None,
    encoded: Annotated[
        Path | None,
        typer.Option(help="Take texts and vectors from this folder of `m3 encode --out` instead of a model and files."),
    ] = None,
    lines: Lines = False,
    multi_vector: Annotated[
        bool,
        typer.Option(
            help="Keep a vector for every token, to rerank with; without, `m3 search` makes them of candidates."
        ),
    ] = True,
    row_dtype: Annotated[
        RowType,
        typer.Option(help="How those vectors are kept: int8 takes half of float16, 1bit a 16th, a little less exact."),
    ] = RowType.float16,
    max_length: MaxLength = 8192,
    window: Annotated[
        int | None,
        typer.Option(min=8, help="Cut documents into windows of so many tokens; `m3 search` answers with documents."),
    ] = None,
    overlap: Annotated[int, typer.Option(min=0, help="Tokens that a window shares with the one before.")] = 64,
    late: Annotated[
        bool, typer.Option("--late", help="Encode windows in the context of their document (late chunking).")
    ] = False,
    batch_tokens: BatchTokens = None,
    block: Annotated[int, typer.Option(min=1, help="Documents encoded and saved at a time.")] = 256,
    device: Device = "cpu",
    dtype: Dtype = FloatType.float32,
    quantize: Quantize = None,
    as_json: AsJson = False,
) -> None:
    """Index texts. Documents that the index holds are passed over, so a run that was stopped can be repeated; those
    whose text or other fields have changed are replaced."""
    from m3model.cli.output import document_bar, print_json, print_table

    if encoded is not None:
        if window is not None or late:
            raise typer.BadParameter("encoded texts cannot be cut any more", param_hint="--window, --late")
        if files:
            raise typer.BadParameter(
                "texts come from files or from an encoded folder, not both", param_hint="--encoded"
            )
        collection, stream = _from_shards(encoded, out, row_dtype if multi_vector else None)
    elif model is None:
        raise typer.BadParameter("give a model, or a folder of encoded texts", param_hint="--model or --encoded")
    else:
        chosen = {
            "multi_vector": multi_vector,
            "multi_vector_dtype": row_dtype.dtype,
            "max_length": max_length,
            "batch_tokens": batch_tokens,
        }
        if late and window is None:
            raise typer.BadParameter("late chunking needs --window", param_hint="--late")
        if window is not None and window > max_length:
            raise typer.BadParameter(f"a window of {window} tokens is longer than --max-length", param_hint="--window")
        cutting = None if window is None else {"length": window, "overlap": overlap, "late": late}
        collection, stream = _from_files(
            model, files, lines, out, block, device, dtype, quantize, chosen, cutting, row_dtype.bits
        )
    begin, before, read = time.monotonic(), len(collection), 0
    with document_bar("index") as advance:
        for stored in stream:
            read += len(stored)
            advance(len(stored))
    if not read:
        collection.save(out)
    added = len(collection) - before
    facts = {
        "index": str(out),
        "windows" if "windows" in collection.metadata else "documents": len(collection),
        "added": added,
        "known": read - added,
        "seconds": round(time.monotonic() - begin, 3),
        "bytes": collection.nbytes,
    }
    if as_json:
        print_json(facts)
    else:
        print_table(list(facts), [[str(value) for value in facts.values()]])


def _from_files(
    model: str,
    files: list[Path] | None,
    lines: bool,
    out: Path,
    block: int,
    device: str,
    dtype: FloatType,
    quantize: Quantization | None,
    chosen: dict[str, Any],
    cutting: dict[str, Any] | None,
    row_bits: RowBits | None,
) -> tuple[ExactIndex, Iterator[list[str]]]:
    """The index, and the ids of each block as it is encoded and stored."""
    from m3model.cli.inputs import read_documents
    from m3model.retrieval import fingerprint
    from m3model.retrieval.chunking import WindowedStream
    from m3model.retrieval.streaming import ingest_stream

    documents = read_documents(files, lines=lines)
    loaded = load_model(model, device, dtype, quantize)
    name = os.path.abspath(model) if os.path.isdir(model) else model
    metadata = {"model": name, "max_length": chosen["max_length"], "quantization": loaded.config.quantization}
    metadata |= {} if cutting is None else {"windows": cutting}
    collection = _opened(out, fingerprint(loaded), metadata, row_bits)
    if len(collection) and collection.metadata.get("windows") != cutting:
        raise typer.BadParameter(
            f"the index was made with {_described(collection.metadata.get('windows'))}, not {_described(cutting)}",
            param_hint="--window, --overlap, --late",
        )
    texts = ((document.id, {"text": document.text, **document.fields}) for document in documents)
    if cutting is not None:
        windowed = WindowedStream(loaded, collection, **cutting, block=block, **chosen)
        cut = windowed.windows(texts)
        return collection, ingest_stream(collection, cut, windowed.encode, folder=str(out), block=block)

    def embed(contents: Sequence[Mapping[str, Any]]) -> EncodedTexts:
        return loaded.encode([content["text"] for content in contents], **chosen)

    return collection, ingest_stream(collection, texts, embed, folder=str(out), block=block)


def _described(cutting: Mapping[str, Any] | None) -> str:
    if cutting is None:
        return "whole documents"
    late = " --late" if cutting["late"] else ""
    return f"--window {cutting['length']} --overlap {cutting['overlap']}{late}"


def _from_shards(encoded: Path, out: Path, row_dtype: RowType | None) -> tuple[ExactIndex, Iterator[list[str]]]:
    """As _from_files, out of a folder of shards; row_dtype None leaves multi-vectors out."""
    from m3model.retrieval.streaming import ingest_shards
    from m3model.shards import EncodedShards

    shards = EncodedShards(encoded)
    kept = ("model", "max_length", "quantization")
    metadata = {name: shards.options[name] for name in kept if shards.options.get(name) is not None}
    collection = _opened(out, shards.fingerprint, metadata, None if row_dtype is None else row_dtype.bits)
    rows = None if row_dtype is None else row_dtype.dtype
    return collection, ingest_shards(collection, shards, str(out), multi_vector_dtype=rows)


def _opened(out: Path, mark: str, metadata: dict[str, Any], row_bits: RowBits | None) -> ExactIndex:
    """The index that is there, if it is of the same model and keeps multi-vectors alike, or a new one."""
    from m3model.retrieval import ExactIndex
    from m3model.retrieval.storage import is_index

    if not is_index(out):
        return ExactIndex(mark, metadata, row_bits)
    collection = ExactIndex.load(out)
    collection.check_model(mark)
    if not len(collection):
        collection.row_bits = row_bits
    elif "multi_vector" in collection.parts and collection.row_bits != row_bits:
        kept = {8: "int8", 1: "1bit", None: "floats"}
        raise typer.BadParameter(
            f"the index keeps multi-vectors as {kept[collection.row_bits]}, not {kept[row_bits]}",
            param_hint="--row-dtype",
        )
    return collection
