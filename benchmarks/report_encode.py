"""Measures encoding against its peers, interleaved, and writes encode.csv, encode.png and encode_machine.json.

    python -m benchmarks.report_encode prepare [layers]                 # model folders, ONNX files, lists of texts
    python -m benchmarks.report_encode run SHAPE TEXTS TOKENS [layers] [peer+peer+...]
    python -m benchmarks.report_encode long [layers [peer+peer+...]]    # one document of 8192 tokens
    python -m benchmarks.report_encode plot

SHAPE is bge-m3 or embedded, TEXTS queries, paragraphs, documents or mixed (benchmarks.encode_cases). Every peer is a
process of its own (benchmarks.peers.encode) with two threads; all start first, then take turns, together with a
measurement of the multiply-add peak, so that all see the same weather. Times are medians; "fraction of peak" divides
the operations that the tokens need, padding not counted, by time and peak. Memory is the rise of the resident peak
during the first encoding, on top of the loaded model. "cosine" is the smallest one with transformers' eager attention
(sdpa, where eager was not run). A peer measured in a run of its own is compared with the row of m3model that is there.

Peers other than ours run in the interpreters M3_PEERS_PYTHON (transformers, sentence-transformers, onnxruntime, onnx)
and M3_PARITY_PYTHON (FlagEmbedding).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import encode_cases, tables
from benchmarks.encode_cases import SHAPES, Shape
from benchmarks.machine import results_folder
from benchmarks.peak import peak_flops
from benchmarks.peers.encode import BATCH, THREADS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = results_folder()
FIELDS = [
    "shape",
    "layers",
    "texts",
    "tokens",
    "peer",
    "outputs",
    "batch",
    "threads",
    "seconds",
    "rounds",
    "tokens_per_s",
]
FIELDS += ["times_ours", "fraction_of_peak", "peak_gflops", "memory_mb", "cosine"]
ALL_OUTPUTS = ("m3model", "m3model bf16", "m3model int8", "FlagEmbedding")
BASE = "transformers eager"
PEERS = ["m3model", "m3model, dense only", "m3model bf16", "m3model int8", "m3model int8, dense only", "FlagEmbedding"]
PEERS += ["transformers sdpa", BASE, "sentence-transformers", "ONNX Runtime float32", "ONNX Runtime int8"]
SECONDS = float(os.environ.get("M3_BENCH_SECONDS", "150"))
"""Time for one case, starts and first encodings included. If it leaves no round, the first encodings are the times."""
VECTORS = encode_cases.CACHE / "encode_vectors"
"""Dense vectors of the last run of each case and peer, for peers that are measured in a run of their own."""


def interpreter(peer: str) -> str:
    if peer.startswith("m3model"):
        return sys.executable
    name = "M3_PARITY_PYTHON" if peer == "FlagEmbedding" else "M3_PEERS_PYTHON"
    if name not in os.environ:
        sys.exit(f"{name} must name a Python that has what {peer!r} needs")
    return os.environ[name]


class Peer:
    """A peer's process."""

    def __init__(self, name: str, folder: Path, texts: Path, out: Path) -> None:
        command = [interpreter(name), "-m", "benchmarks.peers.encode", name, str(folder), str(texts), str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self.out = out
        self.errors = out.with_suffix(".log")
        with self.errors.open("w") as errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            self.process = subprocess.Popen(command, text=True, cwd=ROOT, env=environment, **pipes)  # type: ignore[call-overload]

    def ask(self, request: str) -> dict[str, float]:
        self.process.stdin.write(json.dumps({request: True}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.process.args[3]} has ended: {self.errors.read_text()[-2000:]}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(
    shape_name: str, shape: Shape, folder: Path, kind: str, texts: list[str], names: list[str]
) -> list[dict[str, Any]]:
    """Rows of one case: each peer encodes once for memory and outputs, then in turns as long as SECONDS allow."""
    lengths = encode_cases.lengths(texts, folder)
    times: dict[str, list[float]] = {name: [] for name in names}
    first: dict[str, dict[str, float]] = {}
    peaks = []
    begin = time.monotonic()

    def vectors(name: str) -> Path:
        return VECTORS / f"{folder.name} {kind} {len(texts)} {sum(lengths)} {name}.npy"

    VECTORS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch) / "texts.json"
        listed.write_text(json.dumps(texts))
        peers = {name: Peer(name, folder, listed, vectors(name)) for name in names}
        for name, peer in peers.items():
            first[name] = peer.ask("first")
        longest = sum(answer["seconds"] for answer in first.values())
        while time.monotonic() - begin + longest < SECONDS:
            start = time.monotonic()
            peaks.append(peak_flops(THREADS))
            for name, peer in peers.items():
                times[name].append(peer.ask("run")["seconds"])
            longest = max(longest, time.monotonic() - start)
        for peer in peers.values():
            peer.end()
        if not peaks:
            peaks = [peak_flops(THREADS)]
            times = {name: [first[name]["seconds"]] for name in names}
        base = next((name for name in (BASE, "transformers sdpa") if vectors(name).exists()), names[-1])
        cosine = {name: float((np.load(vectors(name)) * np.load(vectors(base))).sum(1).min()) for name in names}
    peak = max(peaks)  # the loop of multiply-adds cannot run faster than the processor, only be disturbed
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return [
        {
            "shape": shape_name,
            "layers": shape.layers,
            "texts": f"{kind} ({len(texts)})",
            "tokens": sum(lengths),
            "peer": name,
            "outputs": "all three" if name in ALL_OUTPUTS else "dense",
            "batch": "packed" if name.startswith("m3model") else BATCH,
            "threads": THREADS,
            "seconds": f"{seconds[name]:.4g}",
            "rounds": len(times[name]),
            "tokens_per_s": f"{sum(lengths) / seconds[name]:.5g}",
            "fraction_of_peak": f"{shape.flops(lengths) / seconds[name] / peak:.3f}",
            "peak_gflops": f"{peak / 1e9:.4g}",
            "memory_mb": f"{first[name]['bytes'] / 1e6:.4g}",
            "cosine": f"{cosine[name]:.7f}",
        }
        for name in names
    ]


def prepare(layers: int | None) -> None:
    for name in SHAPES:
        folder = encode_cases.model_folder(name, encode_cases.shape_of(name, layers if name == "bge-m3" else None))
        if not (folder / "model.int8.onnx").exists():
            command = [interpreter("ONNX Runtime"), "-m", "benchmarks.peers.encode", "export", str(folder), "-", "-"]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True, text=True)
            print(folder.name, "operators fused by onnxruntime:", done.stdout.strip())


