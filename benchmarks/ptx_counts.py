"""Every compiled GPU kernel executed on the CPU: errors at small ragged shapes, and counts at a working shape.

    python -m benchmarks.ptx_counts          # all; for a part: --only counts | errors, --op OP, --architecture 80 | 90

writes benchmarks/results/ptx_counts.json and docs/gpu_counts.md. The kernels are sm_80 PTX from Triton and nvcc, and
sm_90 PTX from Triton, run by tests/ptx/simulator: instructions of warps, products, 32-byte sectors of global memory
(what L1 asks of L2) and shared-memory wavefronts are counted exactly, the latter without what wgmma reads. Where all
blocks do the same, some run and the counts are multiplied.

These are counts, not times; the times in the table are lower bounds from published peaks (gpu_peaks.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_peaks import GPUS
from m3kernels import _tiles, compiled_tables
from m3kernels.attention import triton_kernels as attention
from m3kernels.maxsim import triton_kernels as maxsim
from m3kernels.sparse import reference as sparse_reference
from tests.ptx import cases
from tests.ptx.cuda_launches import simulated_cuda, sources_digest
from tests.ptx.triton_launches import ARCHITECTURE, Grid, Launch, simulated_triton

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "results" / "ptx_counts.json"
TABLE = ROOT / "docs" / "gpu_counts.md"
ARITHMETICS = ("bf16", "fp16", "tf32", "fp32")
ARCHITECTURES = {ARCHITECTURE: ARITHMETICS, 90: ("bf16", "tf32")}
"""Whose PTX is counted, in which arithmetics: on sm_90 those with wgmma, of which fp16 is as bf16."""

SEQUENCES, LENGTH, HEADS, WIDTH = 32, 512, 16, 64
QUERIES, QUERY_ROWS, PASSAGES, PASSAGE_ROWS, EMBEDDING = 32, 32, 256, 128, 1024
VOCABULARY = 250_002
OPS = ("attention", "maxsim", "cuda")
"""Parts of the record; "cuda": sparse and packing."""
QUERY_LENGTHS = {ARCHITECTURE: (5, 0, 40), 90: (5, 0, 150)}
"""Of the small ragged shapes: enough rows for several turns of every loop."""


@dataclass(frozen=True)
class Count:
    """Counts of one kernel at a working shape, for all of its blocks."""

    op: str
    kernel: str
    architecture: int
    arithmetic: str
    shape: str
    blocks: int
    blocks_run: int
    threads: int
    instructions: int
    tensor_flops: int
    float_flops: int
    minimum_flops: int
    load_bytes: int
    store_bytes: int
    minimum_bytes: int
    """Each input read once, each output written once."""
    wanted_bytes: int
    """What the threads asked for; less than load_bytes + store_bytes where sectors are used in part."""
    shared_phases: int
    bank_conflicts: int


def count(
    op: str,
    launch: Launch,
    arithmetic: str,
    shape: str,
    factor: int,
    minimum_flops: int,
    minimum_bytes: int | None,
    architecture: int = ARCHITECTURE,
) -> Count:
    """The counts of a launch whose blocks that ran stand for `factor` times as many."""
    c = launch.counters
    once = 32 * (c.global_distinct_load_sectors + c.global_distinct_store_sectors)
    return Count(
        op=op,
        kernel=launch.kernel.removesuffix("_kernel").replace("_kernel<", "<"),
        architecture=architecture,
        arithmetic=arithmetic,
        shape=shape,
        blocks=c.blocks * factor,
        blocks_run=c.blocks,
        threads=launch.threads,
        instructions=c.instructions * factor,
        tensor_flops=c.tensor_flops * factor,
        float_flops=c.float_flops * factor,
        minimum_flops=minimum_flops,
        load_bytes=32 * c.global_load_sectors * factor,
        store_bytes=32 * c.global_store_sectors * factor,
        minimum_bytes=once if minimum_bytes is None else minimum_bytes,
        wanted_bytes=(c.global_load_bytes + c.global_store_bytes) * factor,
        shared_phases=c.shared_phases * factor,
        bank_conflicts=c.bank_conflicts * factor,
    )


def attention_counts(arithmetic: str, architecture: int = ARCHITECTURE) -> Iterator[Count]:
    """All blocks of one head of the first sequence run; the others are the same."""
    dtype = cases.DTYPES[arithmetic]
    rows = SEQUENCES * LENGTH
    offsets = torch.arange(SEQUENCES + 1, dtype=torch.int32) * LENGTH
    q, k, v = torch.randn(rows, 3, HEADS, WIDTH).to(dtype).unbind(1)
    grad = torch.randn(rows, HEADS, WIDTH).to(dtype)
    options = attention.Options(WIDTH**-0.5, None, 0.0, 0, arithmetic == "tf32")
    tiles = _tiles.for_architecture("attention", architecture)

    def first_head(kernel: str, grid: Grid) -> list[Grid]:
        return [(x, 0, 0) for x in range(grid[0] // SEQUENCES)]

    with simulated_triton(first_head, architecture=architecture) as launches:
        out, log_sum_exp = attention.forward(q, k, v, offsets, options, tiles)
        attention.backward(grad, q, k, v, out, log_sum_exp, offsets, options, tiles)
    values, sums = rows * HEADS * WIDTH * dtype.itemsize, 4 * rows * HEADS
    product = 2 * SEQUENCES * LENGTH**2 * HEADS * WIDTH
    minimum = {
        "forward_kernel": (2 * product, 4 * values + sums),
        "backward_q_kernel": (3 * product, 6 * values + 2 * sums),
        "backward_kv_kernel": (4 * product, 6 * values + 2 * sums),
    }
    shape = f"{SEQUENCES}×{LENGTH} rows, {HEADS} heads of {WIDTH}"
    for launch in launches:
        yield count("attention", launch, arithmetic, shape, SEQUENCES * HEADS, *minimum[launch.kernel], architecture)


def maxsim_counts(arithmetic: str, architecture: int = ARCHITECTURE) -> Iterator[Count]:
    """One block (backward_p: those of one passage) runs; the others are the same."""
    dtype, allow_tf32 = cases.DTYPES[arithmetic], arithmetic == "tf32"
    query_rows, passage_rows = QUERIES * QUERY_ROWS, PASSAGES * PASSAGE_ROWS
    queries, passages = (torch.randn(n, EMBEDDING).to(dtype) for n in (query_rows, passage_rows))
    query_offsets = torch.arange(QUERIES + 1, dtype=torch.int32) * QUERY_ROWS
    passage_offsets = torch.arange(PASSAGES + 1, dtype=torch.int32) * PASSAGE_ROWS
    sides = (queries, passages, query_offsets, passage_offsets)
    argmax = torch.randint(PASSAGE_ROWS, (query_rows, PASSAGES), dtype=torch.int32) + passage_offsets[:-1]
    pairs = torch.stack([torch.arange(PASSAGES) % QUERIES, torch.arange(PASSAGES)], 1).int()
    tiles = _tiles.for_architecture("maxsim", architecture)
    factors: dict[str, int] = {}

    def sample(kernel: str, grid: Grid) -> list[Grid]:
        chosen = grid[0] // PASSAGES if kernel == "backward_p_kernel" else 1
        factors[kernel] = grid[0] * grid[1] // chosen
        return [(x, 0, 0) for x in range(chosen)]

    with simulated_triton(sample, architecture=architecture) as launches:
        maxsim.forward(*sides, None, True, True, allow_tf32, tiles)
        maxsim.backward(torch.ones(QUERIES, PASSAGES), *sides, None, argmax, True, allow_tf32, tiles)
        maxsim.pairs_forward(*sides, pairs, None, True, allow_tf32, tiles)
    q, p = query_rows * EMBEDDING * dtype.itemsize, passage_rows * EMBEDDING * dtype.itemsize
    maxima, scores = 4 * query_rows * PASSAGES, 4 * QUERIES * PASSAGES
    gather = 2 * query_rows * PASSAGES * EMBEDDING
    minimum = {
        "forward_kernel": (2 * query_rows * passage_rows * EMBEDDING, q + p + 2 * maxima),
        "sum_kernel": (query_rows * PASSAGES, maxima + scores),
        "backward_q_kernel": (gather, p + maxima + scores + q),
        "backward_p_kernel": (gather, q + maxima + scores + p),
        "pairs_forward_kernel": (2 * QUERY_ROWS * passage_rows * EMBEDDING, q + p + 4 * PASSAGES),
    }
    shape = f"{QUERIES} queries of {QUERY_ROWS}, {PASSAGES} passages of {PASSAGE_ROWS}, E = {EMBEDDING}"
    for launch in launches:
        factor = factors[launch.kernel]
        yield count("maxsim", launch, arithmetic, shape, factor, *minimum[launch.kernel], architecture)


def texts(count_of_texts: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Token ids that repeat as words do (Zipf), and offsets."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(count_of_texts * length, generator=generator)
    ids = (4 + torch.exp(uniform * torch.log(torch.tensor(float(VOCABULARY - 4))))).int().clamp(max=VOCABULARY - 1)
    return ids, torch.arange(count_of_texts + 1, dtype=torch.int32) * length


def sparse_counts(arithmetic: str) -> Iterator[Count]:
    """All blocks run. The minimum of bytes is what was touched at least once."""
    dtype = cases.DTYPES[arithmetic]
    ids, offsets = texts(16, LENGTH, 0)
    rows = ids.numel()
    hidden, weight = torch.randn(rows, EMBEDDING).to(dtype), torch.randn(EMBEDDING).to(dtype)
    bias, grad = torch.zeros(1, dtype=dtype), torch.randn(rows).to(dtype)
    shape = f"{rows // LENGTH}×{LENGTH} tokens, E = {EMBEDDING}"
    flops = {"token_weights": 2 * rows * EMBEDDING}
    with simulated_cuda() as cuda:
        _, _, _, winners = cuda.ops.sparse_embed(hidden, weight, bias, ids, offsets, [0, 1, 2, 3])
        cuda.ops.sparse_embed_backward(grad, hidden, weight, winners)
    for launch in cuda.launches:
        minimum = flops.get(launch.kernel.partition("_kernel")[0], 0)
        yield count("sparse_embed", launch, arithmetic, shape, 1, minimum, None)

    sides: list[Tensor] = []
    for texts_of_side, length in ((QUERIES, 12), (PASSAGES, 80)):
        ids, offsets = texts(texts_of_side, length, length)
        weights, unique, pooled, _ = sparse_reference.sparse_pool(torch.rand(ids.numel()), ids, offsets, ())
        sides += [unique, weights.to(dtype), pooled]
    shape = f"{QUERIES} queries of 12, {PASSAGES} passages of 80 tokens"
    with simulated_cuda() as cuda:
        scores = cuda.ops.sparse_scores(*sides)
        cuda.ops.sparse_scores_backward(torch.randn_like(scores), *sides)
    for launch in cuda.launches:
        yield count("sparse_scores", launch, arithmetic, shape, 1, 0, None)


def packing_counts(arithmetic: str) -> Iterator[Count]:
    """All blocks run."""
    rows = torch.randn(16 * 300, EMBEDDING).to(cases.DTYPES[arithmetic])
    offsets = torch.tensor([0, *torch.cumsum(torch.tensor([100, 500] * 8), 0)], dtype=torch.int32)
    with simulated_cuda() as cuda:
        cuda.ops.pack(cuda.ops.unpack(rows, offsets, 512), offsets, rows.shape[0])
    for launch in cuda.launches:
        yield count("packing", launch, arithmetic, f"16 texts of 100 and 500 rows, E = {EMBEDDING}", 1, 0, None)


def counts_of(op: str, architecture: int) -> Iterator[Count]:
    """Every kernel of an op ("cuda": those of CUDA C++, in bfloat16 for both 16-bit types: only conversions differ)."""
    if op != "cuda":
        make = {"attention": attention_counts, "maxsim": maxsim_counts}[op]
        for arithmetic in ARCHITECTURES[architecture]:
            yield from make(arithmetic, architecture)
    elif architecture == ARCHITECTURE:
        for arithmetic in ("bf16", "fp32"):
            yield from sparse_counts(arithmetic)
            yield from packing_counts(arithmetic)


def errors_of(op: str, architecture: int) -> Iterator[dict[str, Any]]:
    """Errors of every kernel, dtype, width and option at a small ragged shape; an error beyond its bound raises."""
    if op == "attention":
        for arithmetic, width, options in itertools.product(ARITHMETICS, attention.HEAD_WIDTHS, cases.OPTIONS):
            outcome = cases.run_attention(arithmetic, width, options, architecture=architecture)
            outcome.check()
            yield error_line(op, architecture, arithmetic, f"head width {width}, {options}", outcome)
    elif op == "maxsim":
        variants = ((8, True, False), (72, True, True), (64, False, False), (1024, False, True))
        for arithmetic, (width, mean, floor) in itertools.product(ARITHMETICS, variants):
            rows = QUERY_LENGTHS[architecture]
            outcome = cases.run_maxsim(arithmetic, width, mean, floor, query_lengths=rows, architecture=architecture)
            outcome.check()
            options = f"E = {width}, {'mean' if mean else 'sum'}{', zero floor' if floor else ''}"
            yield error_line(op, architecture, arithmetic, options, outcome)
    elif architecture == ARCHITECTURE:
        for name, width in itertools.product(("fp32", "bf16", "fp16"), (1, 7, 40, 1024)):
            yield exact_line("sparse", name, f"E = {width}", cases.run_sparse(cases.DTYPES[name], width))
        moved = ((torch.bool, 7), *((torch.bfloat16, width) for width in (3, 6, 4)), (torch.float32, 40))
        for dtype, width in moved:
            name = str(dtype).removeprefix("torch.")
            yield exact_line("packing", name, f"width {width}", cases.run_packing(dtype, width))


def error_line(op: str, architecture: int, arithmetic: str, options: str, outcome: cases.Outcome) -> dict[str, Any]:
    kernels = sorted({launch.kernel.removesuffix("_kernel") for launch in outcome.launches})
    told = {"op": op, "architecture": architecture, "arithmetic": arithmetic, "options": options, "kernels": kernels}
    for name, values in (("errors", outcome.errors), ("bounds", outcome.bounds)):
        told[name] = {result: float(f"{value:.2e}") for result, value in values.items()}
    return told


def exact_line(op: str, arithmetic: str, options: str, launches: list[Launch]) -> dict[str, Any]:
    kernels = sorted({launch.kernel for launch in launches})
    told = {"op": op, "architecture": ARCHITECTURE, "arithmetic": arithmetic, "options": options}
    return {**told, "kernels": kernels, "errors": {}, "bounds": {}}


def origin(op: str, architecture: int) -> dict[str, str]:
    """What a part of the record depends on: hashes of Triton, sources and tiles, or of the CUDA sources."""
    if op == "cuda":
        return {"cuda": sources_digest()} if architecture == ARCHITECTURE else {}
    return {entry.name: entry.hash for entry in compiled_tables.entries([op], [architecture])}


def read_counts() -> list[Count] | None:
    """The recorded counts, or None where they were made from other sources."""
    if not RECORD.exists():
        return None
    record = json.loads(RECORD.read_text())
    present = {f"{op} {number}": origin(op, number) for op, number in itertools.product(OPS, ARCHITECTURES)}
    return [Count(**line) for line in record["counts"]] if record["origin"]["counts"] == present else None


def table(counts: list[Count], errors: list[dict[str, Any]]) -> str:
    """docs/gpu_counts.md."""
    lines = [
        "# What the compiled GPU kernels do, counted",
        "",
        "Made by `python -m benchmarks.ptx_counts`; figures in `benchmarks/results/ptx_counts.json`. The PTX",
        "that Triton (sm_80 and sm_90) and nvcc (sm_80) make is executed by the simulator of `tests/ptx`; no GPU took",
        "part. Counts are exact for that PTX. Times are **lower bounds** computed from them and from published peaks",
        "(`benchmarks/gpu_peaks.py`), not results: the largest of products on tensor cores, float32 operations, and",
        "the fewest bytes over memory bandwidth.",
        "",
        "- FLOP ×: operations done (tensor cores and float32 units) over those that the formula needs.",
        "- MB min: each input read once, each output written once (CUDA C++ kernels: sectors touched at least once).",
        "- L2 ×: 32-byte sectors asked of L2 over that minimum; tiles read keys again for each tile of queries.",
        "- used: bytes that threads wanted of these sectors (above 100 %: lanes that share them).",
        "- conflicts: extra shared-memory wavefronts for each one needed; what wgmma reads (sm_90) is not counted.",
        "- tf32 on sm_90: wgmma takes its operands with K innermost alone. Triton turns tiles round in shared memory,",
        "  word by word: bank conflicts, and in attention's forward 4 bytes of a sector at a time.",
        "",
        "| op | kernel | sm | arithmetic | M warp instr. | GFLOP | FLOP × | MB min | L2 × | used | conflicts |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for c in counts:
        flops, moved = c.tensor_flops + c.float_flops, c.load_bytes + c.store_bytes
        lines.append(
            f"| {c.op} | {c.kernel} | {c.architecture} | {c.arithmetic} "
            f"| {c.instructions / 1e6:.2f} | {flops / 1e9:.2f} "
            f"| {f'{flops / c.minimum_flops:.2f}' if c.minimum_flops else '–'} | {c.minimum_bytes / 1e6:.2f} "
            f"| {moved / c.minimum_bytes:.2f} | {100 * c.wanted_bytes / moved:.0f} % "
            f"| {f'{c.bank_conflicts / c.shared_phases:.2f}' if c.shared_phases else '–'} |"
        )
    lines += ["", "Shapes:", ""]
    lines += [f"- {op}: {shape}" for op, shape in dict.fromkeys((c.op, c.shape) for c in counts)]
    lines += ["", "## Lower bounds of time, microseconds", "", "From the counts of sm_80.", ""]
    lines += ["| op | kernel | arithmetic | " + " | ".join(gpu.name for gpu in GPUS) + " |"]
    lines += ["| --- | --- | --- |" + " ---: |" * len(GPUS)]
    for c in counts:
        if c.architecture != ARCHITECTURE:
            continue
        arithmetic = "tf32" if c.arithmetic == "tf32" or c.kernel == "backward_p" else "16bit"
        times = [gpu.seconds(c.tensor_flops, arithmetic, c.float_flops, c.minimum_bytes) for gpu in GPUS]
        lines.append(f"| {c.op} | {c.kernel} | {c.arithmetic} | " + " | ".join(f"{1e6 * t:.1f}" for t in times) + " |")
    lines += ["", "## Errors against float64 at small ragged shapes", ""]
    lines += ["Relative, in the Euclidean norm; the worst result of all widths and options of a line.", ""]
    lines += [
        "| op | sm | arithmetic | cases | worst result | error | its bound |",
        "| --- | --- | --- | ---: | --- | ---: | ---: |",
    ]
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for line in errors:
        groups.setdefault((line["op"], line["architecture"], line["arithmetic"]), []).append(line)
    for (op, architecture, arithmetic), same in groups.items():
        shares = [(e / line["bounds"][name], name, e, line["bounds"][name])
                  for line in same for name, e in line["errors"].items()]  # fmt: skip
        if shares:
            _, name, error, bound = max(shares)
            lines.append(f"| {op} | {architecture} | {arithmetic} | {len(same)} | {name} | {error:.1e} | {bound:.1e} |")
        else:
            lines.append(f"| {op} | {architecture} | {arithmetic} | {len(same)} | all | 0 | exact |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=("counts", "errors"), help="make one part anew and keep the other")
    parser.add_argument("--op", choices=OPS, help="only this op's part")
    parser.add_argument("--architecture", type=int, choices=ARCHITECTURES, help="only this one's part")
    asked = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    kept: dict[str, Any] = {"origin": {}, "counts": [], "errors": []}
    if RECORD.exists():
        kept = json.loads(RECORD.read_text())
    makers: dict[str, Callable[[str, int], Iterator[Any]]] = {"counts": counts_of, "errors": errors_of}
    for part, make in makers.items():
        lines: list[dict[str, Any]] = []
        for architecture, op in itertools.product(ARCHITECTURES, OPS):
            chosen = (
                asked.only in (None, part) and asked.op in (None, op) and asked.architecture in (None, architecture)
            )
            if not chosen:
                lines += [one for one in kept[part] if (one["architecture"], part_of(one["op"])) == (architecture, op)]
                continue
            for item in make(op, architecture):
                lines.append(asdict(item) if isinstance(item, Count) else item)
                print(json.dumps(lines[-1]), flush=True)
            kept["origin"].setdefault(part, {})[f"{op} {architecture}"] = origin(op, architecture)
        kept[part] = lines
    blocks = [f'  "origin": {json.dumps(kept["origin"])}']
    for part in makers:
        blocks.append(f'  "{part}": [\n' + ",\n".join(f"    {json.dumps(line)}" for line in kept[part]) + "\n  ]")
    RECORD.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table([Count(**line) for line in kept["counts"]], kept["errors"]))


def part_of(op: str) -> str:
    """The part of the record that an op of a line belongs to."""
    return op if op in OPS else "cuda"


if __name__ == "__main__":
    main()
