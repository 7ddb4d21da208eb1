"""Measures late interaction against its peers, interleaved, and writes maxsim.csv, maxsim.png and maxsim_machine.json.

    python -m benchmarks.report_maxsim CASE_NUMBER ...      each case replaces its own rows of the CSV
    python -m benchmarks.report_maxsim plot

Each peer runs in a process of its own, all alive together, and the processor's peak is measured in every round between
them. Packages of other environments: M3_PEERS_PYTHON (PyLate, late-interaction-kernels, maxsim-cpu, numkong) and
M3_PARITY_PYTHON (FlagEmbedding); a peer that is missing or crashes is a row that says so. The largest error is that of
a score, relative to its float64 value: numkong looks for the maxima in 8 bits. On a machine that others use too,
`chrt -f 10` before the command keeps them off the processors.
"""

from __future__ import annotations

import json
import os
import select
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import tables
from benchmarks.machine import results_folder
from benchmarks.maxsim_cases import CASES
from benchmarks.peak import peak_flops
from benchmarks.peers.maxsim import PEERS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = results_folder()
FIELDS = [
    "case",
    "peer",
    "threads",
    "milliseconds",
    "times_ours",
    "gflops",
    "fraction_of_peak",
    "extra_memory_mb",
    "largest_error",
    "note",
]
ROUNDS = 7
SECONDS = 6.0
PATIENCE = 40.0
# Before each call: idle threads of the process before spin for some milliseconds.
PAUSE = 0.04
THREADS = int(os.environ.get("M3_BENCH_THREADS", "2"))
INTERPRETERS = {
    "FlagEmbedding": os.environ.get("M3_PARITY_PYTHON", sys.executable),
    **dict.fromkeys(
        ("PyLate", "late-interaction-kernels", "maxsim-cpu", "numkong"),
        os.environ.get("M3_PEERS_PYTHON", sys.executable),
    ),
}
WITHOUT_GRADIENTS = {"m3kernels 8 bits", "m3kernels 1 bit", "maxsim-cpu", "numkong"}
Row = dict[str, object]


