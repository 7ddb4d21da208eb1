"""NarrativeQA (Kočiský et al. 2018, arXiv 1712.07040) as retrieval: which of the stories does a question ask about?

    DIR/documents.csv           document_id, set, kind, ...
    DIR/qaps.csv                document_id, set, question, ...
    DIR/tmp/ID.content          the story, as download_stories.sh of the repository writes it

All stories of the split form the collection; a question's one relevant document is its own story.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

from m3model.evaluation.files import choose, existing, open_text, required
from m3model.evaluation.tasks import Collection, Passage, Task

__all__ = ["read_narrativeqa"]

_ORIGIN = "https://github.com/google-deepmind/narrativeqa (run download_stories.sh there for the stories)"


def read_narrativeqa(folder: Path, languages: Iterable[str] | None = None, *, split: str = "test") -> list[Task]:
    """The one task "en".

    Raises:
        FileNotFoundError: a table or a story is missing.
        ValueError: a language other than en, or a table without the columns.
    """
    choose("NarrativeQA", languages, ["en"])
    documents = existing(folder, ["documents.csv"], "NarrativeQA's list of stories", _ORIGIN)
    questions = existing(folder, ["qaps.csv"], "NarrativeQA's questions", _ORIGIN)
    stories = {
        row["document_id"]: _story(folder, row["document_id"])
        for row in _table(documents, ("document_id", "set"))
        if row["set"] == split
    }
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for number, row in enumerate(_table(questions, ("document_id", "set", "question"))):
        if row["set"] == split:
            queries[f"q{number}"] = row["question"]
            qrels[f"q{number}"] = {row["document_id"]: 1}
    return [
        Task(
            dataset="narrativeqa",
            name="en",
            collection=Collection(f"narrativeqa-{split}", lambda: _passages(stories)),
            queries=queries,
            qrels=qrels,
            measures=("nDCG@10", "R@100", "RR@10"),
            preset="mldr",
        )
    ]


def _story(folder: Path, document: str) -> Path:
    return existing(folder, [f"tmp/{document}.content", f"{document}.content"], "a story of NarrativeQA", _ORIGIN)


def _table(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    with open_text(path) as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            for column in columns:
                required(row, column, path, number)
            yield row


def _passages(stories: dict[str, Path]) -> Iterator[Passage]:
    for document, path in stories.items():
        opened = path.read_bytes() if path.suffix != ".gz" else open_text(path).read().encode()
        yield Passage(document, opened.decode("utf-8", "replace"))
