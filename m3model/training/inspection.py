"""What is in training files: counts, lengths by language, repeated texts, positives among the negatives.

Texts are the same here if they are equal up to white space. They are compared by 64-bit digests, 8 bytes a text, and
no text is kept, so that files far larger than memory can be looked at. (Among 10⁷ texts two different ones share a
digest with probability 3·10⁻⁶.)

The language of a row is its key "language" or "lang"; without one it is the script that most letters of the query are
written in, shown as "script Latin".
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import regex
from numpy.typing import NDArray

from m3model.training.data import (
    TrainingDataError,
    TrainingRow,
    open_training_file,
    parse_object,
    row_from_object,
    training_lines,
)

__all__ = [
    "FileFacts",
    "LengthFacts",
    "RepeatedTexts",
    "TrainingDataReport",
    "inspect_training_files",
    "language_of",
    "text_digest",
]

_LANGUAGE_KEYS = ("language", "lang")
_SCRIPTS = (
    "Latin Cyrillic Greek Arabic Hebrew Devanagari Bengali Gurmukhi Gujarati Oriya Tamil Telugu Kannada Malayalam"
    " Sinhala Thai Lao Tibetan Myanmar Khmer Georgian Armenian Ethiopic Hangul Hiragana Katakana Han"
)
_LETTER = regex.compile("|".join(rf"(?P<{script}>\p{{Script={script}}})" for script in _SCRIPTS.split()))
_SCRIPT_CHARACTERS = 500
_BLOCK = 1024
"""Rows whose texts are measured together."""

Measure = Callable[[list[str]], Sequence[int]]
Digests = NDArray[np.uint64]


@dataclass
class FileFacts:
    """Counts of one file; with_* and without_* count rows."""

    path: str
    rows: int = 0
    bad_rows: int = 0
    positives: int = 0
    negatives: int = 0
    without_negatives: int = 0
    with_scores: int = 0
    with_prompt: int = 0


@dataclass(frozen=True)
class LengthFacts:
    """Lengths of the texts of one kind ("query", "pos", "neg") in one language."""

    language: str
    kind: str
    texts: int
    mean: float
    median: int
    percentile_99: int
    largest: int


@dataclass(frozen=True)
class RepeatedTexts:
    """Rows with a text where it should not be; examples are file:line.

    Attributes:
        repeated_queries: rows whose query an earlier row has.
        repeated_passages: rows that name one passage twice.
        leaked_positives: rows with a negative that this or another row names as a positive of the same query.
        query_as_passage: rows whose query is one of their passages.
        distinct_queries, distinct_passages: different texts in all files.
    """

    distinct_queries: int
    distinct_passages: int
    repeated_queries: int
    repeated_passages: int
    leaked_positives: int
    query_as_passage: int
    examples: dict[str, list[str]]


@dataclass
class TrainingDataReport:
    """What `inspect_training_files` finds.

    Attributes:
        bad: message of each bad row, file:line first; at most as many as asked for.
        bad_rows: how many there are; a file that cannot be read to its end or has no rows counts as one more.
    """

    files: list[FileFacts]
    lengths: list[LengthFacts]
    repeated: RepeatedTexts
    bad: list[str] = field(default_factory=list)
    bad_rows: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON object of all."""
        return asdict(self)


def inspect_training_files(
    paths: Sequence[Path],
    *,
    measure: Measure | None = None,
    bad_limit: int = 20,
    example_limit: int = 5,
    advance: Callable[[int], None] = lambda _rows: None,
) -> TrainingDataReport:
    """Read files to their end, past bad rows.

    Args:
        measure: lengths of texts, such as their tokens; default characters.
        bad_limit: bad rows whose messages are kept; example_limit: places kept of each kind of repeated text.
        advance: called with numbers of rows read.

    Raises:
        ValueError: no path.
        FileNotFoundError, ImportError: as `read_training_rows`.
    """
    if not paths:
        raise ValueError("paths is empty; at least one file is needed")
    report = TrainingDataReport([], [], RepeatedTexts(0, 0, 0, 0, 0, 0, {}))
    texts, lengths = _Texts(), _Lengths(measure or (lambda block: [len(text) for text in block]))
    for number, path in enumerate(paths):
        facts = FileFacts(str(path))
        report.files.append(facts)
        for row, language in _sound_rows(Path(path), facts, report, bad_limit):
            facts.rows += 1
            facts.positives += len(row.positives)
            facts.negatives += len(row.negatives)
            facts.without_negatives += not row.negatives
            facts.with_scores += row.positive_scores is not None
            facts.with_prompt += row.prompt is not None
            texts.add(number, int(row.location.rsplit(":", 1)[1]), row)
            lengths.add(language, row)
            if facts.rows % _BLOCK == 0:
                advance(_BLOCK)
        advance(facts.rows % _BLOCK)
    report.lengths = lengths.facts()
    report.repeated = texts.repeated([str(path) for path in paths], example_limit)
    return report


def language_of(row: dict[str, Any], text: str) -> str:
    """The language that a row names, otherwise the script of `text`."""
    for key in _LANGUAGE_KEYS:
        if isinstance(row.get(key), str) and row[key]:
            return str(row[key])
    return f"script {_script(text)}"


