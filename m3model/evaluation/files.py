"""Reading of dataset files, plain or gzip, with errors that name the file, the line and where the file comes from."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

__all__ = ["choose", "existing", "json_lines", "open_text", "required", "tab_separated"]


def existing(folder: Path, candidates: Sequence[str], what: str, origin: str) -> Path:
    """The first of `candidates` (paths below folder, also with .gz) that exists.

    Raises:
        FileNotFoundError: none does; says what it is and where it comes from.
    """
    for candidate in candidates:
        for path in (folder / candidate, folder / f"{candidate}.gz"):
            if path.exists():
                return path
    raise FileNotFoundError(f"{folder / candidates[0]} is missing: {what}. It comes from {origin}")


def open_text(path: Path) -> IO[str]:
    """A text file in UTF-8, unpacked if its name ends in .gz."""
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line that is not blank.

    Raises:
        ValueError: a line is no JSON object, or the file is no UTF-8 or damaged gzip.
    """
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        yield number, row


def tab_separated(path: Path, columns: int) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of every line that is not blank; the last field keeps any further tab.

    Raises:
        ValueError: a line has fewer fields.
    """
    for number, line in _lines(path):
        fields = line.rstrip("\r\n").split("\t", columns - 1)
        if len(fields) < columns:
            raise ValueError(f"{path}:{number}: expected {columns} fields between tabs, got {len(fields)}")
        yield number, fields


def required(row: dict[str, Any], key: str, path: Path, number: int) -> Any:
    """row[key].

    Raises:
        ValueError: the row lacks it.
    """
    if key not in row:
        raise ValueError(f"{path}:{number}: no {key!r}; the row has {', '.join(sorted(row)) or 'nothing'}")
    return row[key]


def choose(dataset: str, wanted: Iterable[str] | None, known: Sequence[str], what: str = "language") -> list[str]:
    """The wanted ones in the order of `known`; all of them for None.

    Raises:
        ValueError: one is not known, or none is wanted.
    """
    if wanted is None:
        return list(known)
    asked = list(wanted)
    unknown = [name for name in asked if name not in known]
    if unknown or not asked:
        raise ValueError(f"{dataset} has no {what} {', '.join(unknown) or '(none given)'}; it has {', '.join(known)}")
    return [name for name in known if name in asked]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged after line {number}: {error}") from error
