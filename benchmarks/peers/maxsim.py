"""One implementation of late interaction in a process of its own, driven over stdin: a crash ends it and nothing else.

    python -m benchmarks.peers.maxsim PEER          lines in: {"case": NAME}, {"memory": true}, {"error": true},
                                                    {"run": true}

It answers each line with a line of JSON: {"ready": true}, {"bytes": b}, {"error": e} or {"seconds": s}. Rows are padded
beforehand for peers that need it, and forms that an index would store are made beforehand; queries are not.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.maxsim_cases import CASES, Case

Score = Callable[[Tensor], Tensor]
"""Scores [Nq, Np] of queries [Nq, Lq, E] with the passages that were prepared."""


def _padded(case: Case, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Passages [Np, Lp, E], and their mask where they are not equally long."""
    lengths = list(case.passage_lengths)
    if len(set(lengths)) == 1:
        return rows.view(len(lengths), lengths[0], case.width), None
    padded = torch.nn.utils.rnn.pad_sequence(list(rows.split(lengths)), batch_first=True)
    real = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
    return padded, real.to(padded.device)


def ours(case: Case, rows: Tensor) -> Score:
    from m3kernels import maxsim

    offsets = case.offsets()
    return lambda queries: maxsim(queries.flatten(0, 1), rows, *offsets, reduce="sum")


def ours_bfloat16(case: Case, rows: Tensor) -> Score:
    score = ours(case, rows.bfloat16())
    return lambda queries: score(queries.bfloat16())


def _ours_quantized(bits: int) -> Callable[[Case, Tensor], Score]:
    def prepare(case: Case, rows: Tensor) -> Score:
        from m3kernels import maxsim, quantize_rows

        offsets, stored = case.offsets(), quantize_rows(rows, bits)  # type: ignore[arg-type]
        return lambda queries: maxsim(queries.flatten(0, 1), stored, *offsets, reduce="sum")

    return prepare


def einsum(case: Case, rows: Tensor) -> Score:
    padded, mask = _padded(case, rows)

    def score(queries: Tensor) -> Tensor:
        similarities = torch.einsum("ash,bth->abst", queries, padded)
        if mask is not None:
            similarities = similarities.masked_fill(~mask[None, :, None, :], float("-inf"))
        return similarities.amax(-1).sum(-1)

    return score


def flat_matmul(case: Case, rows: Tensor) -> Score:
    lengths = list(case.passage_lengths)

    def score(queries: Tensor) -> Tensor:
        similarities = queries.flatten(0, 1) @ rows.T
        if len(set(lengths)) == 1:
            best = similarities.view(similarities.shape[0], len(lengths), lengths[0]).amax(-1)
        else:
            best = torch.stack([part.amax(-1) for part in similarities.split(lengths, dim=1)], 1)
        return best.view(case.queries, case.query_rows, -1).sum(1)

    return score


def flag_embedding(case: Case, rows: Tensor) -> Score:
    from FlagEmbedding.finetune.embedder.encoder_only.m3.modeling import EncoderOnlyEmbedderM3Model

    padded, _ = _padded(case, rows)
    model = SimpleNamespace(temperature=1.0)
    mask = torch.ones(case.queries, case.query_rows + 1, device=case.device)
    function = EncoderOnlyEmbedderM3Model.compute_colbert_score
    return lambda queries: function(model, queries, padded, mask) * case.query_rows


def pylate(case: Case, rows: Tensor) -> Score:
    from pylate.scores import colbert_scores

    padded, mask = _padded(case, rows)
    return lambda queries: colbert_scores(queries, padded, documents_mask=mask, backend="torch")


def late_interaction_kernels(case: Case, rows: Tensor) -> Score:
    sys.modules["triton"] = None  # type: ignore[assignment]  # without it the package offers its CPU path
    from late_interaction_kernels.reference import maxsim_reference

    padded, mask = _padded(case, rows)
    return lambda queries: maxsim_reference(queries, padded, d_mask=mask)


