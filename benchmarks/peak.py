"""What this machine's processor can do at most: float32 multiply-adds a second, measured, to divide other figures by.

    python -m benchmarks.peak [threads]

A small C++ loop of independent multiply-adds on registers, compiled here for this very machine, runs in as many threads
as are asked for. Frequencies move, so a fraction of the peak uses a peak measured in the same interleaved run.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_SOURCE = """
#include <cstdint>
#ifdef __AVX512F__
constexpr int kBytes = 64, kChains = 24;
#elif defined(__AVX__)
constexpr int kBytes = 32, kChains = 12;
#else
constexpr int kBytes = 16, kChains = 12;
#endif
typedef float Floats __attribute__((vector_size(kBytes)));

extern "C" int64_t flops_per_step() { return 2 * kChains * (kBytes / 4); }

// As many independent chains as registers hold, more than the latency of a multiply-add asks for.
extern "C" float multiply_add_loop(int64_t steps, float start) {
  Floats chain[kChains];
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) chain[i] = Floats{} + start * i;  // unequal, or the compiler would merge them
  const Floats factor = Floats{} + 0.999f, term = Floats{} + 0.001f;
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * factor + term;
  }
  Floats sum = {};
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) sum += chain[i];
  return sum[0];
}
"""
_STEPS = 20_000_000


@functools.cache
def _library() -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="m3peak"))
    (folder / "peak.cpp").write_text(_SOURCE)
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-O2", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "peak.cpp", "-o", "peak.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "peak.so"))
    library.flops_per_step.restype = ctypes.c_int64
    library.multiply_add_loop.restype = ctypes.c_float
    library.multiply_add_loop.argtypes = [ctypes.c_int64, ctypes.c_float]
    return library


def peak_flops(threads: int, steps: int = _STEPS) -> float:
    """Float32 operations a second (a multiply-add is two) of `threads` threads together."""
    library = _library()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(library.multiply_add_loop, [steps // 10] * threads, [1.0] * threads))
        begin = time.perf_counter()
        list(pool.map(library.multiply_add_loop, [steps] * threads, [1.0] * threads))
        seconds = time.perf_counter() - begin
    return float(library.flops_per_step()) * steps * threads / seconds


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else os.cpu_count() or 1
    print(f"{peak_flops(count) / 1e9:.1f} GFLOP/s on {count} threads")
