"""m3 encode: representations of texts."""

from __future__ import annotations

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
    load_model,
)

if TYPE_CHECKING:
    from m3model.embeddings import EncodedTexts
    from m3model.model import M3Model


def encode(
    model: Model,
    files: Files = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write a .npz file with ids, dense, sparse_* and multi_vector_*.")
    ] = None,
    role: Annotated[
        Literal["query", "passage"], typer.Option(help="Which of the model's prefixes to use.")
    ] = "passage",
    dense: Annotated[bool, typer.Option(help="Dense vectors.")] = True,
    sparse: Annotated[bool, typer.Option(help="Token weights.")] = True,
    multi_vector: Annotated[bool, typer.Option(help="A vector for every token.")] = False,
    lines: Lines = False,
    max_length: MaxLength = 8192,
    batch_tokens: BatchTokens = None,
    device: Device = "cpu",
    dtype: Dtype = FloatType.float32,
    as_json: AsJson = False,
) -> None:
    """Encode texts: a table or JSON lines on stdout, or a .npz file."""
    from m3model.cli.inputs import read_documents
    from m3model.cli.output import message, print_json, stderr

    if not (dense or sparse or multi_vector):
        raise typer.BadParameter("nothing is left to compute", param_hint="--no-dense --no-sparse")
    documents = list(read_documents(files, lines=lines))
    loaded = load_model(model, device, dtype)
    encoded = loaded.encode(
        [document.text for document in documents],
        dense=dense,
        sparse=sparse,
        multi_vector=multi_vector,
        max_length=max_length,
        batch_tokens=batch_tokens,
        role=role,
        progress=stderr().is_terminal,
    )
    ids = [document.id for document in documents]
    if out is not None:
        _save(out, ids, encoded)
        message(f"{len(ids)} texts -> {out}")
    elif as_json:
        for number, name in enumerate(ids):
            print_json({"id": name, **_as_json(encoded.select([number]))})
    else:
        _print_table(loaded, ids, encoded)


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
    import os

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
    fresh = path.with_name(f".{path.name}.new")
    try:
        with open(fresh, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
