"""Errors of the GPU kernels' products in float16, bfloat16, tf32 and float32 against float64, without a GPU.

    python -m benchmarks.gpu_numerics        # about 10 minutes of one core

writes benchmarks/results/gpu_numerics.json and docs/gpu_numerics.md. Measured twice: under Triton's interpreter as
tests/triton corrects it (every product with the input precision that the kernel asks for), and by executing the sm_80
PTX that Triton compiles (tests/ptx). Both sum in float32 in numpy's order, not in a tensor core's.

Inputs are standard normal, rounded to the dtype first; the reference computes on the rounded inputs in float64. So the
figures are errors of the arithmetic, not of the inputs' storage.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "results" / "gpu_numerics.json"
TABLE = ROOT / "docs" / "gpu_numerics.md"
ARITHMETICS = ("bf16", "fp16", "tf32", "fp32")
LENGTHS = {"interpreter": (64, 512, 2048), "ptx": (64, 512, 2048, 8192)}
FORWARD_ONLY = 4096
"""From this length on, only the output of the first tile of rows is measured, against all keys."""
WIDTH, EMBEDDING, QUERY_ROWS = 64, 1024, 32
UNIT = {"bf16": 2.0**-8, "fp16": 2.0**-11, "tf32": 2.0**-10, "fp32": 2.0**-23}
"""Largest relative error of one operand: half a step where it is rounded to nearest, a whole one where it is cut."""


def bound(result: str, arithmetic: str, length: int) -> float:
    """Documented bound of the relative error (Euclidean norm) of a result.

    16 bits: the weights and the result are rounded once each, gradients also meet the rounded output in δ. tf32: both
    operands of every product are cut. float32, and scores whose 16-bit products are exact: only sums round, whose
    errors grow with the root of their length.
    """
    sums = 2e-6 * math.sqrt(length)
    if result == "scores":
        return 2 * UNIT["tf32"] if arithmetic == "tf32" else 2e-6 * math.sqrt(EMBEDDING)
    if arithmetic == "fp32":
        return sums
    roundings = 2 if result == "out" else 4
    if result.startswith("grad_of"):  # MaxSim: one rounding, and weights cut to tf32 where products are
        return UNIT[arithmetic] + UNIT["tf32"]
    return roundings * UNIT[arithmetic]


def attention_errors(arithmetic: str, length: int, launches: AbstractContextManager[Any]) -> dict[str, float]:
    """Relative errors of the output and gradients of one sequence and one head."""
    import torch

    from m3kernels import _tiles
    from m3kernels.attention import reference, triton_kernels

    dtype = _dtype(arithmetic)
    generator = torch.Generator().manual_seed(length)
    q, k, v, grad = (torch.randn(length, 1, WIDTH, generator=generator).to(dtype) for _ in range(4))
    offsets = torch.tensor([0, length], dtype=torch.int32)
    scale = WIDTH**-0.5
    options = triton_kernels.Options(scale, None, 0.0, 0, arithmetic == "tf32")
    tiles = _tiles.for_architecture("attention", 80)
    exact = [x.double() for x in (q, k, v)]
    if length >= FORWARD_ONLY:
        with launches:
            out, _ = triton_kernels.forward(q, k, v, offsets, options, tiles)
        rows = tiles.find("forward", dtype, WIDTH, arithmetic == "tf32").block_m
        weights = torch.softmax(scale * exact[0][:rows, 0] @ exact[1][:, 0].T, 1)
        return {"out": _error(out[:rows, 0], weights @ exact[2][:, 0])}
    with launches:
        out, log_sum_exp = triton_kernels.forward(q, k, v, offsets, options, tiles)
        grads = triton_kernels.backward(grad, q, k, v, out, log_sum_exp, offsets, options, tiles)
    wanted = reference.flash_attention_varlen(*exact, offsets, scale)
    wanted_grads = reference.flash_attention_varlen_backward(grad.double(), *exact, *wanted, offsets, scale)
    names = ("out", "grad_q", "grad_k", "grad_v")
    return {name: _error(a, e) for name, a, e in zip(names, (out, *grads), (wanted[0], *wanted_grads))}


def maxsim_errors(arithmetic: str, length: int, launches: AbstractContextManager[Any]) -> dict[str, float]:
    """Relative errors of the score of one query and one passage of `length` rows, and of its gradients."""
    import torch

    from m3kernels import _tiles
    from m3kernels.maxsim import reference, triton_kernels

    dtype, allow_tf32 = _dtype(arithmetic), arithmetic == "tf32"
    generator = torch.Generator().manual_seed(length)
    queries, passages = (torch.randn(n, EMBEDDING, generator=generator).to(dtype) for n in (QUERY_ROWS, length))
    bounds = [torch.tensor([0, n], dtype=torch.int32) for n in (QUERY_ROWS, length)]
    grad = torch.full((1, 1), 0.3)
    tiles = _tiles.for_architecture("maxsim", 80)
    with launches:
        scores, argmax = triton_kernels.forward(queries, passages, *bounds, None, True, True, allow_tf32, tiles)
        grads = triton_kernels.backward(grad, queries, passages, *bounds, None, argmax, True, allow_tf32, tiles)
    exact = (queries.double(), passages.double(), *bounds)
    wanted, _ = reference.maxsim(*exact)
    wanted_grads = reference.maxsim_backward(grad.double(), *exact, argmax)
    names = ("scores", "grad_of_queries", "grad_of_passages")
    return {name: _error(a, e) for name, a, e in zip(names, (scores, *grads), (wanted, *wanted_grads))}


def _dtype(arithmetic: str) -> Any:
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(arithmetic, torch.float32)


def _error(actual: Any, expected: Any) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def measure(how: str, lengths: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """All errors, in a process that interprets Triton ("interpreter") or compiles it ("ptx")."""
    for op, errors in (("attention", attention_errors), ("maxsim", maxsim_errors)):
        for arithmetic in ARITHMETICS:
            for length in lengths if op == "attention" else lengths[:3]:
                if how == "ptx" and (arithmetic, op) == ("fp32", "attention") and length == 2048:
                    continue  # minutes: 64·2048² float32 products one fma at a time
                for result, error in errors(arithmetic, length, _launches(how, length)).items():
                    told = {"op": op, "how": how, "arithmetic": arithmetic, "length": length, "result": result}
                    yield told | {"error": float(f"{error:.3g}")}


def _launches(how: str, length: int) -> AbstractContextManager[Any]:
    if how == "interpreter":
        return nullcontext()
    from tests.ptx.triton_launches import simulated_triton

    return simulated_triton((lambda kernel, grid: [(0, 0, 0)]) if length >= FORWARD_ONLY else None)


def table(lines: list[dict[str, Any]]) -> str:
    """docs/gpu_numerics.md."""
    text = [
        "# Errors of the GPU kernels against float64",
        "",
        "Made by `python -m benchmarks.gpu_numerics`; figures in `benchmarks/results/gpu_numerics.json`. No GPU took",
        "part: *interpreter* is Triton's, corrected (`tests/triton/corrected_interpreter.py`), *PTX* the compiled",
        "sm_80 code run by the simulator of `tests/ptx`. Both sum in float32, in another order than tensor cores,",
        "which also cut the sums' low bits: a device may differ in the last digit given.",
        "",
        f"Relative error, Euclidean norm. Attention: one sequence, one head of {WIDTH}, standard normal; from",
        f"{FORWARD_ONLY} rows on the first tile of rows only. MaxSim: one query of {QUERY_ROWS} rows, one passage of",
        f"the given length, E = {EMBEDDING}. Inputs are rounded to the dtype before.",
        "The bounds are asserted by `tests/triton/interpreted/test_numerics_interpreted.py` and `tests/ptx`.",
        "",
    ]
    for op in ("attention", "maxsim"):
        of_op = [line for line in lines if line["op"] == op]
        lengths = sorted({line["length"] for line in of_op})
        text += [f"## {op}", "", "| result | arithmetic | measured by | "]
        text[-1] += " | ".join(f"{n} rows" for n in lengths) + f" | bound at {lengths[-1]} |"
        text += ["| --- | --- | --- |" + " ---: |" * (len(lengths) + 1)]
        for result in dict.fromkeys(line["result"] for line in of_op):
            for arithmetic in ARITHMETICS:
                for how in LENGTHS:
                    chosen = {
                        line["length"]: line["error"]
                        for line in of_op
                        if (line["result"], line["arithmetic"], line["how"]) == (result, arithmetic, how)
                    }
                    cells = [f"{chosen[n]:.1e}" if n in chosen else "–" for n in lengths]
                    limit = f"{bound(result, arithmetic, lengths[-1]):.1e}"
                    name = {"ptx": "PTX"}.get(how, how)
                    text.append(f"| {result} | {arithmetic} | {name} | " + " | ".join(cells) + f" | {limit} |")
        text.append("")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--how", choices=tuple(LENGTHS), help="measure one way only, and print JSON lines")
    how = parser.parse_args().how
    if how is not None:
        import torch

        torch.set_num_threads(1)
        if how == "interpreter":
            from tests.triton import corrected_interpreter

            corrected_interpreter.install()
        for line in measure(how, LENGTHS[how]):
            print(json.dumps(line), flush=True)
        return
    lines: list[dict[str, Any]] = []
    for way in LENGTHS:
        command = [sys.executable, "-m", "benchmarks.gpu_numerics", "--how", way]
        # Triton decides at import whether it interprets.
        environment = {**os.environ, "TRITON_INTERPRET": "1" if way == "interpreter" else "0"}
        run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stderr)
        lines += [json.loads(line) for line in run.stdout.splitlines()]
    RECORD.write_text("[\n" + ",\n".join(f"  {json.dumps(line)}" for line in lines) + "\n]\n")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(lines))
    beyond = [line for line in lines if line["error"] > bound(line["result"], line["arithmetic"], line["length"])]
    if beyond:
        sys.exit("\n".join(["errors beyond their documented bounds:", *map(json.dumps, beyond)]))


if __name__ == "__main__":
    main()
