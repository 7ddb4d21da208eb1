"""Measures training steps and writes train.csv, train_machine.json and docs/training_benchmark.md.

    python -m benchmarks.report_train peers [QUERIES]     # ours and FlagEmbedding 1.4.2, one step each in turn
    python -m benchmarks.report_train beyond QUERIES GIB  # the same batch, each process limited to so many GiB
    python -m benchmarks.report_train modes LENGTH LAYERS # whole and split batch, with checkpoints or without
    python -m benchmarks.report_train limit GIB LAYERS    # the same for 8 texts of 8192 tokens in so many GiB
    python -m benchmarks.report_train table               # the Markdown again

A step is forward, loss of all heads with self-distillation, backward and fused AdamW of the embedded backbone's shape
(12 layers of width 384, 120 M parameters), float32, no dropout. Each peer is a process of its own (benchmarks.peers);
all start first, then take turns as long as M3_BENCH_SECONDS allow, so that all see the same weather. Seconds are
medians of the steps after the first, where there are several; CPU seconds are those of both threads, which a loaded
machine disturbs less. Memory is the highest resident memory during a step minus
what is resident before the first: activations, gradients and AdamW's state. The load average says who else used the
machine: seconds of one command compare, and with other commands only where it stays near the number of cores.

Where `steps` is 1 it is the first one: AdamW's state, 0.9 GiB, comes after backward then, so the peak of a small batch
is that of AdamW, whatever the mode, and weights still lie in the file's pages, which the system may drop and which then
are missing in the memory before the step (up to 0.5 GiB). What a mode saves shows where activations are many.

M3_PARITY_PYTHON names the interpreter that has FlagEmbedding (make test-parity makes one in .venv-parity).
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import tables, train_cases
from benchmarks.machine import results_folder
from benchmarks.train_cases import Batch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = results_folder()
MARKDOWN = ROOT / "docs" / "training_benchmark.md"
SECONDS = float(os.environ.get("M3_BENCH_SECONDS", "150"))
FIELDS = ["part", "peer", "layers", "texts", "tokens", "longest", "limit_gib", "seconds", "cpu_seconds", "steps"]
FIELDS += ["tokens_per_s", "step_mib", "resident_mib", "times_ours", "memory_ours", "loss", "load_average"]
Row = dict[str, Any]
Command = Callable[[Path], list[str]]

FLAG = "FlagEmbedding"
SPLIT = 4096
MODES: dict[str, list[str]] = {
    "whole batch": [],
    "whole batch, checkpoints": ["--checkpoints"],
    "split batch": ["--split", str(SPLIT)],
    "split batch, checkpoints": ["--split", str(SPLIT), "--checkpoints"],
}
TOKENS = 16384
"""Tokens of a batch of `modes`."""


class Peer:
    """A process that takes steps; `answers` has one entry for each, `failed` says why there are no more."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.answers: list[dict[str, float]] = []
        self.failed = ""
        self._log = log
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env=environment,
            )
        self.resident = self._read().get("resident", 0.0)

    def step(self) -> None:
        if self.failed:
            return
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._read()
        if answer:
            self.answers.append(answer)

    def end(self) -> None:
        if self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, float] = json.loads(line)
            return answer
        self._process.wait()
        said = self._log.read_text()
        asked = re.findall(r"tried to allocate (\d+) bytes", said)
        if self._process.returncode != -9 and not asked:
            sys.exit(f"{self._process.args} failed:\n{said[-3000:]}")
        self.failed = "out of memory" + (f" (asked for {int(asked[-1]) / 2**30:.2f} GiB more)" if asked else "")
        return {}


