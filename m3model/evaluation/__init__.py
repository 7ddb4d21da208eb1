"""Evaluation of retrieval: benchmarks, metrics with their uncertainty, baselines, reports."""

from m3model.evaluation.baselines import BM25, DenseBaseline, System
from m3model.evaluation.datasets import DATASETS, read_tasks
from m3model.evaluation.harness import Results, evaluate
from m3model.evaluation.hybrid import unite
from m3model.evaluation.m3_system import M3System
from m3model.evaluation.metrics import Comparison, Interval, compare_systems, holm, interval, per_query
from m3model.evaluation.report import write_report
from m3model.evaluation.tasks import Collection, Passage, Task
from m3model.evaluation.trec import ranked, read_qrels, read_run, write_qrels, write_run
from m3model.retrieval.presets import PRESETS, HybridWeights, preset

__all__ = [
    "BM25",
    "DATASETS",
    "PRESETS",
    "Collection",
    "Comparison",
    "DenseBaseline",
    "HybridWeights",
    "Interval",
    "M3System",
    "Passage",
    "Results",
    "System",
    "Task",
    "compare_systems",
    "evaluate",
    "holm",
    "interval",
    "per_query",
    "preset",
    "ranked",
    "read_qrels",
    "read_run",
    "read_tasks",
    "unite",
    "write_qrels",
    "write_report",
    "write_run",
]
