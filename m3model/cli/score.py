"""m3 score: the five scores of a query and passages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from m3model.cli.options import (
    AsJson,
    BatchTokens,
    Device,
    Dtype,
    FloatType,
    MaxLength,
    Model,
    Weights,
    existing_files,
    load_model,
    parse_weights,
)


def score(
    model: Model,
    query: Annotated[str | None, typer.Argument(help="A query.", show_default=False)] = None,
    passages: Annotated[list[str] | None, typer.Argument(help="Passages to score it with.", show_default=False)] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            callback=existing_files,
            help='File of JSON lines {"query": ..., "passage": ...} instead.',
        ),
    ] = None,
    weights: Weights = "1,0.3,1",
    max_length: MaxLength = 8192,
    batch_tokens: BatchTokens = None,
    device: Device = "cpu",
    dtype: Dtype = FloatType.float32,
    as_json: AsJson = False,
) -> None:
    """Score a query with passages, or pairs from a file: dense, sparse, multi-vector and their weighted means."""
    from m3model.cli.inputs import read_pairs
    from m3model.cli.output import print_json, print_table, shortened

    mix = parse_weights(weights)
    if (pairs is None) == (query is None) or (query is not None and not passages):
        raise typer.BadParameter("give a query and at least one passage, or --pairs", param_hint="QUERY PASSAGES")
    listed = read_pairs(pairs) if pairs is not None else [(str(query), passage) for passage in passages or []]
    distinct = list(dict.fromkeys(text for text, _ in listed)), list(dict.fromkeys(text for _, text in listed))
    numbers = [{text: number for number, text in enumerate(texts)} for texts in distinct]
    scores = load_model(model, device, dtype).score(
        *distinct,
        weights=mix,
        pairs=[(numbers[0][query], numbers[1][passage]) for query, passage in listed],
        max_length=max_length,
        batch_tokens=batch_tokens,
    )
    values = [dict(zip(scores, row)) for row in zip(*(column.tolist() for column in scores.values()))]
    if as_json:
        for (asked, passage), row in zip(listed, values):
            print_json({"query": asked, "passage": passage, **row})
        return
    columns = [*scores, "query", "passage"]
    cells = [
        [*(f"{value:.4f}" for value in row.values()), shortened(asked, 40), shortened(passage, 60)]
        for (asked, passage), row in zip(listed, values)
    ]
    print_table(columns, cells, right=" ".join(scores))
