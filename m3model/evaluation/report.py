"""Report of an evaluation: tables in Markdown, the same in one self-contained HTML page with plots.

For every group of tasks and each of its measures: a row for each system, a column for each language, the macro mean
with its 95 % bootstrap interval; then every system against the first one, with the difference of macro means, its
interval and the p-value of the paired randomisation test after Holm's correction. Values are in percent.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from m3model.evaluation.harness import Results, TaskSummary
from m3model.evaluation.metrics import compare_systems, holm, interval

__all__ = ["write_report"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430 }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #d9dee5; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% } .best { font-weight: 700 }
"""


class _Table(NamedTuple):
    """A heading, the names of the columns, rows of cells, and for each row the columns that are best."""

    heading: str
    columns: list[str]
    rows: list[list[str]]
    best: list[set[int]]


class _Section(NamedTuple):
    heading: str
    measure: str
    tasks: list[TaskSummary]
    tables: list[_Table]


def write_report(results: Results, folder: str | os.PathLike[str], title: str, *, note: str = "") -> tuple[Path, Path]:
    """Write report.md and report.html (plots inside, and beside the Markdown as PNG files).

    Args:
        results: at least one system on one task.
        folder: made if it is not there.
        title: headline.
        note: a paragraph under it: model, options, machine.

    Returns:
        The two paths.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no results.
    """
    if not results.values or not results.tasks:
        raise ValueError("results are empty; accepted: at least one system on one task")
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    markdown, page = [f"# {title}\n"], [f"<h1>{html.escape(title)}</h1>"]
    if note:
        markdown.append(note + "\n")
        page.append(f"<p>{html.escape(note)}</p>")
    heading = ""
    for number, section in enumerate(_sections(results)):
        if section.heading != heading:
            heading = section.heading
            markdown.append(f"## {heading}\n")
            page.append(f"<h2>{html.escape(heading)}</h2>")
        for table in section.tables:
            markdown.append(_markdown(table))
            page.append(_html(table))
        if section.measure == section.tasks[0].measures[0]:
            for kind, png in _plots(results, section):
                name = f"{kind}-{number}.png"
                (root / name).write_bytes(png)
                text = f"{section.heading}, {section.measure}: {kind}"
                markdown.append(f"![{text}]({name})\n")
                encoded = base64.b64encode(png).decode()
                page.append(f'<img alt="{html.escape(text)}" src="data:image/png;base64,{encoded}">')
    paths = (root / "report.md", root / "report.html")
    paths[0].write_text("\n".join(markdown), encoding="utf-8")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(page)
    document = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
    paths[1].write_text(document, encoding="utf-8")
    return paths


def _sections(results: Results) -> Iterator[_Section]:
    ordered = sorted(results.tasks, key=lambda task: [t.group for t in results.tasks].index(task.group))
    for group, members in groupby(ordered, key=lambda task: task.group):
        tasks = list(members)
        heading = tasks[0].dataset if group == "all" else f"{tasks[0].dataset}, {group}"
        for measure in tasks[0].measures:
            tables = [_effectiveness(results, tasks, measure)]
            if len(results.values) > 1:
                tables.append(_comparisons(results, tasks, measure))
            yield _Section(heading, measure, tasks, tables)


def _effectiveness(results: Results, tasks: Sequence[TaskSummary], measure: str) -> _Table:
    systems = list(results.values)
    means = [[_mean(results, system, task, measure) for task in tasks] for system in systems]
    intervals = [interval(_groups(results, system, tasks, measure)) for system in systems]
    rows, best = [], []
    tops = [round(max(column), 3) for column in zip(*means)]
    top = round(max(bounds.mean for bounds in intervals), 3)
    for system, values, bounds in zip(systems, means, intervals):
        rows.append(
            [system]
            + [f"{100 * value:.1f}" for value in values]
            + [f"{100 * bounds.mean:.1f}", f"{100 * bounds.low:.1f} to {100 * bounds.high:.1f}"]
        )
        marked = {place for place, value in enumerate(values, 1) if round(value, 3) == tops[place - 1]}
        best.append(marked | ({len(tasks) + 1} if round(bounds.mean, 3) == top else set()))
    columns = ["system", *[task.name for task in tasks], "mean", "95 % interval"]
    return _Table(f"{measure} ({sum(task.queries for task in tasks)} queries)", columns, rows, best)


