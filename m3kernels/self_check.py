"""Does every op compute here what its reference computes? For `m3 doctor`, in about a second.

Each op runs on a small ragged batch, forward and backward, in float32 as compiled for this machine, and in float64,
which always takes the plain PyTorch reference. (pack and unpack, which only copy, are compared with their references;
estimates from quantized rows with the scores of the rows that the codes stand for.) The error is the largest difference
of a value or gradient, relative to the largest of them; a float32 sum of n terms may be off by about n roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m3kernels import packing
from m3kernels.attention import flash_attention, flash_attention_varlen
from m3kernels.linear import embed_tokens, layer_norm, linear, pack_linear
from m3kernels.maxsim import maxsim, maxsim_pairs
from m3kernels.maxsim.quantized import quantize_rows
from m3kernels.sparse import SparseBatch, sparse_embed, sparse_pool, sparse_scores

__all__ = ["Check", "self_check"]

LENGTHS = (5, 0, 1, 37, 18)
VOCABULARY = 23
WIDTH = 64
SEVEN_BITS = 1 / 63
"""A step of the 7-bit query rows that quantized rows meet on a CPU, relative to their largest element."""

EIGHT_BITS = 2 / 255
"""The same of the 8-bit activations that int8 layers meet on a CPU, whose span is up to twice their largest element."""


class Check(NamedTuple):
    """Result for one op on one device; reason says what an op that did not even run raised."""

    op: str
    device: str
    passed: bool
    error: float
    tolerance: float
    reason: str = ""


class _Case(NamedTuple):
    """An op as a function of floating tensors, inputs for it, and the terms of its longest sum (0: it only copies)."""

    op: str
    function: Callable[..., Tensor]
    inputs: Sequence[Tensor]
    terms: int
    reference: Callable[..., Tensor] | None = None
    rounding: float = 4 * torch.finfo(torch.float32).eps


def self_check(devices: Sequence[str] | None = None) -> list[Check]:
    """Check all ops on each device: the CPU, and the GPU where torch sees one."""
    if devices is None:
        devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [_run(case, device) for device in devices for case in _cases(torch.device(device))]


def _cases(device: torch.device) -> list[_Case]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    offsets = packing.offsets_from_lengths(torch.tensor(LENGTHS)).to(device)
    reverse = packing.offsets_from_lengths(torch.tensor(LENGTHS[::-1])).to(device)
    total, longest = sum(LENGTHS), max(LENGTHS)
    lengths = torch.tensor(LENGTHS[:1] + LENGTHS[2:], dtype=torch.int32, device=device)
    ids = torch.randint(0, VOCABULARY, (total,), generator=generator, dtype=torch.int32).to(device)
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5)).int().to(device)
    queries = sparse_pool(normal(total).relu(), ids, offsets)
    passages = sparse_pool(normal(total).relu(), ids.flip(0), reverse)

    def scores(left: Tensor, right: Tensor) -> Tensor:
        return sparse_scores(queries._replace(weights=left), passages._replace(weights=right))

    def pooled(batch: SparseBatch) -> Tensor:
        """Dense [N, vocabulary] of a sparse batch, so that ids and places are compared with the weights."""
        count = int(batch.offsets[-1])
        text = packing.sequence_of_row(batch.offsets, count)
        table = batch.weights.new_zeros((len(LENGTHS), VOCABULARY))
        return table.index_put((text, batch.token_ids[:count].long()), batch.weights[:count])

    heads = [normal(total, 2, 32) for _ in range(3)]
    padded = [normal(len(lengths), 2, longest, 32) for _ in range(3)]
    rows = [normal(total, WIDTH) / WIDTH**0.5 for _ in range(2)]
    codes = quantize_rows(rows[1], 8)
    terms = WIDTH + total
    layer = [normal(total, WIDTH), normal(WIDTH), normal(total, WIDTH)]
    weight = normal(WIDTH, WIDTH) / WIDTH**0.5
    packed, coded = pack_linear(weight), pack_linear(weight, torch.int8)
    tables = [normal(VOCABULARY, WIDTH), normal(longest, WIDTH), *(normal(WIDTH) for _ in range(3))]
    return [
        _Case("pack", lambda x: packing.pack(x, offsets, total), [normal(len(LENGTHS), longest, 3)], 0,
              lambda x: packing._pack_reference(x, offsets, total)),
        _Case("unpack", lambda x: packing.unpack(x, offsets, longest), [normal(total, 3)], 0,
              lambda x: packing._unpack_reference(x, offsets, longest)),
        _Case("flash_attention_varlen", lambda q, k, v: flash_attention_varlen(q, k, v, offsets), heads, longest + 32),
        _Case("flash_attention", lambda q, k, v: flash_attention(q, k, v, lengths), padded, longest + 32),
        _Case("maxsim", lambda q, p: maxsim(q, p, offsets, reverse), rows, WIDTH + longest),
        _Case("maxsim_pairs", lambda q, p: maxsim_pairs(q, p, offsets, reverse, pairs), rows, WIDTH + longest),
        _Case("maxsim_quantized", lambda q: maxsim(q, codes, offsets, reverse), rows[:1], 1,
              lambda q: maxsim(q.detach(), codes.dequantize(), offsets, reverse), SEVEN_BITS),
        _Case("maxsim_pairs_quantized", lambda q: maxsim_pairs(q, codes, offsets, reverse, pairs), rows[:1], 1,
              lambda q: maxsim_pairs(q.detach(), codes.dequantize(), offsets, reverse, pairs), SEVEN_BITS),
        _Case("linear", lambda x, b, r, w: linear(x, w, b, activation="gelu", residual=r), [*layer, weight], terms),
        _Case("linear_packed", lambda x, b, r: linear(x, packed, b, activation="gelu", residual=r), layer, terms),
        _Case("linear_packed_int8", lambda x: linear(x.detach(), coded), layer[:1], 1,
              lambda x: linear(x.detach(), coded.unpack()), EIGHT_BITS),
        _Case("layer_norm", lambda x, w, b, r: layer_norm(x, w, b, r), [layer[0], *tables[2:4], layer[2]], terms),
        _Case("embed_tokens", lambda w, p, t, f, b: embed_tokens(ids, offsets, w, p, t, f, b), tables, WIDTH),
        _Case("sparse_pool", lambda w: pooled(sparse_pool(w.relu(), ids, offsets, (0, 1))), [normal(total)], 1),
        _Case(
            "sparse_embed",
            lambda h, w, b: pooled(sparse_embed(h, w, b, ids, offsets, (0, 1))),
            [normal(total, WIDTH), normal(WIDTH) / WIDTH**0.5, normal(1)],
            WIDTH + total,
        ),
        _Case("sparse_scores", scores, [queries.weights, passages.weights], VOCABULARY),
    ]  # fmt: skip


def _run(case: _Case, device: str) -> Check:
    tolerance = case.terms * case.rounding
    try:
        computed = _values(case.function, case.inputs, torch.float32)
        if case.reference is not None:
            expected = _values(case.reference, case.inputs, torch.float32)
        else:
            expected = _values(case.function, case.inputs, torch.float64)
    except Exception as failure:
        return Check(case.op, device, False, float("inf"), tolerance, f"{type(failure).__name__}: {failure}")
    error = max(_difference(ours, theirs) for ours, theirs in zip(computed, expected, strict=True))
    return Check(case.op, device, error <= tolerance, error, tolerance)


def _values(function: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The op's value and, where it has gradients, those of a fixed weighted sum of it."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    value = function(*leaves)
    if not value.requires_grad:
        return [value]
    factors = torch.cos(torch.arange(value.numel(), dtype=torch.float64)).reshape(value.shape)
    gradients = torch.autograd.grad((value * factors.to(value)).sum(), leaves)
    return [value.detach(), *gradients]


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest value; infinite for NaN."""
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
    return error if error == error else float("inf")
