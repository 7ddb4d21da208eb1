"""m3 encode: representations of texts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    Quantize,
    load_model,
    torch_dtype,
)
from m3model.files import whole_file

if TYPE_CHECKING:
    from m3model.embeddings import EncodedTexts
    from m3model.model import M3Model
    from m3model.quantization import Quantization


def encode(
    model: Model,
    files: Files = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "--output",
            "-o",
            help="A .npz file with ids, dense, sparse_* and multi_vector_*; or any other name: a folder of shards, for"
            " collections larger than memory. A run that was stopped goes on when it is started again; under torchrun"
            " the processes share the work.",
        ),
    ] = None,
    role: Annotated[
        Literal["query", "passage"], typer.Option(help="Which of the model's prefixes to use.")
    ] = "passage",
    dense: Annotated[bool, typer.Option(help="Dense vectors.")] = True,
    sparse: Annotated[bool, typer.Option(help="Token weights.")] = True,
    multi_vector: Annotated[bool, typer.Option(help="A vector for every token.")] = False,
    row_dtype: Annotated[FloatType, typer.Option(help="Type in which those are kept.")] = FloatType.float32,
    lines: Lines = False,
    shard_characters: Annotated[
        int | None,
        typer.Option(min=1, help="Characters of the texts of one shard [default: 262144 on a CPU, 2097152 on a GPU]."),
    ] = None,
    max_length: MaxLength = 8192,
    batch_tokens: BatchTokens = None,
    device: Device = "cpu",
    dtype: Dtype = FloatType.float32,
    quantize: Quantize = None,
    as_json: AsJson = False,
) -> None:
    """Encode texts: a table or JSON lines on stdout, a .npz file, or a folder of shards."""
    from m3model.cli.inputs import read_documents
    from m3model.cli.output import message, print_json, stderr

    if not (dense or sparse or multi_vector):
        raise typer.BadParameter("nothing is left to compute", param_hint="--no-dense --no-sparse")
    chosen: dict[str, Any] = {
        "dense": dense,
        "sparse": sparse,
        "multi_vector": multi_vector,
        "multi_vector_dtype": torch_dtype(row_dtype),
        "max_length": max_length,
        "batch_tokens": batch_tokens,
        "role": role,
    }
    if out is not None and out.suffix != ".npz":
        _encode_shards(model, files, lines, out, shard_characters, device, dtype, quantize, chosen, as_json)
        return
    if _place_among_processes()[1] > 1:
        raise typer.BadParameter("several processes write a folder of shards", param_hint="--out")
    if out is not None and row_dtype is FloatType.bfloat16:
        raise typer.BadParameter("a .npz file has no bfloat16; a folder of shards has", param_hint="--row-dtype")
    documents = list(read_documents(files, lines=lines))
    loaded = load_model(model, device, dtype, quantize)
    texts = [document.text for document in documents]
    encoded = loaded.encode(texts, progress=stderr().is_terminal, **chosen)
    ids = [document.id for document in documents]
    if out is not None:
        _save(out, ids, encoded)
        message(f"{len(ids)} texts -> {out}")
    elif as_json:
        for number, name in enumerate(ids):
            print_json({"id": name, **_as_json(encoded.select([number]))})
    else:
        _print_table(loaded, ids, encoded)


class _Documents:
    """The documents of files, read anew by every iteration, as encode_shards takes them."""

    def __init__(self, files: list[Path], lines: bool) -> None:
        self.files = files
        self.lines = lines

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        from m3model.cli.inputs import read_documents

        for document in read_documents(self.files, lines=self.lines):
            yield document.id, {"text": document.text, **document.fields}


def _encode_shards(
    model: str,
    files: list[Path] | None,
    lines: bool,
    folder: Path,
    shard_characters: int | None,
    device: str,
    dtype: FloatType,
    quantize: Quantization | None,
    chosen: dict[str, Any],
    as_json: bool,
) -> None:
    from m3model.cli.output import message, print_json, stderr
    from m3model.shards import encode_shards

    if not files or Path("-") in files:
        raise typer.BadParameter("a folder of shards is made of files, which can be read again", param_hint="FILES")
    rank, world_size = _place_among_processes()
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    report = encode_shards(
        load_model(model, device, dtype, quantize),
        _Documents(files, lines),
        folder,
        **chosen,
        shard_characters=shard_characters,
        model_name=os.path.abspath(model) if os.path.isdir(model) else model,
        rank=rank,
        world_size=world_size,
        progress=stderr().is_terminal and rank == 0,
    )
    if as_json:
        print_json({"folder": str(folder), "rank": rank, **report._asdict()})
    else:
        whose = f" by process {rank} of {world_size}" if world_size > 1 else ""
        message(f"{report.texts} texts in {report.shards} shards -> {folder} ({report.encoded} encoded now{whose})")


def _place_among_processes() -> tuple[int, int]:
    """Rank and number of processes as torchrun tells them."""
    try:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise typer.BadParameter(f"RANK and WORLD_SIZE in the environment must be numbers: {error}") from error


def _as_json(one: EncodedTexts) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if one.dense is not None:
        values["dense"] = one.dense[0].tolist()
    if one.sparse is not None:
        values["sparse"] = one.sparse.to_flag_embedding()[0]
    if one.multi_vector is not None:
        values["multi_vector"] = one.multi_vector.rows.tolist()
    return values


def _print_table(model: M3Model, ids: list[str], encoded: EncodedTexts) -> None:
    from m3model.cli.output import print_table, shortened

    columns = ["id"]
    columns += ["dense"] * (encoded.dense is not None)
    columns += ["tokens", "heaviest tokens"] if encoded.sparse is not None else []
    columns += ["rows"] * (encoded.multi_vector is not None)
    weights = encoded.sparse.to_dicts() if encoded.sparse is not None else []
    rows = []
    for number, name in enumerate(ids):
        row = [shortened(name, 40)]
        if encoded.dense is not None:
            row.append(" ".join(f"{value:+.3f}" for value in encoded.dense[number][:3]) + " …")
        if encoded.sparse is not None:
            heaviest = sorted(weights[number].items(), key=lambda entry: -entry[1])[:6]
            assert model.tokenizer is not None
            words = [f"{model.tokenizer.token(token).lstrip('▁')} {weight:.2f}" for token, weight in heaviest]
            row += [str(len(weights[number])), shortened(", ".join(words), 80)]
        if encoded.multi_vector is not None:
            row.append(str(int(encoded.multi_vector.offsets[number + 1] - encoded.multi_vector.offsets[number])))
        rows.append(row)
    print_table(columns, rows, right="tokens rows")


def _save(path: Path, ids: list[str], encoded: EncodedTexts) -> None:
    """Write the .npz file; it appears complete or not at all."""
    import numpy as np

    arrays: dict[str, Any] = {"ids": np.array(ids, dtype=str)}
    if encoded.dense is not None:
        arrays["dense"] = encoded.dense
    if encoded.sparse is not None:
        for name, part in encoded.sparse.compact()._asdict().items():
            arrays[f"sparse_{name}"] = part.numpy()
    if encoded.multi_vector is not None:
        arrays["multi_vector_rows"] = encoded.multi_vector.rows.numpy()
        arrays["multi_vector_offsets"] = encoded.multi_vector.offsets.numpy()
    with whole_file(path) as file:
        np.savez(file, **arrays)
