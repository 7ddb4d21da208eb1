"""Measures the sparse ops against their peers, interleaved, and writes sparse.csv, sparse.png and sparse_machine.json.

    python -m benchmarks.report_sparse head scores     # or: memory, retrieval; each part replaces its own rows
    python -m benchmarks.report_sparse plot

Times are medians in milliseconds. Memory is the rise of the resident peak beyond the gradients that the call returns,
in MB, each in a process of its own.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import numpy as np
import torch

from benchmarks import sparse_calls, sparse_texts, tables
from benchmarks.machine import interleaved, peak_memory, results_folder

RESULTS = results_folder()
FIELDS = ["part", "case", "peer", "threads", "milliseconds", "times_ours", "extra_memory_mb", "note"]
Row = dict[str, object]


def rows_of(part: str, case: str, times: dict[str, float]) -> list[Row]:
    ours = times["m3kernels"]
    return [
        {
            "part": part,
            "case": case,
            "peer": peer,
            "threads": torch.get_num_threads(),
            "milliseconds": f"{seconds * 1e3:.4g}",
            "times_ours": f"{seconds / ours:.3g}",
        }
        for peer, seconds in times.items()
    ]


def head() -> list[Row]:
    rows = []
    for batch, length in ((1, 512), (8, 512), (64, 512), (1, 8192)):
        case = f"{batch} x {length}, width {sparse_calls.WIDTH}"
        rows += rows_of("head forward", case, interleaved(sparse_calls.head_forward(batch, length), 7, 4))
        # The official formula makes 4 bytes · B · L · 250 002 twice: 8 GB at 8 x 512, 66 GB at 64 x 512.
        calls = sparse_calls.head_training(batch, length, with_official=batch * length <= 4096)
        rows += rows_of("head forward+backward", case, interleaved(calls, 5, 15))
    return rows


def memory() -> list[Row]:
    rows = []
    cases = [(1, 512, "m3kernels"), (1, 512, "FlagEmbedding training"), (8, 512, "m3kernels")]
    cases += [(8, 512, "FlagEmbedding training"), (64, 512, "m3kernels"), (1, 8192, "m3kernels")]
    for batch, length, peer in cases:
        command = [sys.executable, "-m", "benchmarks.report_sparse", "memory-of", str(batch), str(length), peer]
        megabytes = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1e6
        case = f"{batch} x {length}, width {sparse_calls.WIDTH}"
        rows.append({"part": "memory, head forward+backward", "case": case, "peer": peer, "extra_memory_mb": megabytes})
    return rows


def memory_of(batch: int, length: int, peer: str) -> int:
    """Extra bytes of one head forward and backward; a small one before it starts threads and loads what is lazy."""
    official = peer != "m3kernels"
    sparse_calls.head_training(1, 16, with_official=official)[peer]()
    call = sparse_calls.head_training(batch, length, with_official=official)[peer]
    returned = 4 * (batch * length * sparse_calls.WIDTH + sparse_calls.WIDTH + 1)
    return peak_memory(call) - returned


def scores() -> list[Row]:
    rows = rows_of("scores forward", "64 x 512", interleaved(sparse_calls.pair_scores(64, 512), 9, 6))
    return rows + rows_of(
        "scores forward+backward", "64 x 512", interleaved(sparse_calls.pair_scores_training(64, 512), 7, 8)
    )


def retrieval(count: int = 60, k: int = 100) -> list[Row]:
    passages, queries = sparse_texts.collection(count)
    torch.set_num_threads(1)
    searches = sparse_calls.retrieval(queries, passages, k)
    times: dict[str, list[float]] = {peer: [] for peer in searches}
    wrong = dict.fromkeys(searches, 0)
    for i in range(count):
        for peer, search in searches.items():
            search(i)
            begin = time.perf_counter()
            scores = search(i)
            times[peer].append(time.perf_counter() - begin)
            exact = searches["scipy CSR"](i)
            exact = exact[exact > 0]
            wrong[peer] += not np.array_equal(scores[: len(exact)], exact)
    case = f"top {k} of {len(passages.offsets) - 1} passages, mean of {count} queries"
    rows = rows_of("retrieval", case, {peer: statistics.mean(values) for peer, values in times.items()})
    for row in rows:
        bad = wrong[str(row["peer"])]
        row["note"] = "same scores for every query" if bad == 0 else f"other scores for {bad} of {count} queries"
    return rows


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in tables.read(RESULTS / "sparse.csv") if row["milliseconds"]]
    cases = list(dict.fromkeys((row["part"], row["case"]) for row in rows))
    figure, axes = pyplot.subplots(figsize=(9, 0.32 * len(rows) + 1.5))
    labels, position = [], 0
    for case in cases:
        for row in (row for row in rows if (row["part"], row["case"]) == case):
            ours = row["peer"] == "m3kernels"
            axes.barh(position, float(row["milliseconds"]), color="tab:orange" if ours else "tab:gray")
            axes.text(
                float(row["milliseconds"]), position, f" {float(row['milliseconds']):.3g} ms", va="center", size=7
            )
            labels.append(f"{row['part']}, {row['case'].split(',')[0]}: {row['peer']}")
            position += 1
        position += 0.5
        labels.append("")
    ticks = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
    axes.set_yticks(ticks, [label for label in labels if label], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("milliseconds (log)")
    figure.tight_layout()
    figure.savefig(RESULTS / "sparse.png", dpi=130)


def main(parts: list[str]) -> None:
    known = {"head": head, "memory": memory, "scores": scores, "retrieval": retrieval}
    unknown = [part for part in parts if part not in (*known, "plot")]
    if parts[:1] == ["memory-of"]:
        print(memory_of(int(parts[1]), int(parts[2]), parts[3]))
        return
    if unknown or not parts:
        sys.exit(f"parts {unknown or 'missing'}: accepted are {', '.join(known)} and plot")
    table = RESULTS / "sparse.csv"
    for part in parts:
        if part == "plot":
            plot()
            continue
        kept = [row for row in tables.read(table) if not str(row["part"]).startswith(part)]
        tables.write(table, FIELDS, kept + known[part]())
        tables.write_machine(RESULTS / "sparse_machine.json")


if __name__ == "__main__":
    main(sys.argv[1:])
