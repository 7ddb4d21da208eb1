"""`make gpu-report DRY_RUN=1` runs to its end without a GPU, and nothing in it can be taken for a figure of a GPU."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def test_the_dry_run_writes_a_report_without_figures(tmp_path: Path) -> None:
    for package in ("triton", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--dry-run", "--out", str(tmp_path)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **threads}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    text = (tmp_path / "dry_run.md").read_text()
    assert text.startswith("# GPU report: DRY RUN") and "0 failed" in text and "passed, 0 failed" in text
    assert (tmp_path / "dry_run.png").stat().st_size > 10_000
    with (tmp_path / "dry_run.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == {"attention", "late interaction", "sparse head"}
    assert {row["peer"] for row in rows if row["note"] == "ran"} >= {"m3kernels", "torch SDPA, padded"}
    for row in rows:
        assert not any(row[field] for field in ("milliseconds", "times_ours", "tflops", "memory_mib")), row


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_report_refuses_to_pretend() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_report"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "torch sees no NVIDIA GPU" in done.stderr
