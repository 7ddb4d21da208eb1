"""The CSV files of benchmarks/results, of which each run replaces its own rows, and the machine beside them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe

__all__ = ["read", "replace", "write", "write_machine"]

Row = dict[str, Any]


def read(table: Path) -> list[Row]:
    """All rows, every value a string; none if there is no file yet."""
    if not table.exists():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def write(table: Path, fields: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    table.parent.mkdir(exist_ok=True)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def replace(table: Path, fields: Sequence[str], rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """Put `rows` in the place of those that agree with one of them in all of `keys`."""
    fresh = {tuple(str(row[key]) for key in keys) for row in rows}
    kept = [row for row in read(table) if tuple(row[key] for key in keys) not in fresh]
    write(table, fields, [*kept, *rows])


def write_machine(path: Path, **facts: Any) -> None:
    """What the figures depend on (`describe`), and `facts`."""
    path.write_text(json.dumps(describe() | facts, indent=2) + "\n")
