"""Runs systems over tasks, keeps runs and judgements as TREC files, and the per-query values of every measure.

    FOLDER/runs/TASK/SYSTEM.trec    rankings
    FOLDER/qrels/TASK/SYSTEM.qrels  judgements of a dataset that is judged by answers (they depend on the run), or
    FOLDER/qrels/TASK.qrels         the dataset's own
    FOLDER/results.json             every value of every query; `Results.load` reads it

The values in results.json are those that ir-measures computes from the files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from m3model.evaluation.baselines import System
from m3model.evaluation.datasets.mkqa import judge_by_answers
from m3model.evaluation.metrics import PerQuery, per_query
from m3model.evaluation.tasks import Task
from m3model.evaluation.trec import write_qrels, write_run
from m3model.files import write_whole

__all__ = ["Results", "TaskSummary", "evaluate", "file_name"]


@dataclass(frozen=True)
class TaskSummary:
    """What a report says of a task."""

    dataset: str
    name: str
    group: str
    measures: tuple[str, ...]
    queries: int


@dataclass
class Results:
    """Values of every system.

    Attributes:
        tasks: in the order of evaluation.
        values: {system: {task name: {measure: {query id: value}}}}.
    """

    tasks: list[TaskSummary] = field(default_factory=list)
    values: dict[str, dict[str, PerQuery]] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, complete or not at all."""
        content = {"tasks": [asdict(task) for task in self.tasks], "values": self.values}
        write_whole(Path(path), json.dumps(content, ensure_ascii=False))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Results:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is something else.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            tasks = [TaskSummary(**{**task, "measures": tuple(task["measures"])}) for task in content["tasks"]]
            return Results(tasks, content["values"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no results.json of m3 eval: {error}") from error


def evaluate(
    tasks: Sequence[Task],
    systems: Sequence[System],
    folder: str | os.PathLike[str],
    *,
    progress: Callable[[str], None] = lambda _line: None,
) -> Results:
    """Search every task with every system, measure, and write the files above.

    Args:
        tasks: with different names.
        systems: their runs' names must differ.
        folder: made if it is not there.
        progress: told what is done next.

    Raises:
        ValueError: two tasks or two runs have one name, or a run answers other queries than the task asks.
    """
    names = [task.name for task in tasks]
    if len(set(names)) < len(names) or not tasks:
        raise ValueError(f"tasks are {names}; accepted: at least one, with different names")
    root = Path(folder)
    results = Results()
    for task in tasks:
        asked = task.judged
        results.tasks.append(TaskSummary(task.dataset, task.name, task.group, task.measures, len(asked)))
        place = root / "runs" / file_name(task.name)
        place.mkdir(parents=True, exist_ok=True)
        for system in systems:
            progress(f"{task.dataset} {task.name}: {type(system).__name__}, {len(asked)} queries")
            for name, run in system.search(task).items():
                if task.name in results.values.setdefault(name, {}):
                    raise ValueError(f"two systems give a run {name!r}; accepted: different names")
                if run.keys() - asked.keys():
                    raise ValueError(f"{name} answers queries that {task.name} does not ask")
                write_run(run, place / f"{file_name(name)}.trec", file_name(name))
                if task.answers is None:
                    qrels, path = task.qrels, root / "qrels" / f"{file_name(task.name)}.qrels"
                else:
                    qrels = judge_by_answers(run, task)
                    path = root / "qrels" / file_name(task.name) / f"{file_name(name)}.qrels"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_qrels(qrels, path)
                results.values[name][task.name] = per_query(run, qrels, task.measures)
        results.save(root / "results.json")
    return results


def file_name(name: str) -> str:
    """`name` with everything but letters, digits, dots, plus and minus replaced by "_"."""
    return re.sub(r"[^\w.+-]", "_", name)
