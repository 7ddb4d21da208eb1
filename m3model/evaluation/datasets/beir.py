"""Folders in the layout of BEIR (Thakur et al. 2021, arXiv 2104.08663), also for collections of one's own.

DIR/corpus.jsonl[.gz]      {"_id", "title", "text"}
DIR/queries.jsonl[.gz]     {"_id", "text"}
DIR/qrels/test.tsv         query-id, corpus-id, score between tabs, with that header line
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from m3model.evaluation.files import existing, json_lines, required, tab_separated
from m3model.evaluation.tasks import Collection, Passage, Task

__all__ = ["read_beir"]

_ORIGIN = "https://github.com/beir-cellar/beir (NAME.zip), unpacked"


def read_beir(folder: Path, languages: Iterable[str] | None = None, *, split: str = "test") -> list[Task]:
    """One task, under the folder's name; with `languages`, one task for each subfolder of that name.

    Raises:
        FileNotFoundError: corpus, queries or judgements are missing.
        ValueError: a damaged line.
    """
    if languages is None:
        return [_task(folder, folder.resolve().name, split)]
    return [_task(existing(folder, [name], f"a BEIR folder {name}", _ORIGIN), name, split) for name in languages]


def _task(folder: Path, name: str, split: str) -> Task:
    corpus = existing(folder, ["corpus.jsonl"], "the passages", _ORIGIN)
    queries_path = existing(folder, ["queries.jsonl"], "the queries", _ORIGIN)
    qrels_path = existing(folder, [f"qrels/{split}.tsv"], f"the judgements of {split}", _ORIGIN)
    texts = {}
    for number, row in json_lines(queries_path):
        texts[str(required(row, "_id", queries_path, number))] = required(row, "text", queries_path, number)
    qrels: dict[str, dict[str, int]] = {}
    for number, (query, passage, relevance) in tab_separated(qrels_path, 3):
        if number == 1 and query == "query-id":
            continue
        if not relevance.strip().lstrip("-").isdigit():
            raise ValueError(f"{qrels_path}:{number}: relevance is {relevance.strip()!r}; accepted: whole numbers")
        qrels.setdefault(query, {})[passage] = int(relevance)
    return Task(
        dataset="beir",
        name=name,
        collection=Collection(f"beir-{name}", lambda: _passages(corpus)),
        queries=texts,
        qrels=qrels,
        measures=("nDCG@10", "R@100", "RR@10"),
        preset="beir",
    )


def _passages(path: Path) -> Iterator[Passage]:
    for number, row in json_lines(path):
        text = required(row, "text", path, number)
        yield Passage(str(required(row, "_id", path, number)), text, row.get("title") or "")