def maxsim_cpu(case: Case, rows: Tensor) -> Score:
    import maxsim_cpu as package

    padded, mask = _padded(case, rows)
    uniform = padded.numpy()
    ragged = [part.numpy() for part in rows.split(list(case.passage_lengths))]

    def score(queries: Tensor) -> Tensor:
        if mask is None:
            return torch.stack([torch.from_numpy(package.maxsim_scores(query.numpy(), uniform)) for query in queries])
        return torch.stack(
            [torch.from_numpy(package.maxsim_scores_variable(query.numpy(), ragged)) for query in queries]
        )

    return score


def numkong(case: Case, rows: Tensor) -> Score:
    import numkong as package

    stored = [package.maxsim_pack(part.numpy()) for part in rows.split(list(case.passage_lengths))]

    def score(queries: Tensor) -> Tensor:
        packed = [package.maxsim_pack(query.numpy()) for query in queries]
        distances = [[package.maxsim_packed(query, passage) for passage in stored] for query in packed]
        return queries.shape[1] - torch.tensor(distances)  # it sums 1 - cosine

    return score


PEERS: dict[str, Callable[[Case, Tensor], Score]] = {
    "m3kernels": ours,
    "m3kernels bfloat16": ours_bfloat16,
    "m3kernels 8 bits": _ours_quantized(8),
    "m3kernels 1 bit": _ours_quantized(1),
    "torch einsum": einsum,
    "flat matmul": flat_matmul,
    "FlagEmbedding": flag_embedding,
    "PyLate": pylate,
    "late-interaction-kernels": late_interaction_kernels,
    "maxsim-cpu": maxsim_cpu,
    "numkong": numkong,
}


ON_ANY_DEVICE = ("m3kernels", "m3kernels bfloat16", "torch einsum", "flat matmul", "FlagEmbedding", "PyLate")


def call_of(peer: str, case: Case) -> Callable[[], Tensor]:
    """One forward, or forward and backward, of `peer`; returns the scores."""
    queries, rows = case.rows()
    if not case.training:
        score = PEERS[peer](case, rows)
        return lambda: score(queries)
    rows.requires_grad_()
    queries.requires_grad_()
    score = PEERS[peer](case, rows)
    grad = torch.randn(case.queries, len(case.passage_lengths), generator=torch.Generator().manual_seed(2))
    grad = grad.to(case.device)

    def step() -> Tensor:
        scores = score(queries)
        torch.autograd.grad(scores, (queries, rows), grad)
        return scores.detach()

    return step


def _error(case: Case, scores: Tensor) -> float:
    """Largest difference of a score and its float64 value, relative to that."""
    queries, rows = (x.double() for x in case.rows())
    best = [(queries @ passage.t()).amax(2).sum(1) for passage in rows.split(list(case.passage_lengths))]
    exact = torch.stack(best, 1)
    return float(((scores.double() - exact) / exact).abs().max())


def _seconds(call: Callable[[], Tensor]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _peak(call: Callable[[], Tensor]) -> int:
    """Bytes by which the resident memory rises at most during `call`."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
    before = _highest_resident()
    call()
    return _highest_resident() - before


def _highest_resident() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


def main(peer: str, threads: int) -> None:
    torch.set_num_threads(threads)
    call: Callable[[], Tensor] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "case" in request:
            call = None
            gc.collect()
            case = CASES[request["case"]]
            try:
                with torch.set_grad_enabled(case.training):
                    # A small call of the same kind makes what a library makes once: threads, buffers, code.
                    call_of(peer, replace(case, queries=2, query_rows=8, passage_lengths=(16, 16)))()
                    call = call_of(peer, case)
                    answer: object = {"ready": True}
            except ImportError as error:
                answer = {"missing": str(error)}
        elif call is None:
            answer = {"missing": "no case"}
        else:
            with torch.set_grad_enabled(case.training):
                if "memory" in request:
                    answer = {"bytes": _peak(call)}
                elif "error" in request:
                    answer = {"error": _error(case, call().detach())}
                else:
                    answer = {"seconds": _seconds(call)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
