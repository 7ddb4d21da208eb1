"""What dropout 0.1 adds to attention, on every instruction set that the machine runs: attention_dropout.csv.

    python -m benchmarks.report_dropout [PAIRS]     # 100 by default

A call with and one without dropout take turns on one thread, float32, one text of 2048 tokens and one head. A figure is
the median over the pairs of time with / time without - 1, in percent; quartiles stand beside it. Differences of a few
percent drown in what other programs do to single times, not in such medians.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from benchmarks import tables
from benchmarks.machine import results_folder
from m3kernels import flash_attention_varlen, offsets_from_lengths
from tests.cpu_paths import HERE, on_path

TABLE = results_folder() / "attention_dropout.csv"
LENGTH, WIDTHS, WARM_UP = 2048, (32, 64, 128), 3
PASSES = ("forward", "backward", "both")
FIELDS = ["instruction_set", "head_width", "pass", "milliseconds", "added_percent", "quartiles", "pairs"]


def measure(width: int, pairs: int) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    *rows, grad = (torch.randn(LENGTH, 1, width, generator=generator) for _ in range(4))
    leaves = [x.requires_grad_() for x in rows]
    offsets = offsets_from_lengths(torch.tensor([LENGTH]))

    def seconds(dropout_p: float) -> dict[str, float]:
        times = [time.perf_counter()]
        out = flash_attention_varlen(leaves[0], leaves[1], leaves[2], offsets, dropout_p=dropout_p, seed=3)
        times.append(time.perf_counter())
        torch.autograd.grad(out, leaves, grad)
        times.append(time.perf_counter())
        return {"forward": times[1] - times[0], "backward": times[2] - times[1], "both": times[2] - times[0]}

    taken = [(seconds(0.0), seconds(0.1)) for _ in range(WARM_UP + pairs)][WARM_UP:]
    rows_of_table: list[dict[str, object]] = []
    for which in PASSES:
        added = [100 * (dropped[which] / whole[which] - 1) for whole, dropped in taken]
        lower, middle, upper = statistics.quantiles(added, n=4)
        row = {
            "head_width": width,
            "pass": which,
            "milliseconds": f"{1e3 * statistics.median(whole[which] for whole, _ in taken):.4g}",
            "added_percent": f"{middle:.1f}",
            "quartiles": f"{lower:.1f} to {upper:.1f}",
            "pairs": pairs,
        }
        rows_of_table.append(row)
    return rows_of_table


def main(pairs: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for isa in HERE:
        if isa == "avx512vnni":  # attention has no kernels of its own there
            continue
        with on_path(isa):
            for width in WIDTHS:
                rows += [{"instruction_set": isa, **row} for row in measure(width, pairs)]
                print(
                    isa,
                    width,
                    *(f"{row['pass']} +{row['added_percent']} %" for row in rows[-len(PASSES) :]),
                    flush=True,
                )
    torch.set_num_threads(threads)
    tables.replace(TABLE, FIELDS, rows, ("instruction_set", "head_width", "pass"))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
