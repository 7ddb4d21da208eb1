"""What a figure depends on: the machine, its description and folder of results; interleaved timing, and peak memory."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
INSTRUCTION_SETS = ("sse2", "avx", "avx2", "f16c", "fma", "avx512f")
INSTRUCTION_SETS += ("avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def describe() -> dict[str, Any]:
    """Processor, cores, memory and versions, and the speed of a plain copy, which bounds kernels that move memory."""
    return {
        "processor": _cpuinfo("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "instruction_sets": [flag for flag in INSTRUCTION_SETS if flag in _cpuinfo("flags").split()],
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "copy_gb_per_s": round(copy_bandwidth() / 1e9, 1),
    }


def results_folder() -> Path:
    """Where CPU figures of this kind of processor are kept, so that those of another kind stay beside them:
    benchmarks/results for AVX2, its folder avx512 or amx for machines that have those."""
    flags = _cpuinfo("flags").split()
    return RESULTS / ("amx" if "amx_bf16" in flags else "avx512" if "avx512f" in flags else "")


def _cpuinfo(field: str) -> str:
    """Of the first processor; empty where the system does not tell."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == field), "")


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy that no cache holds."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source)) for _ in range(5)]
    return 2 * source.nbytes / statistics.median(times)


def timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int, seconds: float = 20.0) -> dict[str, float]:
    """Median seconds of each call, run in turn so that all see the same weather: one warm-up, then up to `rounds`.

    A call whose own times add up to more than `seconds` runs no further rounds (at least one is timed). A warm-up of
    more than three times that counts, and nothing follows.
    """
    warm_ups = {name: timed(call) for name, call in calls.items()}
    times = {name: [warm_up] if warm_up > 3 * seconds else [] for name, warm_up in warm_ups.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            if sum(times[name]) < seconds:
                times[name].append(timed(call))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes by which the resident memory of this process rises at most while `call` runs (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
    before = _status("VmHWM")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
