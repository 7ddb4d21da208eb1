"""m3 explain: why a passage fits a query."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from m3model.cli.options import AsJson, Device, Dtype, FloatType, MaxLength, Model, Weights, load_model, parse_weights


def explain(
    model: Model,
    query: Annotated[str, typer.Argument(help="The query.")],
    passage: Annotated[str, typer.Argument(help="The passage, or with --file a file that holds it.")],
    file: Annotated[bool, typer.Option("--file", help="PASSAGE names a text file.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page here.", dir_okay=False)] = None,
    png: Annotated[Path | None, typer.Option(help="Write the heat map of similarities here.", dir_okay=False)] = None,
    weights: Weights = "1,0.3,1",
    max_length: MaxLength = 8192,
    device: Device = "cpu",
    dtype: Dtype = FloatType.float32,
    as_json: AsJson = False,
) -> None:
    """Show which tokens matched: token weights, shared tokens, and what each query token found in the passage."""
    from m3model.cli.output import message, print_json, stdout
    from m3model.explanation import explain, to_html, to_png, to_text

    mix = parse_weights(weights)
    text = Path(passage).read_text(encoding="utf-8") if file else passage
    found = explain(load_model(model, device, dtype), query, text, weights=mix, max_length=max_length)
    if html is not None:
        html.write_text(to_html(found), encoding="utf-8", errors="replace")
        message(f"wrote {html}")
    if png is not None:
        png.write_bytes(to_png(found))
        message(f"wrote {png}")
    if as_json:
        pairs = [(row + 1, column + 1) for row, column in enumerate(found.best.tolist())]
        print_json(
            {
                "scores": found.scores,
                "shared": [[e.token, e.query_weight, e.passage_weight, e.product] for e in found.shared],
                "query": list(zip(found.query_tokens, found.query_weights.tolist())),
                "passage": list(zip(found.passage_tokens, found.passage_weights.tolist())),
                "matches": [[row, column, float(found.similarity[row - 1, column - 1])] for row, column in pairs],
            }
        )
    else:
        stdout().print(to_text(found), soft_wrap=True)
