"""Results on stdout as tables or JSON, progress and messages on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = ["document_bar", "message", "print_json", "print_table", "shortened", "stderr", "stdout"]

_PIPE_WIDTH = 160


def stdout() -> Console:
    """Console on stdout; wider than rich's default where it is no terminal."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


def stderr() -> Console:
    """Console on stderr."""
    return Console(stderr=True, highlight=False)


def message(text: str) -> None:
    """A line on stderr."""
    stderr().print(escape(text), soft_wrap=True)


def print_json(value: Any) -> None:
    """One line of JSON on stdout; lone surrogates survive as escapes."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        line = json.dumps(value)
    sys.stdout.write(line + "\n")


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", right: str | Sequence[str] = ""
) -> None:
    """A table on stdout; `right` names the columns of numbers, in a list or separated by spaces."""
    table = Table(title=escape(title) or None, title_justify="left", title_style="bold", header_style="bold")
    numbers = right.split() if isinstance(right, str) else right
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=column in numbers)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    stdout().print(table)


def shortened(text: str, width: int) -> str:
    """The text on one line of at most `width` characters that a terminal can show."""
    line = " ".join("".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text).split())
    return line if len(line) <= width else line[: width - 1] + "…"


@contextmanager
def document_bar(label: str, total: int | None = None, unit: str = "documents") -> Iterator[Callable[[int], None]]:
    """A progress bar of documents on stderr; yields advance(documents). Without a terminal it prints nothing."""
    columns = (
        SpinnerColumn(),
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit}, {{task.fields[rate]:.1f}}/s"),
        TimeElapsedColumn(),
    )
    console = stderr()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total, rate=0.0)
        begin, done = time.monotonic(), 0

        def advance(documents: int) -> None:
            nonlocal done
            done += documents
            bar.update(task, advance=documents, rate=done / max(time.monotonic() - begin, 1e-9))

        yield advance
