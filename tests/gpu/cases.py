"""One small ragged batch for every op with a GPU kernel, as a function of floating leaves, on any device.

The tests of this folder run on the device that `DEVICE` names: cuda; or, with M3_GPU_DRY_RUN=1 (make gpu-report
DRY_RUN=1), the CPU, with the Triton kernels under the interpreter and shorter texts, to know that the tests themselves
run. The truth is always the op in float64 on the CPU, which is the plain PyTorch reference.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import m3kernels
from m3kernels import SparseBatch

DRY_RUN = os.environ.get("M3_GPU_DRY_RUN") == "1"
DEVICE = "cpu" if DRY_RUN else "cuda"
DTYPES = (torch.float32, torch.bfloat16) if DRY_RUN else (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (37, 0, 1, 64, 2) if DRY_RUN else (300, 0, 1, 64, 1030, 2)
QUERIES, PASSAGES = ((5, 0, 1), (20, 1, 0, 33)) if DRY_RUN else ((32, 0, 1, 200), (300, 1, 0, 128, 515))
PAIRS = [[0, 0], [2, 3], [1, 0], [2, 1], [2, 3]]
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """`make(device)` puts offsets and ids there and returns the op as a function of the leaves.

    terms: of the longest float32 sum; exact: the leaves are whole numbers whose sums every dtype holds.
    """

    leaves: tuple[Tensor, ...]
    make: Callable[[str], Function]
    terms: int
    exact: bool = False

    def bound(self, dtype: torch.dtype) -> float:
        """Error allowed, as a share of the result's norm: float32 sums, and four roundings to 16 bits."""
        rounding = 2e-6 * self.terms**0.5
        return rounding if dtype == torch.float32 else max(rounding, 4 * torch.finfo(dtype).eps / 2)


def offsets_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def whole(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


def attention(width: int, **options: float) -> Case:
    def make(device: str) -> Function:
        offsets = offsets_of(LENGTHS).to(device)
        return lambda q, k, v: m3kernels.flash_attention_varlen(q, k, v, offsets, max(LENGTHS), **options)

    return Case(tuple(normal(sum(LENGTHS), 3, width + part)[..., :width] for part in range(3)), make, max(LENGTHS))


def late_interaction(width: int, kind: str) -> Case:
    def make(device: str) -> Function:
        offsets = [offsets_of(lengths).to(device) for lengths in (QUERIES, PASSAGES)]
        pairs = torch.tensor(PAIRS, dtype=torch.int32, device=device)
        if kind == "pairs":
            return lambda q, p: m3kernels.maxsim_pairs(q, p, *offsets, pairs, zero_floor=True)
        return lambda q, p: m3kernels.maxsim(q, p, *offsets, reduce="sum", recompute_argmax=kind == "recompute")

    rows = (torch.nn.functional.normalize(normal(sum(lengths), width), dim=1) for lengths in (QUERIES, PASSAGES))
    return Case(tuple(rows), make, width + sum(QUERIES))


def token_ids() -> Tensor:
    """Few distinct ids, so that they repeat within a text."""
    return torch.randint(0, 40, (sum(LENGTHS),), generator=torch.Generator().manual_seed(5), dtype=torch.int32)


def sparse_pool() -> Case:
    def make(device: str) -> Function:
        ids, offsets = token_ids().to(device), offsets_of(LENGTHS).to(device)
        return lambda weights: m3kernels.sparse_pool(weights, ids, offsets, (0, 1, 2, 3)).weights

    return Case((whole(0, 9, sum(LENGTHS)),), make, 1, exact=True)


def sparse_embed() -> Case:
    def make(device: str) -> Function:
        ids, offsets = token_ids().to(device), offsets_of(LENGTHS).to(device)
        return lambda h, w, b: m3kernels.sparse_embed(h, w, b, ids, offsets, (0, 1, 2, 3)).weights

    leaves = (whole(-1, 1, sum(LENGTHS), 64), whole(-1, 1, 64), whole(1, 1, 1))
    return Case(leaves, make, sum(LENGTHS), exact=True)


def sparse_scores() -> Case:
    batch = m3kernels.sparse_pool(whole(1, 9, sum(LENGTHS)), token_ids(), offsets_of(LENGTHS))

    def make(device: str) -> Function:
        ids, offsets = batch.token_ids.to(device), batch.offsets.to(device)

        def scores(queries: Tensor, passages: Tensor) -> Tensor:
            sides = (SparseBatch(ids, weights, offsets) for weights in (queries, passages))
            return m3kernels.sparse_scores(*sides)

        return scores

    return Case((batch.weights, batch.weights.flip(0)), make, 40)


def packing(unpack: bool) -> Case:
    def make(device: str) -> Function:
        offsets, total, longest = offsets_of(LENGTHS).to(device), sum(LENGTHS), max(LENGTHS)
        if unpack:
            return lambda rows: m3kernels.unpack(rows, offsets, longest)
        return lambda padded: m3kernels.pack(padded, offsets, total)

    shape = (sum(LENGTHS), 7) if unpack else (len(LENGTHS), max(LENGTHS), 7)
    return Case((normal(*shape),), make, 1)


CASES: dict[str, Callable[[], Case]] = {
    **{f"attention of width {width}": lambda width=width: attention(width) for width in (32, 64, 128)},
    "sampled attention": lambda: attention(64, keep_probability=0.5, seed=2**40 + 3),
    "attention with dropout": lambda: attention(64, dropout_p=0.1, seed=5),
    "sampled attention with dropout": lambda: attention(32, keep_probability=1.0, dropout_p=0.2, seed=7),
    **{f"maxsim of width {width}": lambda width=width: late_interaction(width, "all") for width in (8, 136, 1024)},
    "maxsim with its argmax computed again": lambda: late_interaction(136, "recompute"),
    "maxsim of listed pairs": lambda: late_interaction(136, "pairs"),
    "sparse_pool": sparse_pool,
    "sparse_embed": sparse_embed,
    "sparse_scores": sparse_scores,
    "pack": lambda: packing(False),
    "unpack": lambda: packing(True),
}


def leaves_on(case: Case, device: str, dtype: torch.dtype) -> list[Tensor]:
    """The leaves as rounded to `dtype`, which is also what a float64 truth starts from."""
    return [x.to(dtype).to(device).requires_grad_() for x in case.leaves]


def value_and_gradients(function: Function, leaves: list[Tensor]) -> list[Tensor]:
    """The op's value, and the gradients of a weighted sum of it; the weights 1, 2, 3 are exact in every dtype."""
    value = function(*leaves)
    factors = (torch.arange(value.numel(), device=value.device) % 3 + 1).reshape(value.shape)
    return [value.detach(), *torch.autograd.grad(value, leaves, factors.to(value.dtype))]


def truth(case: Case, dtype: torch.dtype) -> list[Tensor]:
    return value_and_gradients(case.make("cpu"), [x.to(dtype).double().requires_grad_() for x in case.leaves])


def errors(values: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Norm of each difference, relative to the norm of the truth."""
    return [
        float((value.cpu().double() - exact).norm() / exact.norm().clamp_min(1e-30))
        for value, exact in zip(values, expected, strict=True)
    ]
