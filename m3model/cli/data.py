"""m3 data: looking at training files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3model.cli.options import AsJson, existing_files

if TYPE_CHECKING:
    from m3model.training.inspection import TrainingDataReport

data = typer.Typer(no_args_is_help=True, help="Look at training files.")

_FINDINGS = {
    "repeated_queries": "rows whose query an earlier row has",
    "repeated_passages": "rows that name one passage twice",
    "leaked_positives": "rows with a negative that is a positive of the same query",
    "query_as_passage": "rows whose query is one of their passages",
}


@data.callback()
def _group() -> None:
    """Look at training files."""


@data.command()
def check(
    files: Annotated[
        list[Path],
        typer.Argument(callback=existing_files, help="JSON lines, also packed: .gz, .bz2, .xz, .zst."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Measure lengths in this model's tokens [default: characters].", metavar="MODEL"
        ),
    ] = None,
    bad: Annotated[int, typer.Option(min=1, help="Bad rows to name.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Check training rows: counts, lengths by language, repeated texts, positives among negatives.

    The language is the row's "language" or "lang"; without one it is the script of its query. Bad rows are named by
    file and line on stderr, and make the exit status 1.
    """
    from m3model.cli.output import document_bar, print_json
    from m3model.training.inspection import inspect_training_files

    measure = None if model is None else _TokenCounter(model)
    with document_bar("check", unit="rows") as advance:
        report = inspect_training_files(files, measure=measure, bad_limit=bad, advance=advance)
    if as_json:
        print_json({"unit": "characters" if model is None else "tokens", **report.to_dict()})
    else:
        _print(report, "characters" if model is None else "tokens")
    for message in report.bad:
        typer.echo(f"error: {message}", err=True)
    if more := report.bad_rows - len(report.bad):
        typer.echo(f"error: and {more} more bad rows", err=True)
    if report.bad_rows:
        raise typer.Exit(1)


class _TokenCounter:
    """Lengths of texts in the tokens of a model, special tokens included."""

    def __init__(self, model: str) -> None:
        from m3model.folder import locate
        from m3model.tokenizer import TextTokenizer

        self._tokenizer = TextTokenizer.from_folder(locate(model, None))

    def __call__(self, texts: list[str]) -> Sequence[int]:
        return [len(ids) for ids in self._tokenizer.encode(texts, 1 << 30).ids]


def _print(report: TrainingDataReport, unit: str) -> None:
    from m3model.cli.output import print_table

    counts = ["rows", "bad rows", "positives", "negatives", "no negatives", "with scores", "with prompt"]
    files = [[str(value) for value in vars(facts).values()] for facts in report.files]
    print_table(["file", *counts], files, right=counts)
    columns = ["texts", "mean", "median", "99 %", "longest"]
    lengths = [
        [one.language, one.kind, str(one.texts), f"{one.mean:.1f}"]
        + [str(value) for value in (one.median, one.percentile_99, one.largest)]
        for one in report.lengths
    ]
    print_table(["language", "texts of", *columns], lengths, title=f"lengths in {unit}", right=columns)
    found = report.repeated
    rows = [["different queries", str(found.distinct_queries), ""]]
    rows += [["different passages", str(found.distinct_passages), ""]]
    rows += [
        [what, str(getattr(found, name)), ", ".join(found.examples.get(name, []))] for name, what in _FINDINGS.items()
    ]
    print_table(["found", "count", "where (first)"], rows, right=["count"])
