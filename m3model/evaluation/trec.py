"""TREC's formats of rankings and judgements.

    run     query id, Q0, passage id, rank, score, name of the system
    qrels   query id, 0,  passage id, relevance

Fields are separated by blanks or tabs. A written run has strictly decreasing scores within a query: evaluation tools
break ties differently from each other (trec_eval by passage id, others by the order of the file), and a run should have
one meaning. `ranked` fixes the order of ties, by passage id, and lowers tied scores by single steps of float32.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from m3model.evaluation.files import open_text
from m3model.evaluation.tasks import Qrels, Run
from m3model.files import write_whole

__all__ = ["ranked", "read_qrels", "read_run", "write_qrels", "write_run"]


def ranked(scores: Mapping[str, float], depth: int | None = None) -> dict[str, float]:
    """The best `depth` passages, best first, with strictly decreasing float32 scores; ties by passage id.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    for passage, score in scores.items():
        if not math.isfinite(score):
            raise ValueError(f"the score of {passage!r} is {score}; accepted: finite numbers")
    order = sorted(scores, key=lambda passage: (-scores[passage], passage))[:depth]
    values = np.array([scores[passage] for passage in order], dtype=np.float32)
    for place in range(1, len(values)):
        if values[place] >= values[place - 1]:
            values[place] = np.nextafter(values[place - 1], np.float32(-np.inf))
    return dict(zip(order, values.tolist()))


def write_run(run: Run, path: str | os.PathLike[str], system: str) -> None:
    """Write a run, every query ranked as `ranked` does.

    Raises:
        ValueError: an id or the system's name is empty or holds white space, which the format cannot say.
    """
    lines = []
    _check_ids([system], "system")
    _check_ids(run, "query")
    for query, scores in run.items():
        _check_ids(scores, "passage")
        for place, (passage, score) in enumerate(ranked(scores).items(), 1):
            lines.append(f"{query} Q0 {passage} {place} {score:.9g} {system}\n")
    write_whole(Path(path), "".join(lines))


def read_run(path: str | os.PathLike[str]) -> Run:
    """A run file, plain or gzip; passages by falling score.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line has not six fields, a score is no number, or a passage is listed twice for a query.
    """
    read: Run = {}
    for number, (query, _, passage, _, score, _) in _fields(Path(path), 6, "query Q0 passage rank score system"):
        scores = read.setdefault(query, {})
        if passage in scores:
            raise ValueError(f"{path}:{number}: passage {passage!r} is listed twice for query {query!r}")
        try:
            scores[passage] = float(score)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: the score is {score!r}; accepted: a number") from error
    return {query: ranked(scores) for query, scores in read.items()}


def write_qrels(qrels: Qrels, path: str | os.PathLike[str]) -> None:
    """Write judgements.

    Raises:
        ValueError: an id is empty or holds white space.
    """
    _check_ids(qrels, "query")
    lines = []
    for query, judged in qrels.items():
        _check_ids(judged, "passage")
        lines += [f"{query} 0 {passage} {relevance}\n" for passage, relevance in judged.items()]
    write_whole(Path(path), "".join(lines))


def read_qrels(path: str | os.PathLike[str]) -> dict[str, dict[str, int]]:
    """Judgements, plain or gzip.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line has not four fields, a relevance is no whole number, or a passage is judged twice.
    """
    read: dict[str, dict[str, int]] = {}
    for number, (query, _, passage, relevance) in _fields(Path(path), 4, "query 0 passage relevance"):
        judged = read.setdefault(query, {})
        if passage in judged:
            raise ValueError(f"{path}:{number}: passage {passage!r} is judged twice for query {query!r}")
        try:
            judged[passage] = int(relevance)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: relevance is {relevance!r}; accepted: a whole number") from error
    return read


def _fields(path: Path, count: int, form: str) -> list[tuple[int, list[str]]]:
    found = []
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if not fields:
                continue
            if len(fields) != count:
                raise ValueError(f"{path}:{number}: {len(fields)} fields; expected {form!r}")
            found.append((number, fields))
    return found


def _check_ids(ids: Mapping[str, object] | list[str], what: str) -> None:
    for name in ids:
        if not name or name.split() != [name]:
            raise ValueError(f"{what} {name!r} cannot stand in a TREC file; accepted: text without white space")
