"""m3 search: ask an index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from m3model.cli.options import (
    AsJson,
    Device,
    Dtype,
    FloatType,
    Quantize,
    Weights,
    existing_files,
    load_model,
    parse_weights,
)

if TYPE_CHECKING:
    from m3model.embeddings import EncodedTexts
    from m3model.model import M3Model
    from m3model.retrieval import ExactIndex, Ranking


def search(
    index: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder made by `m3 index`.")],
    queries: Annotated[list[str] | None, typer.Argument(help="What to ask.", show_default=False)] = None,
    queries_from: Annotated[
        Path | None,
        typer.Option("--queries", callback=existing_files, help="File of queries, one a line or JSON lines."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model folder or hub id [default: the one of the index].")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Documents for each query.")] = 10,
    head: Annotated[
        Literal["dense", "sparse", "multi_vector", "dense+sparse", "all"], typer.Option(help="What to rank by.")
    ] = "all",
    weights: Weights = "1,0.3,1",
    candidates: Annotated[int, typer.Option(min=1, help="Candidates of the dense and of the sparse head.")] = 1000,
    rerank: Annotated[int, typer.Option(min=1, help="Candidates that the multi-vector head reranks.")] = 200,
    device: Device = "cpu",
    dtype: Dtype = FloatType.float32,
    quantize: Quantize = None,
    as_json: AsJson = False,
) -> None:
    """Search an index: a table for each query, or with --json a line of JSON.

    Heads "all" and "multi_vector" rerank; in an index made with --no-multi-vector the candidates are encoded for that.
    """
    from m3model.cli.inputs import read_queries
    from m3model.cli.output import message, print_json
    from m3model.retrieval import ExactIndex, fingerprint
    from m3model.retrieval.chunking import search_parents

    mix = parse_weights(weights, head)
    asked = [*(queries or []), *(read_queries(queries_from) if queries_from is not None else [])]
    if not asked:
        raise typer.BadParameter("give a query, or a file of them with --queries", param_hint="QUERIES")
    collection = ExactIndex.load(index)
    name = model or collection.metadata.get("model")
    if name is None:
        raise typer.BadParameter("the index does not say which model made it", param_hint="--model")
    loaded = load_model(name, device, dtype, quantize or collection.metadata.get("quantization"))
    collection.check_model(fingerprint(loaded))
    embedded = loaded.encode(asked, role="query")
    encode = None
    if collection.parts and "multi_vector" not in collection.parts and head in ("all", "multi_vector"):
        message(
            f"The index has no multi-vectors: the {max(rerank, k)} best documents of each query are encoded now."
            " --rerank takes fewer, --head dense+sparse none."
        )
        encode = partial(_candidates, loaded, collection.metadata.get("max_length", 8192))
    options: dict[str, Any] = {"head": head, "weights": mix, "candidates": candidates, "rerank": rerank}
    found: Sequence[Ranking]
    if "windows" in collection.metadata:
        found = search_parents(collection, embedded, k, **options, encode=encode)
    else:
        found = collection.search(embedded, k, **options, encode=encode)
    for query, ranking in zip(asked, found):
        contents = _contents(collection, ranking)
        if as_json:
            print_json({"query": query, "hits": [{**hit._asdict(), **own} for hit, own in zip(ranking, contents)]})
        else:
            _print(query, ranking, contents)


def _candidates(model: M3Model, max_length: int, contents: Sequence[Mapping[str, Any]]) -> EncodedTexts:
    texts = [content["text"] for content in contents]
    return model.encode(texts, dense=False, sparse=False, max_length=max_length)


def _contents(collection: ExactIndex, ranking: Ranking) -> list[dict[str, Any]]:
    """What is stored with each document; of one that was cut, its whole text and the best "window" of it."""
    from m3model.retrieval.chunking import ParentRanking, parent_document

    if not isinstance(ranking, ParentRanking):
        return [collection.document(name) for name in ranking.ids]
    contents = []
    for name, window in zip(ranking.ids, ranking.windows):
        found = collection.document(window)
        place = {"begin": found["window"]["begin"], "end": found["window"]["end"], "text": found["text"]}
        contents.append({**parent_document(collection, name), "window": place})
    return contents


def _print(query: str, ranking: Ranking, contents: Sequence[Mapping[str, Any]]) -> None:
    from m3model.cli.output import print_table, shortened

    rows = []
    for rank, (hit, content) in enumerate(zip(ranking, contents), 1):
        scores = ["" if value is None else f"{value:.3f}" for value in hit[1:]]
        text = str(content.get("window", content).get("text", ""))
        rows.append([str(rank), *scores, shortened(hit.id, 50), shortened(text, 100)])
    columns = ["#", "score", "dense", "sparse", "multi", "id", "text"]
    print_table(columns, rows, title=shortened(query, 150), right="# score dense sparse multi")