def _comparisons(results: Results, tasks: Sequence[TaskSummary], measure: str) -> _Table:
    first, *others = list(results.values)
    base = [results.values[first][task.name][measure] for task in tasks]
    tests = [compare_systems(base, [results.values[other][task.name][measure] for task in tasks]) for other in others]
    corrected = holm([test.p_value for test in tests])
    rows = [
        [
            other,
            f"{100 * test.difference.mean:+.1f}",
            f"{100 * test.difference.low:+.1f} to {100 * test.difference.high:+.1f}",
            f"{p_value:.4f}",
        ]
        for other, test, p_value in zip(others, tests, corrected)
    ]
    columns = ["system", "difference", "95 % interval", "p (Holm)"]
    return _Table(f"{measure}: difference to {first}", columns, rows, [set() for _ in rows])


def _mean(results: Results, system: str, task: TaskSummary, measure: str) -> float:
    values = results.values[system][task.name][measure]
    return sum(values.values()) / len(values)


def _groups(results: Results, system: str, tasks: Sequence[TaskSummary], measure: str) -> list[list[float]]:
    return [list(results.values[system][task.name][measure].values()) for task in tasks]


def _markdown(table: _Table) -> str:
    lines = [
        f"### {table.heading}\n",
        "| " + " | ".join(table.columns) + " |",
        "| --- |" + " ---: |" * (len(table.columns) - 1),
    ]
    for row, best in zip(table.rows, table.best):
        cells = [f"**{cell}**" if place in best else cell for place, cell in enumerate(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _html(table: _Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    body = []
    for row, best in zip(table.rows, table.best):
        cells = [
            f'<td class="best">{html.escape(cell)}</td>' if place in best else f"<td>{html.escape(cell)}</td>"
            for place, cell in enumerate(row)
        ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<h3>{html.escape(table.heading)}</h3>\n<table><tr>{head}</tr>\n" + "\n".join(body) + "</table>"


def _plots(results: Results, section: _Section) -> Iterator[tuple[str, bytes]]:
    """Bars for each language, and every system against the first one with a point for each language."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("reports need matplotlib: pip install m3kernels[eval]") from error
    systems = list(results.values)
    languages = [task.name for task in section.tasks]
    means = {
        system: [100 * _mean(results, system, task, section.measure) for task in section.tasks] for system in systems
    }
    bars = Figure(figsize=(max(6.0, 0.28 * len(systems) * len(languages) + 2), 4), layout="constrained")
    axes = bars.subplots()
    width = 0.84 / len(systems)
    for place, system in enumerate(systems):
        axes.bar(
            [at - 0.42 + width * (place + 0.5) for at in range(len(languages))], means[system], width, label=system
        )
    axes.set_xticks(range(len(languages)), languages)
    axes.set(ylabel=f"{section.measure} (%)", title=section.heading)
    axes.legend(ncols=min(len(systems), 6), fontsize="small", loc="lower left")
    yield "bars", _png(bars)
    if len(systems) > 1:
        versus = Figure(figsize=(5.5, 5.5), layout="constrained")
        axes = versus.subplots()
        first, *others = systems
        for system in others:
            axes.scatter(means[first], means[system], label=system, s=22)
        values = [value for row in means.values() for value in row]
        ends = [min(values) - 2, max(values) + 2]
        axes.plot(ends, ends, color="0.6", linewidth=1)
        axes.set(xlabel=f"{first}, {section.measure} (%)", ylabel=f"{section.measure} (%)", title=section.heading)
        axes.legend(fontsize="small")
        yield "versus", _png(versus)


def _png(figure: object) -> bytes:
    stored = io.BytesIO()
    figure.savefig(stored, format="png", dpi=110)  # type: ignore[attr-defined]
    return stored.getvalue()
