"""Measures attention against what PyTorch ships, interleaved, and writes attention.csv, .png and _machine.json.

    python -m benchmarks.report_attention CASE_NUMBER ...           times; each case replaces its own rows of the CSV
    python -m benchmarks.report_attention memory CASE_NUMBER ...    peak memory, into rows that are there
    python -m benchmarks.report_attention plot

Times are medians in milliseconds. GFLOP/s count the products that have to be computed, never padding; the peak is the
rate of multiply-adds that the processor reached between the calls of the same run. Memory is the rise of the resident
peak during one call, its results included, in MB, each in a process of its own. On a machine that others use too,
`chrt -f 10` before the command keeps them off the processors.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

import torch

from benchmarks import tables
from benchmarks.attention_cases import CASES, LOG_UNIFORM, REAL, Case
from benchmarks.machine import interleaved, peak_memory, results_folder
from benchmarks.peak import peak_flops
from benchmarks.peers.attention import OURS, PEERS, call_of, peers_of

RESULTS = results_folder()
TABLE = RESULTS / "attention.csv"
FIELDS = ["case", "peer", "threads", "milliseconds", "times_ours", "gflops", "fraction_of_peak", "memory_mb", "note"]
ROUNDS = 7
SECONDS = 12.0
PEAK = "(peak)"
BARS = ("1 x 8192", LOG_UNIFORM, REAL)
"""Batches that stand beside the curves of the plot."""
# Idle threads of the call before spin for some milliseconds.
PAUSE = 0.04
NESTED_SCORES = {False: 8e8, True: 8e7}
"""Of the padded batch, in a forward and in training, above which nested tensors are left out: 18 GB were seen."""
Row = dict[str, object]


def measure(case: Case) -> list[Row]:
    threads = torch.get_num_threads()
    peaks: list[float] = []

    def measure_peak() -> None:
        time.sleep(PAUSE)
        peaks.append(peak_flops(threads))

    calls, notes = {PEAK: measure_peak}, {}
    for peer in peers_of(case):
        scores = case.heads * len(case.lengths) * max(case.lengths) ** 2
        if peer == "nested" and scores > NESTED_SCORES[case.training]:
            notes[peer] = "left out: it makes all scores of the padded batch, many seconds and gigabytes"
            continue
        try:
            call_of(peer, case.small())()
            calls[peer] = call_of(peer, case)
        except (RuntimeError, NotImplementedError) as failure:
            notes[peer] = f"not supported: {str(failure).splitlines()[0][:120]}"
    times = interleaved(calls, ROUNDS, SECONDS)
    peak = statistics.median(peaks)
    rows: list[Row] = [
        {"case": case.name, "peer": PEAK, "threads": threads, "gflops": round(peak / 1e9, 1), "fraction_of_peak": 1.0}
    ]
    for peer in peers_of(case):
        row: Row = {"case": case.name, "peer": peer, "threads": threads, "note": notes.get(peer, "")}
        if peer in times:
            row |= {
                "milliseconds": f"{times[peer] * 1e3:.4g}",
                "times_ours": f"{times[peer] / times[OURS]:.3g}",
                "gflops": f"{case.flops / times[peer] / 1e9:.4g}",
                "fraction_of_peak": f"{case.flops / times[peer] / peak:.3g}",
            }
        rows.append(row)
    return rows


def memory_of(peer: str, case: Case) -> int:
    """Bytes at the peak of one call, results included; a small call before it starts threads and loads what is lazy."""
    call_of(peer, case.small())()
    return peak_memory(call_of(peer, case))


def with_memory(case: Case, rows: list[Row]) -> list[Row]:
    number = str(CASES.index(case))
    for row in rows:
        if row["case"] == case.name and row["milliseconds"]:
            command = [sys.executable, "-m", "benchmarks.report_attention", "memory-of", number, str(row["peer"])]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row["memory_mb"] = f"{float(answer) / 1e6:.4g}"
    return rows


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {case.name: case for case in CASES}
    measured = [(names[str(row["case"])], row) for row in tables.read(TABLE) if row["gflops"]]
    colours = dict(zip([PEAK, *PEERS], ("black", "tab:orange", "tab:blue", "tab:green", "tab:purple", "tab:red")))
    figure, panels = pyplot.subplots(2, 3, figsize=(14, 8), width_ratios=(3, 3, 4))
    for line, training in enumerate((False, True)):
        chosen = [(case, row) for case, row in measured if case.training == training]
        for axes, width in zip(panels[line], (32, 64)):
            for peer, colour in colours.items():
                points = [
                    (case.lengths[0], float(str(row["gflops"])))
                    for case, row in chosen
                    if row["peer"] == peer and case.width == width and case.batch not in BARS
                ]
                lengths, speeds = zip(*points) if points else ((), ())
                axes.plot(lengths, speeds, "--" if peer == PEAK else "-", marker=".", color=colour, label=peer)
            axes.set_xscale("log", base=2)
            axes.set_ylim(0)
            axes.set_title(f"{'forward+backward' if training else 'forward'}, head width {width}", fontsize=9)
            axes.set_xlabel("length (16 384 rows in all)", fontsize=8)
            axes.set_ylabel("GFLOP/s", fontsize=8)
        bars = [(case, row) for case, row in chosen if row["peer"] != PEAK and case.batch in BARS]
        axes = panels[line][2]
        for position, (_, row) in enumerate(bars):
            times = float(str(row["times_ours"]))
            axes.barh(position, times, color=colours[str(row["peer"])])
            axes.text(times, position, f" {times:.3g}", va="center", size=7)
        axes.set_yticks(
            range(len(bars)),
            [f"{case.batch}, {case.heads} x {case.width}: {row['peer']}" for case, row in bars],
            size=7,
        )
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlim(0.5, 3 * max(axes.get_xlim()))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("time, as a multiple of ours (log)", fontsize=8)
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "attention.png", dpi=120)


def _write(rows: list[Row]) -> None:
    order = {case.name: number for number, case in enumerate(CASES)}
    rows.sort(key=lambda row: order[str(row["case"])])
    tables.write(TABLE, FIELDS, rows)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["memory-of"]:
        print(memory_of(arguments[2], CASES[int(arguments[1])]))
        return
    if arguments == ["plot"]:
        plot()
        return
    memory = arguments[:1] == ["memory"]
    numbers = arguments[memory:]
    if not numbers or any(number not in map(str, range(len(CASES))) for number in numbers):
        listing = "\n".join(f"  {number}  {case.name}" for number, case in enumerate(CASES))
        sys.exit(f"accepted are plot, and numbers of cases, after memory or alone:\n{listing}")
    for case in (CASES[int(number)] for number in numbers):
        if not case.available:
            print(f"skipped, no ../shared/data and no M3_DATA: {case.name}")
            continue
        if memory:
            _write(with_memory(case, tables.read(TABLE)))
            continue
        before = {row["peer"]: row["memory_mb"] for row in tables.read(TABLE) if row["case"] == case.name}
        rows = [{**row, "memory_mb": before.get(row["peer"], "")} for row in measure(case)]
        _write([row for row in tables.read(TABLE) if row["case"] != case.name] + rows)
        for row in rows:
            print("  ".join(f"{key}={row[key]}" for key in FIELDS if row.get(key, "") != ""), flush=True)
        real_time = os.sched_getscheduler(0) == os.SCHED_FIFO
        tables.write_machine(RESULTS / "attention_machine.json", real_time_priority=real_time)


if __name__ == "__main__":
    main(sys.argv[1:])