def text_digest(text: str) -> int:
    """64 bits that equal texts share, however white space divides their words."""
    words = " ".join(text.split())
    return int.from_bytes(hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _sound_rows(
    path: Path, facts: FileFacts, report: TrainingDataReport, limit: int
) -> Iterator[tuple[TrainingRow, str]]:
    """Rows of a file with their language; bad ones go to the report."""

    def refuse(error: TrainingDataError) -> None:
        report.bad_rows += 1
        if len(report.bad) < limit:
            report.bad.append(str(error))

    with open_training_file(path) as file:
        try:
            for line in training_lines(file, path):
                try:
                    values = parse_object(line, path)
                    row = row_from_object(values, f"{path}:{line.number}")
                except TrainingDataError as error:
                    facts.bad_rows += 1
                    refuse(error)
                else:
                    yield row, language_of(values, row.query)
        except TrainingDataError as error:
            refuse(error)
    if not facts.rows and not facts.bad_rows:
        refuse(TrainingDataError(f"{path}: the file has no rows"))


class _Lengths:
    """Lengths by language and kind, measured in blocks."""

    def __init__(self, measure: Measure) -> None:
        self._measure = measure
        self._waiting: list[tuple[str, str, str]] = []
        self._lengths: dict[tuple[str, str], array[int]] = {}

    def add(self, language: str, row: TrainingRow) -> None:
        columns = (("query", (row.query,)), ("pos", row.positives), ("neg", row.negatives))
        self._waiting += [(language, kind, text) for kind, texts in columns for text in texts]
        if len(self._waiting) >= _BLOCK:
            self._flush()

    def facts(self) -> list[LengthFacts]:
        """The languages by their number of queries, and within each query, pos, neg."""
        self._flush()
        queries = Counter(
            {language: len(found) for (language, kind), found in self._lengths.items() if kind == "query"}
        )
        facts = []
        for language, _ in queries.most_common():
            for kind in ("query", "pos", "neg"):
                if found := self._lengths.get((language, kind)):
                    values = np.array(found)
                    median, most = np.percentile(values, (50, 99), method="inverted_cdf").tolist()
                    size = len(values)
                    facts.append(
                        LengthFacts(language, kind, size, float(values.mean()), median, most, int(values.max()))
                    )
        return facts

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            for (language, kind, _), length in zip(waiting, self._measure([text for _, _, text in waiting])):
                self._lengths.setdefault((language, kind), array("q")).append(length)


class _Texts:
    """Digests of all texts: one query a row, its passages with the number of the row."""

    def __init__(self) -> None:
        self._files, self._lines = array("i"), array("q")
        self._queries = array("Q")
        self._positives, self._positive_rows = array("Q"), array("q")
        self._negatives, self._negative_rows = array("Q"), array("q")
        self._own: dict[str, array[int]] = {"repeated_passages": array("q"), "query_as_passage": array("q")}

    def add(self, file: int, line: int, row: TrainingRow) -> None:
        number = len(self._queries)
        query = text_digest(row.query)
        positives = [text_digest(text) for text in row.positives]
        negatives = [text_digest(text) for text in row.negatives]
        self._files.append(file)
        self._lines.append(line)
        self._queries.append(query)
        self._positives.extend(positives)
        self._positive_rows.extend([number] * len(positives))
        self._negatives.extend(negatives)
        self._negative_rows.extend([number] * len(negatives))
        if len(set(positives)) < len(positives) or len(set(negatives)) < len(negatives):
            self._own["repeated_passages"].append(number)
        if query in positives or query in negatives:
            self._own["query_as_passage"].append(number)

    def repeated(self, paths: Sequence[str], limit: int) -> RepeatedTexts:
        queries = _digests(self._queries)
        positives, negatives = _digests(self._positives), _digests(self._negatives)
        _, first = np.unique(queries, return_index=True)
        again = np.setdiff1d(np.arange(len(queries)), first)
        negative_rows = np.array(self._negative_rows, dtype=np.int64)
        of_query = _pair(queries[np.array(self._positive_rows, dtype=np.int64)], positives)
        leaked = np.unique(negative_rows[np.isin(_pair(queries[negative_rows], negatives), of_query)])
        found = {"repeated_queries": again, "leaked_positives": leaked}
        found |= {name: np.array(rows, dtype=np.int64) for name, rows in self._own.items()}
        examples = {
            name: [f"{paths[self._files[row]]}:{self._lines[row]}" for row in rows[:limit].tolist()]
            for name, rows in found.items()
        }
        return RepeatedTexts(
            distinct_queries=len(first),
            distinct_passages=len(np.unique(np.concatenate([positives, negatives]))),
            examples=examples,
            **{name: len(rows) for name, rows in found.items()},
        )


def _digests(values: array[int]) -> Digests:
    return np.array(values, dtype=np.uint64)


def _pair(queries: Digests, passages: Digests) -> Digests:
    """A digest of each (query, passage)."""
    mixed: Digests = (queries ^ (queries >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15) + passages
    return mixed


def _script(text: str) -> str:
    """The script of most letters; Han with kana is named so, since it is Japanese."""
    counts = Counter(script for character in text[:_SCRIPT_CHARACTERS] if (script := _script_of(character)))
    if not counts:
        return "unknown"
    kana = counts.pop("Hiragana", 0) + counts.pop("Katakana", 0)
    if kana:
        counts["Han and kana"] = kana + counts.pop("Han", 0)
    return counts.most_common(1)[0][0]


@lru_cache(maxsize=1 << 16)
def _script_of(character: str) -> str | None:
    found = _LETTER.match(character)
    return found.lastgroup if found else None
