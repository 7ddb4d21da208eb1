"""MLDR (Chen et al. 2024, arXiv 2402.03216, appendix A.2): retrieval of long documents in 13 languages.

    DIR/mldr-v1.0-XX/test.jsonl.gz      {"query_id", "query", "positive_passages", "negative_passages"}
    DIR/mldr-v1.0-XX/corpus.jsonl.gz    {"docid", "text"}

Listed negatives are judgements of relevance 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from m3model.evaluation.files import choose, existing, json_lines, required
from m3model.evaluation.tasks import Collection, Passage, Task

__all__ = ["LANGUAGES", "read_mldr"]

LANGUAGES = ["ar", "de", "en", "es", "fr", "hi", "it", "ja", "ko", "pt", "ru", "th", "zh"]
_ORIGIN = "https://huggingface.co/datasets/Shitao/MLDR"


def read_mldr(folder: Path, languages: Iterable[str] | None = None, *, split: str = "test") -> list[Task]:
    """One task for each language.

    Raises:
        FileNotFoundError: queries or documents of a language are missing.
        ValueError: no such language, or a damaged line.
    """
    return [_task(folder, language, split) for language in choose("MLDR", languages, LANGUAGES)]


def _task(folder: Path, language: str, split: str) -> Task:
    version = f"mldr-v1.0-{language}"
    path = existing(folder, [f"{version}/{split}.jsonl"], f"MLDR's {split} queries in {language}", _ORIGIN)
    corpus = existing(folder, [f"{version}/corpus.jsonl"], f"MLDR's documents in {language}", _ORIGIN)
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for number, row in json_lines(path):
        query = str(required(row, "query_id", path, number))
        queries[query] = required(row, "query", path, number)
        judged = qrels.setdefault(query, {})
        for key, relevance in (("negative_passages", 0), ("positive_passages", 1)):
            for passage in row.get(key, ()):
                judged[str(required(passage, "docid", path, number))] = relevance
    return Task(
        dataset="mldr",
        name=language,
        collection=Collection(f"mldr-{language}", lambda: _documents(corpus)),
        queries=queries,
        qrels=qrels,
        measures=("nDCG@10", "R@100"),
        preset="mldr",
    )


def _documents(path: Path) -> Iterator[Passage]:
    for number, row in json_lines(path):
        yield Passage(str(required(row, "docid", path, number)), required(row, "text", path, number))
