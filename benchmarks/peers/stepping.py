"""A process that takes a training step for each line on stdin; needs nothing but Python, as it runs for all peers."""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path


def limit_memory(gib: float | None) -> None:
    """Let this process have so many GiB of memory of its own; torch raises a RuntimeError beyond."""
    if gib is not None:
        size = int(gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def answer_steps(step: Callable[[], float]) -> None:
    """Print the resident bytes, then for each line what `step`, which returns the loss, took."""
    print(json.dumps({"resident": status("VmRSS")}), flush=True)
    for _line in sys.stdin:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
        begin, used = time.perf_counter(), time.process_time()
        loss = step()
        figures = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - used}
        print(json.dumps({**figures, "loss": loss, "peak": status("VmHWM")}), flush=True)


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
