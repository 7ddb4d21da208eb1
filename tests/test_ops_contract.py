"""Every op of the contract obeys torch's rules for custom ops and compiles into one graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import m3kernels

OFFSETS = torch.tensor([0, 3, 3, 4, 9], dtype=torch.int32)
TOKEN_IDS = torch.tensor([5, 2, 5, 7, 2, 2, 0, 9, 0], dtype=torch.int32)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def sparse_entries() -> tuple[Tensor, Tensor, Tensor]:
    batch = m3kernels.sparse_pool(leaf(9).detach().abs(), TOKEN_IDS, OFFSETS)
    return batch.token_ids, batch.weights.requires_grad_(), batch.offsets


def op_calls() -> dict[str, tuple[Callable[..., object], tuple[object, ...]]]:
    q, k, v = (leaf(9, 2, 32) for _ in range(3))
    attention = (q, k, v, OFFSETS, 9, 0.2, None, 0.0, 0, False)
    sampled = (q, k, v, OFFSETS, 9, 0.2, 0.5, 0.1, 7, False)
    rows = (leaf(9, 16), leaf(9, 16), OFFSETS, OFFSETS)
    floor = torch.tensor([True, False, True, False])
    pairs = torch.tensor([[0, 3], [2, 0], [1, 1]], dtype=torch.int32)
    stored = m3kernels.quantize_rows(leaf(9, 16))
    quantized = (leaf(9, 16).detach(), stored.codes, stored.scales, OFFSETS, OFFSETS)
    packed = m3kernels.pack_linear(leaf(20, 16), torch.float32)
    coded = m3kernels.pack_linear(leaf(20, 16), torch.int8)
    layer = (leaf(20), True, leaf(9, 20))
    tables = (leaf(11, 16).detach(), leaf(7, 16).detach(), leaf(16).detach(), leaf(16).detach(), leaf(16).detach())
    ops = torch.ops.m3
    return {
        "attention": (ops.flash_attention_forward, attention),
        "attention_sampled": (ops.flash_attention_forward, sampled),
        "maxsim": (ops.maxsim_forward, (*rows, None, True, True, False)),
        "maxsim_recompute": (ops.maxsim_forward, (*rows, floor, False, False, False)),
        "maxsim_pairs": (ops.maxsim_pairs_forward, (*rows, pairs, floor, True, False)),
        "maxsim_quantized": (ops.maxsim_quantized, (*quantized, None, 8, True)),
        "maxsim_pairs_quantized": (ops.maxsim_pairs_quantized, (*quantized, pairs, floor, 8, False)),
        "sparse_pool": (ops.sparse_pool, (leaf(9).detach().abs().requires_grad_(), TOKEN_IDS, OFFSETS, [0])),
        "sparse_embed": (ops.sparse_embed, (leaf(9, 16), leaf(16), leaf(1), TOKEN_IDS, OFFSETS, [0])),
        "sparse_scores": (ops.sparse_scores, (*sparse_entries(), *sparse_entries())),
        "linear": (ops.linear, (leaf(40, 16), leaf(20, 16), leaf(20), True, leaf(40, 20))),
        "linear_without_bias": (ops.linear, (leaf(9, 16), leaf(20, 16), None, False, None)),
        "linear_packed": (ops.linear_packed, (leaf(9, 16), packed.panels, None, 20, *layer)),
        "linear_packed_int8": (ops.linear_packed, (leaf(9, 16), coded.panels, coded.scales, 20, *layer)),
        "layer_norm": (ops.layer_norm, (leaf(9, 16), leaf(16), leaf(16), leaf(9, 16), 1e-5)),
        "embed_tokens": (ops.embed_tokens, (TOKEN_IDS, OFFSETS, *tables, 2, 1e-5)),
        "pack": (ops.pack, (leaf(4, 5, 3), OFFSETS, 9)),
        "unpack": (ops.unpack, (leaf(9, 3), OFFSETS, 5)),
    }


@pytest.mark.parametrize("name", list(op_calls()))
def test_op_passes_opcheck(name: str) -> None:
    op, arguments = op_calls()[name]
    torch.library.opcheck(op, arguments)


def every_op(q: Tensor, rows: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    attended = m3kernels.flash_attention_varlen(q, q, q, OFFSETS, keep_probability=0.5, dropout_p=0.1, seed=3)
    scores = m3kernels.maxsim(rows, rows, OFFSETS, OFFSETS, reduce="sum")
    pairs = m3kernels.maxsim_pairs(rows, rows, OFFSETS, OFFSETS, torch.tensor([[0, 2]], dtype=torch.int32))
    batch = m3kernels.sparse_embed(hidden, weight, bias, TOKEN_IDS, OFFSETS, (0,))
    pooled = m3kernels.sparse_pool(torch.relu(hidden[:, 0]), TOKEN_IDS, OFFSETS)
    lexical = m3kernels.sparse_scores(batch, pooled)
    dense = m3kernels.linear(rows, rows, activation="gelu", residual=rows @ rows.T)
    packed = m3kernels.linear(dense, m3kernels.pack_linear(torch.ones(8, 9)))
    normal = m3kernels.layer_norm(packed, weight, weight)
    padded = m3kernels.unpack(rows, OFFSETS, 5)
    return attended, scores, pairs, lexical, normal, m3kernels.pack(padded, OFFSETS, 9)


def test_a_function_of_all_ops_compiles_into_one_graph_and_agrees() -> None:
    def run(function: Callable[..., tuple[Tensor, ...]]) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [leaf(9, 2, 32), leaf(9, 16), leaf(9, 8), leaf(8), leaf(1)]
        outputs = function(*leaves)
        return list(outputs), list(torch.autograd.grad(sum(x.square().sum() for x in outputs), leaves))

    expected, expected_grads = run(every_op)
    outputs, grads = run(torch.compile(every_op, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(grads, expected_grads)
