"""Measure tile shapes on a GPU and write the fastest into an op's tile table.

For every kernel, arithmetic and width of the table, each candidate runs in the whole forward or backward pass with the
other kernels' tiles left as they are; the candidate with the smallest median time wins. Candidates that need more
shared memory or registers than the device has are passed over. Entries with options are measured with these options,
but those for listed pairs, which no op runs alone, stay as they are. Run by hand, once for a new architecture; never at
a start.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from m3kernels import _tiles, gpu_support

Timer = Callable[[Callable[[], object]], float]
"""Runs a function repeatedly and returns its median time in milliseconds, as triton.testing.do_bench does."""
Candidates = Mapping[str, Sequence[Sequence[int]]]
"""Tiles to try for each kernel, in the form of the table."""

CANDIDATES: dict[str, Candidates] = {
    "attention": {
        "forward": [(128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 2), (32, 32, 8, 2)],
        "backward_q": [(128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)],
        "backward_kv": [
            (64, 128, 8, 2),
            (64, 64, 8, 2),
            (64, 64, 4, 2),
            (32, 64, 4, 2),
            (32, 32, 4, 2),
            (32, 32, 8, 2),
        ],
    },
    "maxsim": {
        "forward": [
            (128, 128, 128, 8, 2),
            (128, 128, 64, 8, 3),
            (128, 128, 32, 8, 3),
            (64, 128, 64, 8, 3),
            (128, 32, 64, 4, 4),
            (128, 32, 64, 4, 3),
            (64, 32, 64, 4, 3),
            (64, 64, 16, 8, 2),
            (64, 64, 16, 4, 2),
            (64, 32, 32, 8, 2),
        ],
        "pairs_forward": [(128, 32, 64, 4, 4), (128, 32, 64, 4, 3), (64, 32, 64, 4, 3), (64, 32, 32, 8, 2)],
        "backward_q": [
            (16, 256, 4, 2),
            (8, 256, 4, 2),
            (8, 512, 4, 2),
            (16, 512, 8, 2),
            (2, 512, 1, 2),
            (2, 1024, 1, 2),
            (1, 1024, 1, 2),
        ],
        "backward_p": [(64, 128, 32, 8, 2), (64, 64, 32, 4, 2), (128, 128, 32, 8, 2), (64, 64, 16, 8, 2)],
    },
}


@dataclass(frozen=True)
class Problem:
    """Sizes to measure: attention over `sequences` of `length` rows; MaxSim of `queries` with `passages`."""

    sequences: int = 32
    length: int = 512
    heads: int = 12
    queries: int = 32
    query_length: int = 32
    passages: int = 256
    passage_length: int = 128


def tune(
    op: str,
    device: torch.device,
    start: _tiles.TileTable,
    *,
    timer: Timer | None = None,
    candidates: Candidates | None = None,
    problem: Problem | None = None,
    report: Callable[[str], object] = print,
) -> _tiles.Entries:
    """Fastest tiles of an op on a device.

    Args:
        op: "attention" or "maxsim".
        device: where to run.
        start: the table to start from (`gpu_support.triton_kernels`); says which kernels, arithmetics and widths there
            are.
        timer: default triton.testing.do_bench, which needs a GPU.
    Returns:
        A table with the fastest candidate, or the tile of `start` where that is faster, everywhere.
    Raises:
        ValueError: an op without tiles.
    """
    if op not in CANDIDATES:
        raise ValueError(f"op is {op!r}; accepted: {', '.join(map(repr, CANDIDATES))}")
    timer = timer or _bench
    entries: _tiles.Entries = json.loads(json.dumps(start.entries))
    for kernel, tiles in (candidates or CANDIDATES[op]).items():
        for arithmetic, listed in entries[kernel].items():
            for key, current in listed.items():
                width, _, options = key.partition(" ")
                if "listed" in options:
                    continue
                call = _call(op, kernel, arithmetic, int(width), options, device, problem or Problem())
                times = {}
                for tile in {tuple(current), *map(tuple, tiles)}:
                    listed[key] = list(tile)
                    times[tile] = _time(timer, call, replace(start, entries=entries))
                fastest = min(times, key=lambda tile: (times[tile], tile != tuple(current)))
                listed[key] = list(fastest)
                report(f"{op} {kernel} {arithmetic} {key}: {list(fastest)} {times[fastest]:.3f} ms, was {current}")
    return entries


def write_table(op: str, architecture: int, entries: _tiles.Entries, path: Path | None = None) -> None:
    """Put the entries of one architecture into the op's file (default: the installed one), keeping the others."""
    path = path or _tiles.path(op)
    tables: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    tables[f"sm_{architecture}"] = entries
    blocks = []
    for name, kernels in tables.items():
        lines = []
        for kernel, arithmetics in kernels.items():
            rows = ",\n".join(f"      {json.dumps(key)}: {json.dumps(widths)}" for key, widths in arithmetics.items())
            lines.append(f"    {json.dumps(kernel)}: {{\n{rows}\n    }}")
        blocks.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
    _tiles.load.cache_clear()
    gpu_support.forget_tables()