class Peer:
    """A process that runs one implementation; `note` says why it stopped, if it did."""

    def __init__(self, name: str) -> None:
        self.name, self.note = name, ""
        self.times: list[float] = []
        command = [
            INTERPRETERS.get(name, sys.executable),
            "-W",
            "ignore",
            "-m",
            "benchmarks.peers.maxsim",
            name,
            str(THREADS),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "RAYON_NUM_THREADS": str(THREADS)}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def ask(self, request: dict[str, object]) -> dict[str, object]:
        """The answer, or {} where the process has ended, which `note` then explains."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._explain()
            return {}
        readable, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        line = self.process.stdout.readline() if readable else b""
        if not line:
            self._explain() if readable else self._give_up()
            return {}
        answer: dict[str, object] = json.loads(line)
        if "missing" in answer:
            self.note = f"not installed: {answer['missing']}"
        return answer

    def _explain(self) -> None:
        code = self.process.wait()
        self.note = f"crashed (signal {-code})" if code < 0 else f"failed (exit {code})"

    def _give_up(self) -> None:
        self.process.kill()
        self.note = f"no answer in {PATIENCE:.0f} s"


def measure(case_name: str) -> list[Row]:
    case = CASES[case_name]
    names = [name for name in PEERS if not (case.training and name in WITHOUT_GRADIENTS)]
    peers = [Peer(name) for name in names]
    try:
        for peer in peers:
            peer.ask({"case": case_name})
        # The first call of each, which finds no memory of calls before it.
        memory = {peer.name: peer.ask({"memory": True}).get("bytes", "") for peer in peers if not peer.note}
        errors = {peer.name: peer.ask({"error": True}).get("error", "") for peer in peers if not peer.note}
        peaks = []
        for _ in range(ROUNDS):
            peaks.append(peak_flops(THREADS, 4_000_000))
            for peer in peers:
                if not peer.note and sum(peer.times) < SECONDS:
                    time.sleep(PAUSE)
                    answer = peer.ask({"run": True})
                    if "seconds" in answer:
                        peer.times.append(float(str(answer["seconds"])))
    finally:
        for peer in peers:
            peer.process.kill()
    medians = {peer.name: statistics.median(peer.times) for peer in peers if peer.times}
    peak = statistics.median(peaks)
    # Memory is what a call takes beyond what it returns: for training, the two gradients.
    returned = 4 * case.width * (case.queries * case.query_rows + sum(case.passage_lengths)) if case.training else 0
    rows: list[Row] = [
        {
            "case": case_name,
            "peer": "(peak)",
            "threads": THREADS,
            "gflops": round(peak / 1e9, 1),
            "fraction_of_peak": 1.0,
        }
    ]
    for peer in peers:
        row: Row = {"case": case_name, "peer": peer.name, "threads": THREADS, "note": peer.note}
        if peer.name in medians:
            seconds = medians[peer.name]
            size = memory.get(peer.name, "")
            row |= {
                "milliseconds": round(seconds * 1e3, 3),
                "times_ours": round(seconds / medians["m3kernels"], 2),
                "gflops": "" if case.training else round(case.flops / seconds / 1e9, 1),
                "fraction_of_peak": "" if case.training else round(case.flops / seconds / peak, 3),
                "largest_error": f"{errors[peer.name]:.1e}" if errors.get(peer.name, "") != "" else "",
                "extra_memory_mb": round((float(str(size)) - returned) / 1e6, 2) if size != "" else "",
            }
        rows.append(row)
    return rows


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in tables.read(RESULTS / "maxsim.csv") if row["peer"] != "(peak)"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, panels = pyplot.subplots(len(cases), 1, figsize=(9, 2.3 * len(cases)))
    for axes, case in zip(panels if len(cases) > 1 else [panels], cases):
        mine = [row for row in rows if row["case"] == case]
        for position, row in enumerate(mine):
            width = float(row["milliseconds"] or 0)
            axes.barh(position, width, color="tab:orange" if row["peer"].startswith("m3kernels") else "tab:gray")
            share = f", {float(row['fraction_of_peak']):.2f} of the peak" if row["fraction_of_peak"] else ""
            axes.text(width, position, f" {width:.3g} ms{share}" if width else f" {row['note']}", va="center", size=6)
        axes.set_yticks(range(len(mine)), [row["peer"] for row in mine], fontsize=6)
        axes.invert_yaxis()
        axes.set_title(case, fontsize=8, loc="left")
        axes.margins(x=0.25)
        axes.tick_params(axis="x", labelsize=6)
    figure.supxlabel("milliseconds", fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "maxsim.png", dpi=130)


def main(arguments: list[str]) -> None:
    names = list(CASES)
    accepted = [str(number) for number in range(len(names))]
    if not arguments or any(argument not in (*accepted, "plot") for argument in arguments):
        listing = "\n".join(f"  {number}  {name}" for number, name in enumerate(names))
        sys.exit(f"accepted are plot and the numbers of cases:\n{listing}")
    table = RESULTS / "maxsim.csv"
    for argument in arguments:
        if argument == "plot":
            plot()
            continue
        name = names[int(argument)]
        rows = measure(name)
        kept = [row for row in tables.read(table) if row["case"] != name] + rows
        kept.sort(key=lambda row: names.index(str(row["case"])))
        tables.write(table, FIELDS, kept)
        for row in rows:
            print("  ".join(f"{key}={row[key]}" for key in FIELDS[1:] if row.get(key, "") != ""), flush=True)
    if arguments == ["plot"]:
        return
    real_time = os.sched_getscheduler(0) == os.SCHED_FIFO
    tables.write_machine(RESULTS / "maxsim_machine.json", real_time_priority=real_time)


if __name__ == "__main__":
    main(sys.argv[1:])