def store(rows: list[dict[str, Any]]) -> None:
    """Put the rows in the place of those of the same case and peers, and print them."""
    table = RESULTS / "encode.csv"
    keys = ("shape", "layers", "texts", "tokens", "peer")
    known = tables.read(table) + rows
    for row in rows:
        case = (*(str(row[key]) for key in keys[:-1]), "m3model")
        ours = [like for like in known if tuple(str(like[key]) for key in keys) == case]
        row["times_ours"] = f"{float(row['seconds']) / float(ours[-1]['seconds']):.3g}" if ours else ""
    tables.replace(table, FIELDS, rows, keys)
    torch.set_num_threads(THREADS)
    tables.write_machine(RESULTS / "encode_machine.json")
    for row in rows:
        print(*(row[name] for name in ("peer", "seconds", "rounds", *FIELDS[10:])), sep="\t")


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = tables.read(RESULTS / "encode.csv")
    cases = list(dict.fromkeys((row["shape"], row["layers"], row["texts"], row["tokens"]) for row in rows))
    figure, axes = pyplot.subplots(len(cases), 1, figsize=(9, 0.34 * len(rows) + 0.9 * len(cases)), squeeze=False)
    for axis, case in zip(axes[:, 0], cases):
        part = [row for row in rows if (row["shape"], row["layers"], row["texts"], row["tokens"]) == case]
        colors = ["tab:orange" if row["peer"].startswith("m3model") else "tab:gray" for row in part]
        names = [f"{row['peer']}{', three outputs' if row['outputs'] == 'all three' else ''}" for row in part]
        bars = axis.barh(names, [float(row["tokens_per_s"]) for row in part], color=colors)
        notes = [
            f" {float(row['tokens_per_s']):.0f}"
            + (f" ({100 * float(row['fraction_of_peak']):.0f} % of peak)" if row["fraction_of_peak"] else "")
            for row in part
        ]
        axis.bar_label(bars, notes, fontsize=7)
        axis.invert_yaxis()
        axis.margins(x=0.25)
        axis.tick_params(labelsize=7)
        axis.set_title(f"{case[0]}, {case[1]} layers, {case[2]} texts, {case[3]} tokens: tokens/s", fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "encode.png", dpi=130)


def main(arguments: list[str]) -> None:
    match arguments:
        case ["prepare", *layers]:
            prepare(int(layers[0]) if layers else None)
        case ["run", ("bge-m3" | "embedded") as name, kind, tokens, *rest]:
            shape = encode_cases.shape_of(name, int(rest[0]) if rest else None)
            folder = encode_cases.model_folder(name, shape)
            names = rest[1].split("+") if len(rest) > 1 else PEERS
            store(measure(name, shape, folder, kind, encode_cases.texts(kind, int(tokens), folder), names))
        case ["long", *rest]:
            shape = encode_cases.shape_of("bge-m3", int(rest[0]) if rest else None)
            names = rest[1].split("+") if len(rest) > 1 else ["m3model", "transformers sdpa"]
            folder = encode_cases.model_folder("bge-m3", shape)
            texts = [encode_cases.long_document(encode_cases.MAX_LENGTH, folder)]
            store(measure("bge-m3", shape, folder, "long", texts, names))
        case ["plot"]:
            plot()
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
