"""MIRACL (Zhang et al. 2023, arXiv 2210.09984): retrieval in Wikipedia in 18 languages, reported on the dev queries.

    DIR/miracl-v1.0-XX/topics/topics.miracl-v1.0-XX-dev.tsv     query id, tab, query
    DIR/miracl-v1.0-XX/qrels/qrels.miracl-v1.0-XX-dev.tsv       query id, Q0, passage id, relevance
    DIR/miracl-corpus-v1.0-XX/docs-*.jsonl.gz                   {"docid", "title", "text"}

The figures of the M3 paper since July 2024 keep a passage that has the query's id, as here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from m3model.evaluation.files import choose, existing, json_lines, required, tab_separated
from m3model.evaluation.tasks import Collection, Passage, Task
from m3model.evaluation.trec import read_qrels

__all__ = ["LANGUAGES", "read_miracl"]

LANGUAGES = ["ar", "bn", "en", "es", "fa", "fi", "fr", "hi", "id", "ja", "ko", "ru", "sw", "te", "th", "zh", "de", "yo"]
_TOPICS = "https://huggingface.co/datasets/miracl/miracl"
_CORPUS = "https://huggingface.co/datasets/miracl/miracl-corpus"


def read_miracl(folder: Path, languages: Iterable[str] | None = None, *, split: str = "dev") -> list[Task]:
    """One task for each language.

    Raises:
        FileNotFoundError: topics, judgements or passages of a language are missing.
        ValueError: no such language, or a damaged line.
    """
    return [_task(folder, language, split) for language in choose("MIRACL", languages, LANGUAGES)]


def _task(folder: Path, language: str, split: str) -> Task:
    version = f"miracl-v1.0-{language}"
    topics = f"{version}/topics/topics.{version}-{split}.tsv"
    qrels = f"{version}/qrels/qrels.{version}-{split}.tsv"
    topics_path = existing(folder, [topics, Path(topics).name], f"MIRACL's {split} queries in {language}", _TOPICS)
    qrels_path = existing(folder, [qrels, Path(qrels).name], f"MIRACL's {split} judgements in {language}", _TOPICS)
    corpus = existing(folder, [f"miracl-corpus-v1.0-{language}"], f"MIRACL's passages in {language}", _CORPUS)
    parts = sorted([*corpus.glob("docs-*.jsonl.gz"), *corpus.glob("docs-*.jsonl")], key=_part_number)
    if not parts:
        raise FileNotFoundError(f"{corpus} has no docs-*.jsonl.gz: MIRACL's passages in {language}. From {_CORPUS}")
    return Task(
        dataset="miracl",
        name=language,
        collection=Collection(f"miracl-{language}", lambda: _passages(parts)),
        queries={query: text for _, (query, text) in tab_separated(topics_path, 2)},
        qrels=read_qrels(qrels_path),
        measures=("nDCG@10", "R@100", "RR@10"),
        preset="miracl",
    )


def _part_number(path: Path) -> int:
    number = path.name.split(".")[0].removeprefix("docs-")
    return int(number) if number.isdigit() else -1


def _passages(parts: list[Path]) -> Iterator[Passage]:
    for path in parts:
        for number, row in json_lines(path):
            text = required(row, "text", path, number)
            yield Passage(str(required(row, "docid", path, number)), text, row.get("title") or "")
