"""Compiled kernels at small ragged shapes, simulated, against the float64 reference.

Each function runs the product's own host code, returns the relative error of every result with its bound, and the
launches. Bounds: u is the unit roundoff of the dtype; attention rounds its weights, its sums and δ's inputs once
each (4u); sums of n float32 products stay within 2·10⁻⁶·√n; tf32 operands lose 13 bits (2⁻¹⁰ each, 4 of them on the
way).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from m3kernels import _tiles, packing
from m3kernels.attention import reference as attention_reference
from m3kernels.attention import triton_kernels as attention
from m3kernels.maxsim import reference as maxsim_reference
from m3kernels.maxsim import triton_kernels as maxsim
from m3kernels.sparse import reference as sparse_reference
from tests.ptx.triton_launches import ARCHITECTURE, Launch, simulated_triton

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
ATTENTION_LENGTHS = (70, 0, 1, 33)
OPTIONS: dict[str, tuple[float | None, float]] = {
    "plain": (None, 0.0), "sampled": (0.5, 0.0), "dropout": (None, 0.1), "sampled+dropout": (0.5, 0.1),
}  # fmt: skip
SEED = 2**40 + 3


@dataclass
class Outcome:
    """Relative errors and their bounds by the name of the result, and what was launched."""

    bound: float
    """Of results that have none of their own."""
    errors: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)

    def compare(self, name: str, actual: Tensor, expected: Tensor, bound: float | None = None) -> None:
        """Keep the error in the Euclidean norm."""
        difference = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
        self.errors[name], self.bounds[name] = float(difference), self.bound if bound is None else bound

    def check(self) -> None:
        """Every error within its bound; NaN is not."""
        bad = {name: error for name, error in self.errors.items() if not error <= self.bounds[name]}
        assert not bad, (bad, self.bounds)


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def offsets_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def attention_bound(arithmetic: str, length: int) -> float:
    """Of outputs and gradients, in the Euclidean norm."""
    if arithmetic == "fp32":
        return 2e-6 * max(length, 1) ** 0.5
    return 4 * (2.0**-10 if arithmetic == "tf32" else torch.finfo(DTYPES[arithmetic]).eps / 2)


def run_attention(
    arithmetic: str,
    width: int,
    options: str,
    lengths: tuple[int, ...] = ATTENTION_LENGTHS,
    heads: int = 2,
    architecture: int = ARCHITECTURE,
) -> Outcome:
    """Forward and backward; q, k and v are slices of one fused product, as in the backbone."""
    dtype, (keep, dropout) = DTYPES[arithmetic], OPTIONS[options]
    offsets = offsets_of(lengths)
    fused = random(sum(lengths), 3, heads, width, dtype=dtype, seed=1)
    q, k, v = fused.unbind(1)
    grad = random(sum(lengths), heads, width, dtype=dtype, seed=2)
    scale = width**-0.5
    told = attention.Options(scale, keep, dropout, SEED, arithmetic == "tf32")
    tiles = _tiles.for_architecture("attention", architecture)
    with simulated_triton(architecture=architecture) as launches:
        out, log_sum_exp = attention.forward(q, k, v, offsets, told, tiles)
        grads = attention.backward(grad, q, k, v, out, log_sum_exp, offsets, told, tiles)
    exact = [x.double() for x in (q, k, v)]
    hashed = (scale, keep, dropout, SEED)
    wanted, wanted_sums = attention_reference.flash_attention_varlen(*exact, offsets, *hashed)
    wanted_grads = attention_reference.flash_attention_varlen_backward(
        grad.double(), *exact, wanted, wanted_sums, offsets, *hashed
    )
    outcome = Outcome(attention_bound(arithmetic, max(lengths)), launches=launches)
    reached = wanted_sums != -torch.inf
    assert torch.equal(log_sum_exp != -torch.inf, reached)
    outcome.compare("log_sum_exp", log_sum_exp[reached], wanted_sums[reached])
    names = ("out", "grad_q", "grad_k", "grad_v")
    for name, actual, expected in zip(names, (out, *grads), (wanted, *wanted_grads)):
        outcome.compare(name, actual, expected)
    return outcome


def maxsim_bound(arithmetic: str, width: int) -> float:
    """Of scores: products of 16-bit numbers are exact, their sum is float32."""
    return 2 * 2.0**-10 if arithmetic == "tf32" else 2e-6 * width**0.5


def run_maxsim(
    arithmetic: str,
    width: int = 72,
    mean: bool = True,
    floor: bool = True,
    query_lengths: tuple[int, ...] = (5, 0, 40),
    passage_lengths: tuple[int, ...] = (70, 0, 1, 130),
    architecture: int = ARCHITECTURE,
) -> Outcome:
    """All pairs and listed pairs (one of them twice), forward and backward."""
    dtype, allow_tf32 = DTYPES[arithmetic], arithmetic == "tf32"
    offsets = (offsets_of(query_lengths), offsets_of(passage_lengths))
    rows = [random(sum(n), width, dtype=dtype, seed=i) for i, n in enumerate((query_lengths, passage_lengths))]
    exact = [x.double() for x in rows]
    zero_floor = torch.arange(len(passage_lengths)) % 2 == 0 if floor else None
    count = (len(query_lengths), len(passage_lengths))
    listed = [[0, count[1] - 1], [count[0] - 1, 0], [count[0] - 1, count[1] - 1], [count[0] // 2, 1]]
    pairs = torch.tensor([*listed, listed[2]], dtype=torch.int32)
    grad, pair_grad = random(*count, dtype=torch.float32, seed=3), random(len(pairs), dtype=torch.float32, seed=4)
    tiles = _tiles.for_architecture("maxsim", architecture)
    with simulated_triton(architecture=architecture) as launches:
        scores, argmax = maxsim.forward(*rows, *offsets, zero_floor, mean, True, allow_tf32, tiles)
        grads = maxsim.backward(grad, *rows, *offsets, zero_floor, argmax, mean, allow_tf32, tiles)
        of_pairs = maxsim.pairs_forward(*rows, *offsets, pairs, zero_floor, mean, allow_tf32, tiles)
        pair_grads = maxsim.pairs_backward(pair_grad, *rows, *offsets, pairs, zero_floor, mean, allow_tf32, tiles)
    outcome = Outcome(maxsim_bound(arithmetic, width), launches=launches)
    wanted, winners = maxsim_reference.maxsim(*exact, *offsets, zero_floor, mean)
    outcome.compare("scores", scores, wanted)
    outcome.compare("pair scores", of_pairs, maxsim_reference.maxsim_pairs(*exact, *offsets, pairs, zero_floor, mean))
    if arithmetic != "tf32":  # whose rounding may choose another winner
        assert torch.equal(argmax, winners)
    # Winners are given, so gradients only round: once to the dtype, and in backward_p their weights to tf32.
    unit = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else outcome.bound
    bound = unit + (2.0**-10 if dtype != torch.float32 or allow_tf32 else 0.0)
    wanted_grads = maxsim_reference.maxsim_backward(grad.double(), *exact, *offsets, argmax, mean)
    for name, actual, expected in zip(("grad_queries", "grad_passages"), grads, wanted_grads):
        outcome.compare(name, actual, expected, bound)
    if arithmetic != "tf32":
        wanted_pairs = maxsim_reference.maxsim_pairs_backward(
            pair_grad.double(), *exact, *offsets, pairs, zero_floor, mean
        )
        for name, actual, expected in zip(("pair grad_queries", "pair grad_passages"), pair_grads, wanted_pairs):
            outcome.compare(name, actual, expected, bound)
    return outcome


def equal(actual: Any, expected: Any, dtype: torch.dtype) -> None:
    """Exactly: the inputs are small integers."""
    for value, wanted in zip(actual, expected):
        wanted = wanted.to(dtype) if wanted.is_floating_point() else wanted
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)


def run_sparse(
    dtype: torch.dtype, width: int = 40, lengths: tuple[int, ...] = (70, 0, 1, 33), distinct: int = 30
) -> list[Launch]:
    """sparse_pool, sparse_embed and sparse_scores with their gradients, exact on small integers."""
    from tests.ptx.cuda_launches import simulated_cuda

    generator = torch.Generator().manual_seed(len(lengths))
    total, offsets, ignored = sum(lengths), offsets_of(lengths), [0, 3]

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).double()

    ids = torch.randint(0, distinct, (total,), generator=generator, dtype=torch.int32)
    with simulated_cuda() as cuda:
        weights, grad = integers(0, 4, total).to(dtype), integers(-3, 3, total)
        pooled = cuda.ops.sparse_pool(weights, ids, offsets, ignored)
        expected: Any = sparse_reference.sparse_pool(weights, ids, offsets, ignored)
        equal(pooled, expected, dtype)
        back = cuda.ops.sparse_pool_backward(grad.to(dtype), pooled[3])
        equal([back], [sparse_reference.sparse_pool_backward(grad.to(dtype), expected[3])], dtype)

        hidden, head, bias = integers(-2, 2, total, width), integers(-2, 2, width), torch.ones(1, dtype=torch.float64)
        low = [x.to(dtype) for x in (hidden, head, bias)]
        embedded = cuda.ops.sparse_embed(*low, ids, offsets, ignored)
        expected = sparse_reference.sparse_embed(hidden, head, bias, ids, offsets, ignored)
        equal(embedded, expected, dtype)
        grads = cuda.ops.sparse_embed_backward(grad.to(dtype), *low[:2], embedded[3])
        equal(grads, sparse_reference.sparse_embed_backward(grad, hidden, head, expected[3]), dtype)

        side = (pooled[1], pooled[0], pooled[2])
        exact = (side[0], side[1].double(), side[2])
        scores = cuda.ops.sparse_scores(*side, *side)
        equal([scores], [sparse_reference.sparse_scores(*exact, *exact)], torch.float32)
        score_grad = integers(-2, 2, *scores.shape)
        grads = cuda.ops.sparse_scores_backward(score_grad.float(), *side, *side)
        equal(grads, sparse_reference.sparse_scores_backward(score_grad, *exact, *exact), dtype)
    return cuda.launches


def run_packing(dtype: torch.dtype, width: int, lengths: tuple[int, ...] = (3, 0, 5, 40)) -> list[Launch]:
    """unpack and pack of rows of any width: moved in units of 1 to 16 bytes."""
    from tests.ptx.cuda_launches import simulated_cuda

    offsets, total = offsets_of(lengths), sum(lengths)
    rows = torch.randint(0, 2, (total, width), generator=torch.Generator().manual_seed(width)).to(dtype)
    with simulated_cuda() as cuda:
        padded = cuda.ops.unpack(rows, offsets, max(lengths) + 1)
        assert torch.equal(padded, packing.unpack(rows, offsets, max(lengths) + 1))
        assert torch.equal(cuda.ops.pack(padded, offsets, total), rows)
    return cuda.launches
