"""The emulated kernels under AddressSanitizer and ThreadSanitizer, and proof that both report planted mistakes."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.simt.emulated import ROOT, SANITIZER, load_planted_bugs, needs_emulator

pytestmark = [
    needs_emulator,
    pytest.mark.skipif(SANITIZER != "", reason="starts processes with sanitizers; this process is one"),
]
SOUND, MISSING_BARRIER, MISSING_SECOND_BARRIER, UNORDERED_ADD, GLOBAL_OVERRUN, SHARED_OVERRUN, DIVERGENT = range(7)
PLANTED = """
import sys, torch
from tests.simt.emulated import load_planted_bugs
for bug in map(int, sys.argv[1:]):
    load_planted_bugs().run(torch.zeros(64), bug)
    print("ran bug", bug, file=sys.stderr, flush=True)
"""


def run_with(sanitizer: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    def runtime(name: str) -> str:
        return subprocess.run(
            ["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()

    environment = {
        **os.environ,
        "M3_SIMT_SANITIZER": sanitizer,
        "LD_PRELOAD": " ".join([runtime(f"lib{sanitizer[0]}san.so"), runtime("libstdc++.so")]),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "report_signal_unsafe=0 exitcode=66",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **settings,
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def output_of(result: subprocess.CompletedProcess[str]) -> str:
    return result.stdout[-4000:] + result.stderr[-8000:]


@pytest.mark.parametrize(("sanitizer", "examples"), [("address", 10), ("thread", 3)])
def test_kernels_have_no_finding(sanitizer: str, examples: int) -> None:
    # -s: a report that ends the process would stay in pytest's own files.
    tests = ["-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "tests/simt/test_sparse_kernels.py"]
    result = run_with(sanitizer, *tests, M3_SIMT_EXAMPLES=str(examples))
    assert result.returncode == 0, output_of(result)
    assert "Sanitizer" not in output_of(result)


def test_planted_races_are_reported_with_their_place_and_a_sound_kernel_is_not() -> None:
    races = (MISSING_BARRIER, MISSING_SECOND_BARRIER, UNORDERED_ADD)
    result = run_with("thread", "-c", PLANTED, str(SOUND), *map(str, races))
    assert result.returncode == 66, output_of(result)
    reports = re.split(r"ran bug \d\n", result.stderr)
    assert "Sanitizer" not in reports[SOUND], reports[SOUND]
    for bug, kernel in zip(races, ("missing_barrier", "missing_second_barrier", "unordered_add")):
        assert "WARNING: ThreadSanitizer: data race" in reports[bug], output_of(result)
        assert re.search(rf"{kernel}_kernel .*planted_bugs\.cu:\d+", reports[bug]), reports[bug]


@pytest.mark.parametrize(("bug", "kind"), [(GLOBAL_OVERRUN, "heap"), (SHARED_OVERRUN, "global")])
def test_planted_writes_out_of_bounds_are_reported_with_their_place_and_a_sound_kernel_is_not(
    bug: int, kind: str
) -> None:
    result = run_with("address", "-c", PLANTED, str(SOUND), str(bug))
    assert result.returncode != 0
    sound, report = result.stderr.split("ran bug 0\n")
    assert "Sanitizer" not in sound, sound
    assert f"ERROR: AddressSanitizer: {kind}-buffer-overflow" in report, output_of(result)
    assert re.search(r"overrun_kernel .*planted_bugs\.cu:\d+", report), report


def test_a_divergent_barrier_aborts_and_names_the_thread() -> None:
    load_planted_bugs()
    result = subprocess.run(
        [sys.executable, "-c", PLANTED, str(DIVERGENT)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "divergent __syncthreads" in result.stderr
    assert "thread (" in result.stderr