def ours(batch: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.peers.training", str(train_cases.model_folder()), str(batch), *options]


def theirs(batch: Path, *options: str) -> list[str]:
    python = os.environ.get("M3_PARITY_PYTHON")
    if python is None:
        sys.exit("M3_PARITY_PYTHON must name a Python that has FlagEmbedding")
    script = ROOT / "benchmarks" / "peers" / "flag_training.py"
    return [python, str(script), str(train_cases.model_folder()), str(batch), *options]


def take_turns(part: str, batch: Batch, commands: dict[str, Command], *, rounds: int, **columns: Any) -> list[Row]:
    """A row for each command; the first is ours. Several rounds run as long as SECONDS allow."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "batch.npz"
        np.savez(place, **batch)
        peers = {
            name: Peer(command(place), Path(scratch) / f"{n}.log") for n, (name, command) in enumerate(commands.items())
        }
        longest = 0.0
        for number in range(rounds):
            if number and time.monotonic() - begin + longest > SECONDS:
                break
            start = time.monotonic()
            for peer in peers.values():
                peer.step()
            longest = max(longest, time.monotonic() - start)
        for peer in peers.values():
            peer.end()
    rows = [_row(part, name, batch, peer, columns) for name, peer in peers.items()]
    for row in rows:
        for ratio, measure in (("times_ours", "seconds"), ("memory_ours", "step_mib")):
            if isinstance(row[measure], float) and isinstance(rows[0][measure], float):
                row[ratio] = f"{row[measure] / rows[0][measure]:.3g}"
        print(row, flush=True)
    return rows


def _row(part: str, name: str, batch: Batch, peer: Peer, columns: dict[str, Any]) -> Row:
    lengths = train_cases.lengths(batch)
    row: Row = dict.fromkeys(FIELDS, "")
    row |= {"part": part, "peer": name, "layers": 12, "texts": len(lengths)}
    row |= {"tokens": int(lengths.sum()), "longest": int(lengths.max()), **columns}
    row |= {"seconds": peer.failed, "steps": len(peer.answers), "load_average": round(os.getloadavg()[0], 1)}
    if peer.answers:
        counted = peer.answers[1:] or peer.answers
        seconds, used = (statistics.median(one[name] for one in counted) for name in ("seconds", "cpu_seconds"))
        peak = max(answer["peak"] for answer in peer.answers)
        row |= {
            "seconds": round(seconds, 2),
            "cpu_seconds": round(used, 2),
            "tokens_per_s": round(row["tokens"] / seconds),
        }
        row |= {"step_mib": round((peak - peer.resident) / 2**20, 0), "resident_mib": round(peak / 2**20, 0)}
        row |= {"loss": round(peer.answers[0]["loss"], 6)}
    return row


def peers(queries: int) -> list[Row]:
    commands = {
        "m3kernels, split batch": lambda batch: ours(batch, "--split", str(SPLIT)),
        "m3kernels, whole batch": ours,
        FLAG: theirs,
    }
    return take_turns("peers", train_cases.real_batch(queries), commands, rounds=9)


def beyond(queries: int, gib: float) -> list[Row]:
    limit = ("--memory", str(gib))
    commands = {
        "m3kernels, split batch": lambda batch: ours(batch, "--split", str(SPLIT), *limit),
        FLAG: lambda batch: theirs(batch, *limit),
    }
    return take_turns("beyond", train_cases.real_batch(queries), commands, rounds=1, limit_gib=gib)


def modes(length: int, layers: int) -> list[Row]:
    batch = train_cases.uniform_batch(TOKENS // length // 2, length)
    commands: dict[str, Command] = {}
    for name, options in MODES.items():
        commands[name] = lambda place, given=(*options, "--layers", str(layers)): ours(place, *given)
    return take_turns("modes", batch, commands, rounds=3, layers=layers)


def limit(gib: float, layers: int) -> list[Row]:
    """One batch with each mode under the same limit."""
    batch = train_cases.uniform_batch(4, 8192)
    rows = []
    for name, options in MODES.items():
        given = (*options, "--layers", str(layers), "--memory", str(gib))
        rows += take_turns(
            "limit",
            batch,
            {name: lambda place, given=given: ours(place, *given)},
            rounds=1,
            limit_gib=gib,
            layers=layers,
        )
    return rows


def store(rows: list[Row]) -> None:
    """Put the rows in the place of those of the same case."""
    keys = ("part", "peer", "layers", "texts", "tokens", "limit_gib")
    tables.replace(RESULTS / "train.csv", FIELDS, rows, keys)
    tables.write_machine(RESULTS / "train_machine.json")


TITLES = {
    "peers": "Ours and FlagEmbedding in turn: 1 query, 8 passages, lengths of ../shared/data",
    "beyond": "More queries with 8 passages each, every process limited to `limit_gib`",
    "modes": f"{TOKENS} tokens of texts of one length, one passage to a query; split batch: {SPLIT} tokens at a time",
    "limit": "8 texts of 8192 tokens, every process limited to `limit_gib`",
}


def table() -> None:
    """docs/training_benchmark.md from the rows."""
    rows = tables.read(RESULTS / "train.csv")
    machine = json.loads((RESULTS / "train_machine.json").read_text())
    about = f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}"
    lines = [
        "# Training steps: time and memory",
        "",
        f"Made by `python -m benchmarks.report_train table`; {about}.",
        "",
    ]
    assert __doc__ is not None
    lines += [__doc__[__doc__.index("A step is") : __doc__.index("M3_PARITY_PYTHON")].strip()]
    for part, title in TITLES.items():
        found = [row for row in rows if row["part"] == part]
        columns = [name for name in FIELDS[1:] if any(row[name] for row in found)]
        lines += ["", f"## {title}", "", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
        lines += [f"| {' | '.join(row[name] for name in columns)} |" for row in found]
    MARKDOWN.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    match arguments:
        case ["peers", *rest]:
            store(peers(int(rest[0]) if rest else 1))
        case ["beyond", queries, gib]:
            store(beyond(int(queries), float(gib)))
        case ["modes", length, layers]:
            store(modes(int(length), int(layers)))
        case ["limit", gib, layers]:
            store(limit(float(gib), int(layers)))
        case ["table"]:
            pass
        case _:
            sys.exit(__doc__)
    table()


if __name__ == "__main__":
    main(sys.argv[1:])
