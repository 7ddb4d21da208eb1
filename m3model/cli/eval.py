"""m3 eval: the tables of a retrieval benchmark."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from m3model.cli.options import (
    AsJson,
    BatchTokens,
    Device,
    Dtype,
    FloatType,
    MaxLength,
    Model,
    Quantize,
    load_model,
    parse_weights,
)

if TYPE_CHECKING:
    from m3model.evaluation import HybridWeights, Results, System, Task
    from m3model.retrieval import Head

_DATASETS = "miracl, mkqa, mldr, narrativeqa, beir, squad or xquad"
_PRESETS = "miracl, mkqa, mldr or beir"


def evaluate(
    model: Model,
    dataset: Annotated[str, typer.Option(help=f"{_DATASETS}; how each is laid out: m3model.evaluation.datasets.")],
    data: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder with the dataset's files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of report, runs and judgements.")] = Path("eval"),
    heads: Annotated[
        str,
        typer.Option(help="Rankings with commas: dense,sparse,multi_vector,dense+sparse,all; all alone: each of them."),
    ] = "all",
    languages: Annotated[
        str | None, typer.Option(help="Languages (or file names) with commas [default: all].", metavar="XX,YY")
    ] = None,
    settings: Annotated[
        str | None,
        typer.Option(help="xquad: monolingual,cross-lingual,pool,pool-all [default: all of them].", metavar="S,T"),
    ] = None,
    queries: Annotated[
        int | None, typer.Option(min=1, help="At most so many queries of each task, evenly spread [default: all].")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help=f"Published hybrid weights: {_PRESETS} [default: the dataset's].")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Weights of dense, sparse and multi-vector instead of published ones.", metavar="D,S,M"),
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Candidates of the dense and of the sparse head [default: 1000].")
    ] = None,
    rerank: Annotated[
        int | None, typer.Option(min=1, help="Dense candidates that multi-vector and the sum rerank [default: 200].")
    ] = None,
    bm25: Annotated[bool, typer.Option(help="Also BM25 over the model's tokens.")] = True,
    baseline: Annotated[
        list[str] | None, typer.Option(help="Also this model of sentence-transformers; may be repeated.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder of encodings, for several runs of one model; it stays. [default: OUT/cache]"),
    ] = None,
    keep: Annotated[
        Literal["all", "runs", "report"],
        typer.Option(
            help="What stays in OUT beside report and results.json. all: runs/ and qrels/ in TREC format for other"
            " tools, about 60 bytes for each of up to 1000 passages a query, task and system; and cache/, embeddings of"
            " all texts (multi-vectors: 2 · width bytes a token), with which another run encodes nothing. runs: without"
            " cache. report: without both."
        ),
    ] = "all",
    max_length: MaxLength = 8192,
    query_max_length: Annotated[int, typer.Option(min=3, help="Tokens at which longer queries are cut.")] = 512,
    batch_tokens: BatchTokens = None,
    device: Device = "cpu",
    dtype: Dtype = FloatType.float32,
    quantize: Quantize = None,
    as_json: AsJson = False,
) -> None:
    """Measure all heads on a benchmark: report.md, report.html, TREC runs, and the leading measure as a table here.

    The search is the paper's, with other depths and weights where they are given: 1000 dense and 1000 sparse candidates
    united, the best 200 dense ones reranked.
    """
    from m3model.cli.output import message
    from m3model.evaluation import BM25, DenseBaseline, M3System, evaluate, write_report
    from m3model.evaluation import preset as published

    tasks = _tasks(dataset, data, languages, settings, queries)
    chosen = _heads(heads)
    used = _weights(published(preset or tasks[0].preset), weights, candidates, rerank)
    loaded = load_model(model, device, dtype, quantize)
    assert loaded.tokenizer is not None
    place = cache or out / "cache"
    system = M3System(
        loaded,
        place,
        heads=chosen,
        weights=used,
        max_length=max_length,
        query_max_length=query_max_length,
        batch_tokens=batch_tokens,
        progress=message,
    )
    systems: list[System] = [system]
    if bm25:
        systems.append(BM25(loaded.tokenizer, max_length=max_length))
    systems += [DenseBaseline.from_sentence_transformers(name) for name in baseline or []]
    results = evaluate(tasks, systems, out, progress=message)
    note = _note(model, tasks, used, max_length, query_max_length)
    for path in write_report(results, out, f"{dataset}: {os.path.basename(model.rstrip('/'))}", note=note):
        message(f"wrote {path}")
    for unwanted in {"all": [], "runs": ["cache"], "report": ["cache", "runs", "qrels"]}[keep]:
        folder = out / unwanted
        if folder.is_dir() and not (cache is not None and folder.samefile(cache)):
            shutil.rmtree(folder)
    _show(results, as_json)


def _tasks(dataset: str, data: Path, languages: str | None, settings: str | None, queries: int | None) -> list[Task]:
    from m3model.evaluation import read_tasks
    from m3model.evaluation.datasets import read_xquad

    chosen = languages.split(",") if languages else None
    if settings is not None:
        if dataset != "xquad":
            raise typer.BadParameter("only xquad has settings", param_hint="--settings")
        tasks = read_xquad(data, chosen, settings=settings.split(","))
    else:
        tasks = read_tasks(dataset, data, chosen)
    return tasks if queries is None else [task.sample(queries) for task in tasks]


def _heads(text: str) -> list[Head]:
    from m3model.retrieval import HEADS

    asked = text.split(",")
    unknown = [head for head in asked if head not in HEADS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r}; accepted: all, or some of {', '.join(HEADS)}", param_hint="--heads")
    return [head for head in HEADS if text == "all" or head in asked]


def _weights(
    published: HybridWeights, weights: str | None, candidates: int | None, rerank: int | None
) -> HybridWeights:
    """The published weights and depths with those that were given in their place."""
    if weights is not None:
        dense, sparse, multi_vector = parse_weights(weights)
        published = replace(
            published, dense_sparse=(dense, sparse), all=(dense, sparse, multi_vector), source="given by --weights"
        )
    return replace(published, candidates=candidates or published.candidates, reranked=rerank or published.reranked)


def _note(model: str, tasks: list[Task], weights: HybridWeights, max_length: int, query_max_length: int) -> str:
    asked = {len(task.judged) for task in tasks}
    counts = f"{min(asked)}" if len(asked) == 1 else f"{min(asked)} to {max(asked)}"
    return (
        f"Model {model}; {counts} queries a task; texts cut at {max_length} tokens, queries at {query_max_length};"
        f" weights of dense+sparse {weights.dense_sparse}, of all {weights.all} ({weights.source});"
        f" {weights.candidates} candidates, {weights.reranked} dense ones reranked."
    )


def _show(results: Results, as_json: bool) -> None:
    """Means of each group's leading measure."""
    from m3model.cli.output import print_json, print_table

    for group in dict.fromkeys(task.group for task in results.tasks):
        tasks = [task for task in results.tasks if task.group == group]
        measure = tasks[0].measures[0]
        rows = []
        for system, values in results.values.items():
            means = [sum(values[task.name][measure].values()) / task.queries for task in tasks]
            rows.append((system, means, sum(means) / len(means)))
        if as_json:
            for system, means, mean in rows:
                named = dict(zip((task.name for task in tasks), means))
                print_json({"group": group, "measure": measure, "system": system, "mean": mean, "tasks": named})
            continue
        columns = ["system", *(task.name for task in tasks), "mean"]
        cells = [[system, *(f"{100 * value:.1f}" for value in (*means, mean))] for system, means, mean in rows]
        print_table(columns, cells, title=f"{tasks[0].dataset}, {group}: {measure}", right=" ".join(columns[1:]))
