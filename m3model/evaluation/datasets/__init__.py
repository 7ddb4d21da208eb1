"""Readers of retrieval benchmarks. Downloads are the user's: a missing file's error says where it comes from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from m3model.evaluation.datasets.beir import read_beir
from m3model.evaluation.datasets.miracl import read_miracl
from m3model.evaluation.datasets.mkqa import read_mkqa
from m3model.evaluation.datasets.mldr import read_mldr
from m3model.evaluation.datasets.narrativeqa import read_narrativeqa
from m3model.evaluation.datasets.squad import read_squad, read_xquad
from m3model.evaluation.tasks import Task

__all__ = [
    "DATASETS",
    "read_beir",
    "read_miracl",
    "read_mkqa",
    "read_mldr",
    "read_narrativeqa",
    "read_squad",
    "read_tasks",
    "read_xquad",
]

DATASETS: dict[str, Callable[..., list[Task]]] = {
    "miracl": read_miracl,
    "mkqa": read_mkqa,
    "mldr": read_mldr,
    "narrativeqa": read_narrativeqa,
    "beir": read_beir,
    "squad": read_squad,
    "xquad": read_xquad,
}


def read_tasks(dataset: str, folder: str | os.PathLike[str], languages: Iterable[str] | None = None) -> list[Task]:
    """The tasks of a dataset of DATASETS, for all its languages or those given.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: unknown dataset or language, damaged file.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset is {dataset!r}; accepted: {', '.join(DATASETS)}")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is no folder; it should hold the files of {dataset}")
    return DATASETS[dataset](Path(folder), languages)
