"""m3 mine: hard negatives for training rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from m3model.cli.options import (
    AsJson,
    BatchTokens,
    Device,
    Dtype,
    FloatType,
    Lines,
    Model,
    Weights,
    existing_files,
    load_model,
    parse_weights,
)

if TYPE_CHECKING:
    from m3model.model import M3Model
    from m3model.retrieval.milvus import MilvusIndex


def mine(
    model: Model,
    rows: Annotated[
        Path, typer.Argument(callback=existing_files, help="Training rows: JSON lines with query and pos, also packed.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON lines with the new neg; appears when complete.")],
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            callback=existing_files, help="Passages to choose from, as for m3 index [default: pos and neg of all rows]."
        ),
    ] = None,
    lines: Lines = False,
    negatives: Annotated[int, typer.Option(min=1, help="Negatives of each row.")] = 15,
    ranks: Annotated[
        str, typer.Option(help="Ranks to sample from, the best is 0; the last is left out.", metavar="FIRST-END")
    ] = "10-210",
    margin: Annotated[
        float | None, typer.Option(min=0, help="Drop passages that score above the lowest positive less this.")
    ] = None,
    relative_margin: Annotated[
        float | None, typer.Option(min=0, help="The same, as a fraction of the positive's score: 0.05.")
    ] = None,
    fill: Annotated[bool, typer.Option(help="Top up with random passages.")] = True,
    head: Annotated[
        Literal["dense", "sparse", "multi_vector", "dense+sparse", "all"], typer.Option(help="What to rank by.")
    ] = "dense",
    weights: Weights = "1,0.3,1",
    query_instruction: Annotated[str, typer.Option(help="Before queries whose row has no prompt.")] = "",
    passage_instruction: Annotated[str, typer.Option(help="Before all passages.")] = "",
    query_max_length: Annotated[int, typer.Option(min=3, help="Tokens at which longer queries are cut.")] = 512,
    passage_max_length: Annotated[int, typer.Option(min=3, help="Tokens at which longer passages are cut.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples.")] = 0,
    milvus: Annotated[
        str | None,
        typer.Option(
            help="Search in Milvus: a new file ending in .db, or a URI; its token in MILVUS_TOKEN.", metavar="PLACE"
        ),
    ] = None,
    collection: Annotated[str, typer.Option(help="In Milvus; must be new and stays.")] = "mine",
    block: Annotated[int, typer.Option(min=1, help="Passages and rows encoded and stored at a time.")] = 512,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an unfinished run has done.")] = False,
    batch_tokens: BatchTokens = None,
    device: Device = "cpu",
    dtype: Dtype = FloatType.float32,
    as_json: AsJson = False,
) -> None:
    """Give training rows new negatives: passages that the model ranks high, never a positive of the same query.

    A run that was stopped or killed goes on where it was when it is repeated.
    """
    from m3model.cli.inputs import read_documents
    from m3model.cli.output import print_json, print_table
    from m3model.training.hard_negatives import MiningOptions, mine_hard_negatives

    try:
        first, end = (int(part) for part in ranks.split("-"))
        if first >= end:
            raise ValueError(ranks)
    except ValueError as error:
        raise typer.BadParameter(
            f"{ranks!r}; accepted: two ranks FIRST-END with FIRST before END, such as 10-210", param_hint="--ranks"
        ) from error
    try:
        options = MiningOptions(
            negatives=negatives,
            rank_range=(first, end),
            absolute_margin=margin,
            relative_margin=relative_margin,
            fill=fill,
            head=head,
            weights=parse_weights(weights, head),
            query_instruction=query_instruction,
            passage_instruction=passage_instruction,
            query_max_length=query_max_length,
            passage_max_length=passage_max_length,
            seed=seed,
            block=block,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if any(str(path) == "-" for path in (rows, *(corpus or []))):
        raise typer.BadParameter("rows and corpus are read more than once; give files", param_hint="-")
    if out.exists():
        raise typer.BadParameter(f"{out} is there already", param_hint="--out")

    def passages() -> Iterator[str]:
        return (document.text for document in read_documents(corpus, lines=lines))

    loaded = load_model(model, device, dtype)
    with ExitStack() as stack:
        progress = stack.enter_context(_bars())
        index = None if milvus is None else stack.enter_context(_milvus(milvus, collection, loaded, head))
        summary = mine_hard_negatives(
            loaded,
            rows,
            out,
            corpus=passages if corpus else None,
            options=options,
            milvus=index,
            batch_tokens=batch_tokens,
            restart=restart,
            progress=progress,
        )
    facts = {"out": str(out), **asdict(summary)}
    if as_json:
        print_json(facts)
    else:
        print_table([name.replace("_", " ") for name in facts], [[str(value) for value in facts.values()]])


def _milvus(place: str, collection: str, model: M3Model, head: str) -> MilvusIndex:
    """The index in Milvus, made if it is not there."""
    from m3model.retrieval.fingerprint import fingerprint
    from m3model.retrieval.milvus import MilvusIndex

    return MilvusIndex(
        place,
        collection,
        width=model.config.hidden_size,
        row_width=model.config.multi_vector_dim if head in ("multi_vector", "all") else None,
        fingerprint=fingerprint(model),
        token=os.environ.get("MILVUS_TOKEN", ""),
    )


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr for each stage; yields progress(stage, done, total). None without a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from m3model.cli.output import stderr

    console = stderr()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks = {stage: bars.add_task(stage, start=False, total=None) for stage in ("corpus", "rows")}

        def progress(stage: str, done: int, total: int) -> None:
            bars.start_task(tasks[stage])
            bars.update(tasks[stage], completed=done, total=total)

        yield progress
