"""One report of everything that only a GPU can tell: `make gpu-report`, or python -m benchmarks.gpu_report.

    --out FOLDER     default benchmarks/results/gpu; <device>.md, <device>.png and <device>.csv are written there
    --dry-run        run the scripts without a GPU: tiny shapes, Triton kernels under the interpreter, no numbers

It runs the tests of tests/gpu, then every peer of benchmarks.gpu_peers on every case, in turn for ROUNDS rounds, and
takes the median of their medians (triton.testing.do_bench, which empties the L2 cache before each call) and the memory
that a call allocates. A peer that is not installed, refuses a case or runs out of memory is a line that says so.
A dry run writes no time and no memory, so that none can be taken for a GPU's.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import statistics
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
DRY = "DRY RUN: no GPU, tiny shapes, Triton kernels under the interpreter. It shows that the scripts run, nothing else."
DRY_TESTS = "pairs or pack or sparse_embed or strided or tf32"
ROUNDS = 3
FIELDS = ["op", "case", "pass", "dtype", "peer", "milliseconds", "times_ours", "tflops", "memory_mib", "note"]


@dataclass
class Row:
    """One peer on one case; None: not measured, `note` says why."""

    op: str
    case: str
    training: bool
    dtype: str
    peer: str
    flops: float
    milliseconds: float | None = None
    memory_mib: float | None = None
    note: str = ""

    def cells(self, ours: float | None) -> list[str]:
        """As FIELDS."""
        time, memory, speed, ratio = "", "", "", ""
        if self.milliseconds is not None:
            time, speed = f"{self.milliseconds:.3f}", f"{self.flops / self.milliseconds / 1e9:.1f}"
            ratio = f"{self.milliseconds / ours:.2f}" if ours else ""
        if self.memory_mib is not None:
            memory = f"{self.memory_mib:.1f}"
        kind = "forward and backward" if self.training else "forward"
        return [self.op, self.case, kind, self.dtype, self.peer, time, ratio, speed, memory, self.note]


def run_tests(dry_run: bool) -> tuple[dict[str, int], list[str]]:
    """Counts of tests/gpu by outcome, and the names of those that failed."""
    environment = dict(os.environ)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    if dry_run:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment |= {"M3_GPU_DRY_RUN": "1", "TRITON_INTERPRET": "1", **threads}
        command += ["-k", DRY_TESTS]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "tests.xml"
        done = subprocess.run(
            [*command, f"--junitxml={log}"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if not log.exists():
            raise RuntimeError(f"the tests did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        tests = list(ElementTree.parse(log).iter("testcase"))
    failed = [
        str(test.get("name")) for test in tests if test.find("failure") is not None or test.find("error") is not None
    ]
    skipped = sum(test.find("skipped") is not None for test in tests)
    return {"passed": len(tests) - len(failed) - skipped, "failed": len(failed), "skipped": skipped}, failed


def measure(dry_run: bool) -> list[Row]:
    """Every case, dtype and peer."""
    from benchmarks import gpu_peers

    device = torch.device("cpu" if dry_run else "cuda")
    rows: list[Row] = []
    for case in gpu_peers.cases(tiny=dry_run):
        for dtype in (torch.bfloat16,) if dry_run else (torch.bfloat16, torch.float16):
            notes: dict[str, str] = {}
            calls = dict(gpu_peers.each_peer(case, device, dtype, notes))
            factor = (3.5 if case.op == "attention" else 3.0) if case.training else 1.0
            name = str(dtype).removeprefix("torch.")

            def row(peer: str, note: str = "") -> Row:
                return Row(case.op, case.name, case.training, name, peer, case.flops * factor, note=note)  # noqa: B023

            found = {peer: row(peer) for peer in calls}
            times: dict[str, list[float]] = {peer: [] for peer in calls}
            for turn in range(1 if dry_run else ROUNDS):
                for peer, call in calls.items():
                    if not found[peer].note:
                        _one_turn(call, found[peer], times[peer], first=turn == 0, dry_run=dry_run)
            for peer, values in times.items():
                if values and not found[peer].note:
                    found[peer].milliseconds = statistics.median(values)
            rows += [*found.values(), *(row(peer, note) for peer, note in notes.items())]
            print(
                f"{case.op}: {case.name}, {name}, {'forward and backward' if case.training else 'forward'}", flush=True
            )
            del calls
            if not dry_run:
                torch.cuda.empty_cache()
    return rows


def _one_turn(call, row: Row, times: list[float], *, first: bool, dry_run: bool) -> None:  # type: ignore[no-untyped-def]
    try:
        if dry_run:
            call()
            row.note = "ran"
            return
        from triton.testing import do_bench

        if first:
            call()  # compiles
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            row.memory_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        times.append(float(do_bench(call, return_mode="median")))
    except torch.cuda.OutOfMemoryError:
        row.note = "out of memory"
    except Exception as error:  # a peer's limits are its own
        row.note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]


def describe(dry_run: bool) -> dict[str, str]:
    """The device and the versions that the figures depend on."""
    import triton

    facts = {"torch": torch.__version__, "Triton": triton.__version__}
    if dry_run:
        return {"device": "none", **facts}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "compute capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "CUDA of torch": str(torch.version.cuda),
        **facts,
    }


def write(
    folder: Path, facts: dict[str, str], tests: dict[str, int], failed: list[str], rows: list[Row], dry_run: bool
) -> Path:
    """The Markdown file; the PNG and the CSV stand beside it."""
    slug = "dry_run" if dry_run else re.sub(r"\W+", "_", facts["device"].lower()).strip("_")
    folder.mkdir(parents=True, exist_ok=True)
    ours = {(row.op, row.case, row.training, row.dtype): row.milliseconds for row in rows if row.peer == "m3kernels"}
    table = [row.cells(ours[row.op, row.case, row.training, row.dtype]) for row in rows]
    with (folder / f"{slug}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([FIELDS, *table])
    _plot(folder / f"{slug}.png", rows, facts["device"], dry_run)
    lines = [f"# GPU report: {'DRY RUN' if dry_run else facts['device']}", ""]
    if dry_run:
        lines += [f"**{DRY}**", ""]
    lines += [*(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [
        "## Tests",
        "",
        ", ".join(f"{count} {outcome}" for outcome, count in tests.items()) + " (`tests/gpu`)",
        "",
    ]
    lines += [f"- failed: `{name}`" for name in failed]
    lines += ["## Speed and memory", "", f"![bars]({slug}.png)", ""]
    lines += ["| " + " | ".join(FIELDS) + " |", "|" + " --- |" * len(FIELDS)]
    lines += ["| " + " | ".join(cells) + " |" for cells in table]
    path = folder / f"{slug}.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def _plot(path: Path, rows: list[Row], device: str, dry_run: bool) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[str, list[Row]] = {}
    for row in rows:
        kind = "forward and backward" if row.training else "forward"
        groups.setdefault(f"{row.op}: {row.case}, {row.dtype}, {kind}", []).append(row)
    figure, panels = pyplot.subplots(len(groups), 1, figsize=(9, 1.6 * len(groups)), squeeze=False)
    for axes, (title, group) in zip(panels[:, 0], groups.items()):
        axes.barh(
            range(len(group)),
            [row.milliseconds or 0 for row in group],
            color=["tab:orange" if row.peer == "m3kernels" else "tab:gray" for row in group],
        )
        for place, row in enumerate(group):
            label = f" {row.milliseconds:.3g} ms" if row.milliseconds is not None else f" {row.note}"
            axes.text(row.milliseconds or 0, place, label, va="center", size=6)
        axes.set_yticks(range(len(group)), [row.peer for row in group], fontsize=6)
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.set_title(title, fontsize=7, loc="left")
        axes.tick_params(axis="x", labelsize=6, labelbottom=not dry_run)
    figure.suptitle(
        "DRY RUN, no GPU, no figures" if dry_run else device, fontsize=10, color="red" if dry_run else "black"
    )
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    chosen = parser.parse_args(arguments)
    if chosen.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        from benchmarks import gpu_dry_run

        gpu_dry_run.install()
    elif not torch.cuda.is_available():
        parser.error("torch sees no NVIDIA GPU; --dry-run (make gpu-report DRY_RUN=1) only checks the scripts")
    tests, failed = run_tests(chosen.dry_run)
    rows = measure(chosen.dry_run)
    folder = chosen.out or (ROOT / "build" / "gpu_report" if chosen.dry_run else RESULTS)
    print(write(folder, describe(chosen.dry_run), tests, failed, rows, chosen.dry_run))
    broken = [row for row in rows if row.peer == "m3kernels" and row.note not in ("", "ran")]
    for row in broken:
        print(f"{row.op}, {row.case}: {row.note}", file=sys.stderr)
    return 1 if failed or broken else 0


if __name__ == "__main__":
    sys.exit(main())
