"""Texts from files and stdin.

    *.jsonl, *.json, also with .gz   a JSON object or string on each line; the text is "text" (or "contents", "body"),
                                     after "title" and a line break where there is one; the id is "id", "_id" or "docid"
    any other file                   one text, its id the path; with lines=True one text a line, its id path:line
    stdin                            JSON lines if the first line is a JSON object, otherwise one text a line

Empty lines are passed over.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import typer

__all__ = ["Document", "read_documents", "read_pairs", "read_queries"]

_TEXT_KEYS = ("text", "contents", "body")
_ID_KEYS = ("id", "_id", "docid")
_QUERY_KEYS = ("query", "question", "text")
_STDIN = Path("-")


class Document(NamedTuple):
    """A text under its id, with the other fields that came with it."""

    id: str
    text: str
    fields: Mapping[str, Any]


def read_documents(files: Iterable[Path] | None, *, lines: bool = False) -> Iterator[Document]:
    """Documents of the files, or of stdin where there are none.

    Raises:
        ValueError: naming file and line: not UTF-8, no JSON, no text.
    """
    for path in files or [_STDIN]:
        if _is_json(path):
            yield from (_document(row, place) for place, row in _json_rows(path, _lines(path)))
        elif path == _STDIN:
            yield from _from_stdin()
        elif lines:
            for number, line in _lines(path):
                yield Document(f"{path}:{number}", line, {})
        else:
            yield Document(str(path), _whole(path), {})


def read_queries(path: Path) -> list[str]:
    """Queries of a file or stdin: one a line, or JSON lines with "query", "question" or "text".

    Raises:
        ValueError: as read_documents.
    """
    numbered = list(_lines(path))
    if not (_is_json(path) or (numbered and _is_object(numbered[0][1]))):
        return [line for _, line in numbered]
    return [_field(row, _QUERY_KEYS, place) for place, row in _json_rows(path, numbered)]


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Pairs of JSON lines {"query", "passage"}.

    Raises:
        ValueError: as read_documents.
    """
    return [
        (_field(row, ("query",), place), _field(row, ("passage", "text"), place))
        for place, row in _json_rows(path, _lines(path))
    ]


def _from_stdin() -> Iterator[Document]:
    numbered = _lines(_STDIN)
    first = next(numbered, None)
    if first is None:
        return
    rest = _chain(first, numbered)
    if _is_object(first[1]):
        yield from (_document(row, place) for place, row in _json_rows(_STDIN, rest))
        return
    for number, line in rest:
        yield Document(f"stdin:{number}", line, {})


def _chain(first: tuple[int, str], others: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from others


def _document(row: Any, place: str) -> Document:
    if isinstance(row, str):
        return Document(place, row, {})
    text = _field(row, _TEXT_KEYS, place)
    title = row.get("title")
    if isinstance(title, str) and title:
        text = f"{title}\n{text}"
    key = next((key for key in _ID_KEYS if row.get(key) is not None), None)
    used = {*_TEXT_KEYS, *_ID_KEYS}
    return Document(place if key is None else str(row[key]), text, {k: v for k, v in row.items() if k not in used})


def _field(row: Any, keys: tuple[str, ...], place: str) -> str:
    if isinstance(row, str):
        return row
    for key in keys:
        if isinstance(row, dict) and isinstance(row.get(key), str):
            value: str = row[key]
            return value
    raise ValueError(f"{place}: expected an object with {' or '.join(repr(key) for key in keys)} as a string")


def _json_rows(path: Path, numbered: Iterable[tuple[int, str]]) -> Iterator[tuple[str, Any]]:
    """Place ("path:line") and parsed content of each line."""
    name = "stdin" if path == _STDIN else str(path)
    for number, line in numbered:
        try:
            yield f"{name}:{number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}:{number}: not valid JSON: {error}") from error


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def _is_json(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith((".jsonl", ".json"))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and content of the lines that are not empty."""
    with _open(path) as file:
        number = 0
        try:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8").rstrip("\r\n")
                if line.strip():
                    yield number, line.removeprefix("\ufeff")
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}:{number}: {error}") from error


def _whole(path: Path) -> str:
    with _open(path) as file:
        try:
            return file.read().decode("utf-8").removeprefix("\ufeff")
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: {error}") from error


def _open(path: Path) -> IO[bytes]:
    if path == _STDIN:
        if sys.stdin.isatty():
            raise typer.BadParameter("give files, or texts on stdin", param_hint="FILES")
        return sys.stdin.buffer
    if path.name.endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    return open(path, "rb")
