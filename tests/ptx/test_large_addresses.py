"""Tensors of more than 2³¹ elements: every kernel's compiled address arithmetic, without the memory.

The tensors are address space that the operating system fills with zeros when touched. Only the blocks that work on
rows behind element 2³¹ run. An offset computed in 32 bits would leave the buffer (a Fault) or meet zeros (a wrong
result), as the planted kernel shows.
"""

from __future__ import annotations

import itertools
import mmap
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from m3kernels import _tiles
from m3kernels.attention import reference as attention_reference
from m3kernels.attention import triton_kernels as attention
from m3kernels.maxsim import reference as maxsim_reference
from m3kernels.maxsim import triton_kernels as maxsim
from tests.ptx.cases import random
from tests.ptx.cuda_launches import needs_nvcc, simulated_cuda
from tests.ptx.simulator import Fault
from tests.ptx.triton_launches import ARCHITECTURE, Grid, simulated_triton

BEYOND = 2**31
ROWS = 10
"""Rows behind element 2³¹ that are worked on."""


def huge(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are touched."""
    size = torch.Size(shape).numel() * dtype.itemsize
    try:
        space = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    except (OSError, ValueError) as error:
        pytest.skip(f"no address space of {size} bytes here: {error}")
    return torch.frombuffer(space, dtype=dtype).view(shape)


def offsets(*bounds: int) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def close(actual: Tensor, expected: Tensor, bound: float) -> None:
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    assert error <= bound, error


@triton.jit
def planted_rows(x_ptr, rows_ptr, out_ptr, width, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.load(rows_ptr)
    if WIDE:
        row = row.to(tl.int64)
    columns = tl.arange(0, BLOCK)
    tl.store(out_ptr + columns, tl.load(x_ptr + row * width + columns))


@pytest.mark.parametrize("wide", [True, False])
def test_the_tool_sees_an_offset_computed_in_32_bits(wide: bool) -> None:
    width = 2048
    x = huge(BEYOND // width + ROWS, width, dtype=torch.bfloat16)
    x[-1] = 3
    rows, out = torch.tensor([x.shape[0] - 1], dtype=torch.int32), torch.zeros(64, dtype=torch.bfloat16)
    with simulated_triton():
        if wide:
            planted_rows[(1,)](x, rows, out, width, WIDE=True, BLOCK=64)
            assert (out == 3).all()
        else:
            with pytest.raises(Fault, match="out of bounds"):
                planted_rows[(1,)](x, rows, out, width, WIDE=False, BLOCK=64)


def test_attention_of_more_than_2_to_31_elements() -> None:
    heads, width = 16, 128
    before = BEYOND // (heads * width)
    shape = (before + ROWS, heads, width)
    q, k, v, grad = (huge(*shape, dtype=torch.bfloat16) for _ in range(4))
    few = [random(ROWS, heads, width, dtype=torch.bfloat16, seed=i) for i in range(4)]
    for tensor, values in zip((q, k, v, grad), few):
        tensor[before:] = values
    head = heads - 1
    options = attention.Options(width**-0.5, None, 0.0, 0, False)
    tiles = _tiles.for_architecture("attention", ARCHITECTURE)
    sequences = offsets(0, before, before + ROWS)

    def last_tile(kernel: str, grid: Grid) -> list[Grid]:
        return [(grid[0] - 1, head, 0)]

    with simulated_triton(last_tile) as launches:
        out, log_sum_exp = attention.forward(q, k, v, sequences, options, tiles)
        grads = attention.backward(grad, q, k, v, out, log_sum_exp, sequences, options, tiles)
    assert len(launches) == 3 and all(launch.counters.blocks == 1 for launch in launches)
    exact = [x.double()[:, head:] for x in few]
    wanted = attention_reference.flash_attention_varlen(*exact[:3], offsets(0, ROWS), width**-0.5)
    wanted_grads = attention_reference.flash_attention_varlen_backward(
        exact[3], *exact[:3], *wanted, offsets(0, ROWS), width**-0.5
    )
    for actual, expected in zip((out, *grads), (wanted[0], *wanted_grads)):
        close(actual[before:, head:], expected, 4 * 2.0**-8)


def test_maxsim_of_passages_of_more_than_2_to_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    # The host code's zeros would be written, and take all of their memory.
    monkeypatch.setattr(torch, "zeros_like", lambda x: huge(*x.shape, dtype=x.dtype))
    width = 1024
    before = BEYOND // width
    queries, few = random(5, width, dtype=torch.bfloat16, seed=1), random(ROWS, width, dtype=torch.bfloat16, seed=2)
    passages = huge(before + ROWS, width, dtype=torch.bfloat16)
    passages[before:] = few
    tiles = _tiles.for_architecture("maxsim", ARCHITECTURE)
    bounds = (offsets(0, 5), offsets(0, before, before + ROWS))

    def last_passage(kernel: str, grid: Grid) -> list[Grid] | None:
        return None if kernel in ("sum_kernel", "backward_q_kernel") else [(grid[0] - 1, 0, 0)]

    with simulated_triton(last_passage):
        scores, argmax = maxsim.forward(queries, passages, *bounds, None, True, True, False, tiles)
        argmax[:, 0] = -1  # the long passage before did not run
        grad = torch.tensor([[1.0, 2.0]])
        grad_queries, grad_passages = maxsim.backward(
            grad, queries, passages, *bounds, None, argmax, True, False, tiles
        )
        pairs = maxsim.pairs_forward(queries, passages, *bounds, offsets(0, 1).view(1, 2), None, True, False, tiles)
    small = (queries.double(), few.double(), offsets(0, 5), offsets(0, ROWS))
    wanted, winners = maxsim_reference.maxsim(*small)
    assert torch.equal(argmax[:, 1] - before, winners[:, 0])
    close(scores[:, 1], wanted[:, 0], 1e-4)
    close(pairs, wanted[0], 1e-4)
    wanted_grads = maxsim_reference.maxsim_backward(grad[:, 1:].double(), *small, winners)
    close(grad_queries, wanted_grads[0], 2.0**-8)
    tile = tiles.find("backward_p", torch.bfloat16, width, False).block_n
    close(grad_passages[before:, :tile], wanted_grads[1][:, :tile], 2.0**-8 + 2.0**-10)


def test_maxsim_of_more_than_2_to_31_maxima() -> None:
    """Maxima [Np, Tq] and winners [Tq, Np]; all passages but the last are empty."""
    rows, count, width = 2**16 + ROWS, 2**15 + 1, 64
    queries = huge(rows, width, dtype=torch.bfloat16)
    queries[-ROWS:] = random(ROWS, width, dtype=torch.bfloat16, seed=1)
    passages = random(7, width, dtype=torch.bfloat16, seed=2)
    passage_offsets = torch.zeros(count + 1, dtype=torch.int32)
    passage_offsets[-1] = 7
    bounds = (offsets(0, rows - ROWS, rows), passage_offsets)
    tiles = _tiles.for_architecture("maxsim", ARCHITECTURE)

    def last(kernel: str, grid: Grid) -> list[Grid]:
        return [(grid[0] - 1, grid[1] - 1, 0)]

    with simulated_triton(last):
        scores, argmax = maxsim.forward(queries, passages, *bounds, None, True, True, False, tiles)
    wanted, winners = maxsim_reference.maxsim(
        queries[-ROWS:].double(), passages.double(), offsets(0, ROWS), offsets(0, 7)
    )
    assert torch.equal(argmax[-ROWS:, -1], winners[:, 0])
    close(scores[-1:, -1], wanted[0], 1e-4)


WIDTH = 2**17
BEFORE = BEYOND // WIDTH


@needs_nvcc
def test_sparse_embed_of_more_than_2_to_31_elements() -> None:
    total = BEFORE + ROWS
    hidden = huge(total, WIDTH, dtype=torch.bfloat16)
    few = torch.randint(-2, 3, (ROWS, WIDTH), generator=torch.Generator().manual_seed(0)).double()
    few[:, 64:] = 0  # sums stay small integers
    hidden[BEFORE:] = few.bfloat16()
    weight, bias = torch.ones(WIDTH, dtype=torch.bfloat16), torch.full((1,), 300.0, dtype=torch.bfloat16)
    ids = torch.arange(total, dtype=torch.int32) % 1000
    # Only the last rows belong to a text, so that no kernel works on the others.
    sequence = offsets(BEFORE, total)
    blocks = {"token_weights": lambda grid: [(x, 0, 0) for x in range(BEFORE // 8, grid[0])]}
    blocks["gather"] = lambda grid: [(0, 0, 0)]
    blocks["invert_rows"] = blocks["gather"]
    blocks["embed_gradient"] = lambda grid: [(grid[0] - 1, 0, 0), (grid[0] - 1, grid[1] - 1, 0)]
    blocks["sum_parts"] = lambda grid: []

    def chosen(kernel: str, grid: Grid) -> Any:
        return blocks.get(kernel.partition("_kernel")[0], lambda grid: None)(grid)

    with simulated_cuda(chosen) as cuda:
        weights, out_ids, pooled, rows = cuda.ops.sparse_embed(hidden, weight, bias, ids, sequence, [])
        assert pooled.tolist() == [0, ROWS]
        assert torch.equal(weights[:ROWS].double(), (few.sum(1) + 300).bfloat16().double()[rows[:ROWS] - BEFORE])
        assert torch.equal(out_ids[:ROWS], ids[rows[:ROWS].long()])
        rows[ROWS:] = -1  # what the gather of the other blocks writes
        grad = torch.ones(total, dtype=torch.bfloat16)
        grad_hidden, _, _ = cuda.ops.sparse_embed_backward(grad, hidden, weight, rows)
    columns = [slice(0, 1024), slice(WIDTH - 1024, WIDTH)]
    for part in columns:
        assert (grad_hidden[BEFORE:, part] == 1).all()


@needs_nvcc
def test_sparse_scores_of_more_than_2_to_31_pairs() -> None:
    queries, passages = 2**16, 2**15 + 1
    query_offsets, passage_offsets = (torch.zeros(n + 1, dtype=torch.int32) for n in (queries, passages))
    query_offsets[-1], passage_offsets[-1] = 3, 2
    query = (offsets(2, 5, 9), torch.tensor([1.0, 2.0, 3.0]), query_offsets)
    passage = (offsets(5, 9), torch.tensor([10.0, 100.0]), passage_offsets)
    grad = huge(queries, passages, dtype=torch.float32)
    grad[-1, -1] = 2.0

    def last(kernel: str, grid: Grid) -> list[Grid] | None:
        return [(grid[0] - 1, grid[1] - 1, 0)] if kernel.startswith("scores") else None

    with simulated_cuda(last) as cuda:
        scores = cuda.ops.sparse_scores(*query, *passage)
        grad_queries, grad_passages = cuda.ops.sparse_scores_backward(grad, *query, *passage)
    assert scores[-1, -1] == 2 * 10 + 3 * 100
    assert grad_queries.tolist() == [0.0, 20.0, 200.0]
    assert grad_passages.tolist() == [4.0, 6.0]


@needs_nvcc
def test_packing_of_more_than_2_to_31_elements() -> None:
    rows = huge(BEFORE + ROWS, WIDTH, dtype=torch.bfloat16)
    rows[BEFORE:] = random(ROWS, WIDTH, dtype=torch.bfloat16, seed=1)
    sequences = offsets(0, BEFORE, BEFORE + ROWS)
    first = BEFORE * 32 // 256  # a warp copies a row, a block of 8 warps 8 of them

    def last_rows(kernel: str, grid: Grid) -> list[Grid]:
        return list(itertools.product(range(first, first + 2), (0,), (0,)))

    with simulated_cuda(last_rows) as cuda:
        padded = cuda.ops.unpack(rows, sequences, BEFORE)
        packed = cuda.ops.pack(padded, sequences, BEFORE + ROWS)
    assert torch.equal(padded[1, :ROWS], rows[BEFORE:])
    assert not padded[1, ROWS:16].any()
    assert torch.equal(packed[BEFORE:], rows[BEFORE:])