def _bench(function: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(function, return_mode="median"))


def _time(timer: Timer, call: Callable[[_tiles.TileTable], object], table: _tiles.TileTable) -> float:
    try:
        return timer(lambda: call(table))
    except OutOfResources:
        return math.inf


def _call(
    op: str, kernel: str, arithmetic: str, width: int, options: str, device: torch.device, problem: Problem
) -> Callable[[_tiles.TileTable], object]:
    """The pass that runs `kernel` with `options`, as a function of the table."""
    dtype = torch.bfloat16 if arithmetic == "16bit" else torch.float32
    make = _attention_call if op == "attention" else _maxsim_call
    return make(kernel, dtype, arithmetic == "tf32", width, options, device, problem)


def _offsets(count: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(count + 1, dtype=torch.int32, device=device) * length


def _attention_call(
    kernel: str, dtype: torch.dtype, allow_tf32: bool, width: int, on: str, device: torch.device, problem: Problem
) -> Callable[[_tiles.TileTable], object]:
    from m3kernels.attention import triton_kernels

    shape = (problem.sequences * problem.length, problem.heads, width)
    q, k, v, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    offsets = _offsets(problem.sequences, problem.length, device)
    keep, dropout = 0.5 if "sampled" in on else None, 0.1 if "dropout" in on else 0.0
    options = triton_kernels.Options(width**-0.5, keep, dropout, 0, allow_tf32)
    if kernel == "forward":
        return lambda table: triton_kernels.forward(q, k, v, offsets, options, table)
    out, log_sum_exp = torch.zeros_like(q), torch.zeros(shape[1], shape[0], device=device)
    return lambda table: triton_kernels.backward(grad, q, k, v, out, log_sum_exp, offsets, options, table)


def _maxsim_call(
    kernel: str, dtype: torch.dtype, allow_tf32: bool, width: int, on: str, device: torch.device, problem: Problem
) -> Callable[[_tiles.TileTable], object]:
    from m3kernels.maxsim import triton_kernels

    # The width of the two forward kernels' entries is the count of query rows, not E.
    queries, query_length = problem.queries, problem.query_length
    if kernel == "forward" and width < triton_kernels.MOST_QUERY_ROWS:
        queries, query_length = 1, min(width, query_length)
    columns = 1024 if kernel in ("forward", "pairs_forward") else width
    rows = torch.randn(queries * query_length, columns, device=device).to(dtype)
    passages = torch.randn(problem.passages * problem.passage_length, columns, device=device).to(dtype)
    tensors = (
        rows,
        passages,
        _offsets(queries, query_length, device),
        _offsets(problem.passages, problem.passage_length, device),
    )
    floor = torch.ones(problem.passages, dtype=torch.bool, device=device) if "floor" in on else None
    if kernel == "forward":
        return lambda table: triton_kernels.forward(*tensors, floor, True, "save" in on, allow_tf32, table)
    if kernel == "pairs_forward":
        numbers = torch.arange(problem.passages, dtype=torch.int32, device=device)
        pairs = torch.stack([numbers % queries, numbers], dim=1)
        return lambda table: triton_kernels.pairs_forward(*tensors, pairs, floor, "mean" in on, allow_tf32, table)
    grad = torch.ones(queries, problem.passages, device=device)
    winners = torch.randint(passages.shape[0], (rows.shape[0], problem.passages), dtype=torch.int32, device=device)
    return lambda table: triton_kernels.backward(grad, *tensors, None, winners, True, allow_tf32, table)
