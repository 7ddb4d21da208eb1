"""Every instruction set of this machine computes the same late interaction, whatever the shapes and the numbers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import m3kernels
from m3kernels import QuantizedRows, _library, quantize_rows
from m3kernels.maxsim import reference
from tests.cpu_paths import HERE, on_path
from tests.maxsim.cases import (
    DTYPES,
    Batch,
    offsets_of,
    ragged_batch,
    similarity_bound,
)
from tests.maxsim.test_scores_and_gradients import assert_winners_are_maxima, forward

pytestmark = pytest.mark.skipif(
    _library.cpu_kernel("maxsim_forward") is None, reason="the compiled CPU kernels are missing"
)
every_isa = pytest.mark.parametrize("isa", HERE)

# From one row to several tiles and groups of panels, with ends of every kind.
lengths = st.lists(st.sampled_from([0, 1, 3, 15, 16, 17, 31, 32, 33, 48, 70, 130]), min_size=1, max_size=4)
widths = st.sampled_from([8, 16, 24, 32, 40, 64, 72, 96, 128, 160, 264, 384, 392, 520, 776, 1000, 1024])


@settings(deadline=None, max_examples=30)
@given(queries=lengths, passages=lengths, width=widths, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_scores_and_winners_agree_with_float64(
    queries: list[int], passages: list[int], width: int, dtype: torch.dtype, seed: int
) -> None:
    batch = ragged_batch(queries, passages, width, seed).to(dtype)
    expected, _ = reference.maxsim(*batch.to(torch.float64).rows, None, True)
    pairs = torch.cartesian_prod(torch.arange(len(queries)), torch.arange(len(passages))).to(torch.int32)
    for isa in HERE:
        with on_path(isa):
            scores, argmax = forward(batch)
            of_pairs = m3kernels.maxsim_pairs(*batch.rows, pairs)
            without_argmax = m3kernels.maxsim(*batch.rows)
        torch.testing.assert_close(
            scores.double(), expected, atol=similarity_bound(batch), rtol=1e-7, msg=lambda m, isa=isa: f"{isa}: {m}"
        )
        assert_winners_are_maxima(batch, False, argmax)
        # Bit for bit: a similarity does not depend on the tile that computes it.
        assert torch.equal(of_pairs, scores.flatten()), isa
        assert torch.equal(without_argmax, scores), isa


@settings(deadline=None, max_examples=25)
@given(queries=lengths, passages=lengths, width=widths, bits=st.sampled_from([8, 1]), seed=st.integers(0, 99))
def test_quantized_scores_are_the_same_bits(
    queries: list[int], passages: list[int], width: int, bits: int, seed: int
) -> None:
    batch = ragged_batch(queries, passages, width, seed)
    rows = (batch.queries, quantize_rows(batch.passages, bits), batch.query_offsets, batch.passage_offsets)  # type: ignore[arg-type]
    with on_path("portable"):
        expected = m3kernels.maxsim(*rows)
    for isa in HERE:
        with on_path(isa):
            assert torch.equal(m3kernels.maxsim(*rows), expected), isa


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 136, 1024])
def test_the_first_of_equal_rows_wins_in_every_tile(isa: str, dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    best = torch.randn(1, width, generator=generator)
    passages = 0.1 * torch.randn(200, width, generator=generator)
    queries = best + 0.1 * torch.randn(300, width, generator=generator)
    for first in (0, 5, 16, 31, 40, 150):
        rows = passages.clone()
        rows[first:] = best
        batch = Batch(queries, rows, offsets_of([1, 16, 17, 266]), offsets_of([200]), torch.zeros(1) > 0).to(dtype)
        with on_path(isa):
            _, argmax = forward(batch)
        assert (argmax == first).all(), (first, argmax[argmax != first])


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3.4e38])
def test_numbers_that_are_not_finite_touch_only_what_they_belong_to(isa: str, dtype: torch.dtype, value: float) -> None:
    plain = ragged_batch([20, 3, 35], [40, 7, 90], 72)
    # Products with the largest float stay below it.
    plain.queries[:, 5] *= 0.1
    plain.passages[:, 70] *= 0.1
    plain = plain.to(dtype)
    passages, queries = plain.passages.clone(), plain.queries.clone()
    passages[38, 5] = value
    queries[21, 70] = value
    with on_path(isa):
        scores, argmax = forward(plain)
        with_passage, passage_argmax = forward(replace(plain, passages=passages))
        with_query, query_argmax = forward(replace(plain, queries=queries))
        pair = m3kernels.maxsim_pairs(
            plain.queries, passages, *plain.rows[2:], torch.tensor([[1, 0]], dtype=torch.int32)
        )
    assert torch.equal(with_passage[:, 1:], scores[:, 1:])
    assert torch.equal(passage_argmax[:, 1:], argmax[:, 1:])
    assert torch.equal(pair, with_passage[1, :1]) or (pair.isnan().all() and with_passage[1, 0].isnan())
    others = torch.arange(58) != 21
    assert torch.equal(with_query[[0, 2]], scores[[0, 2]])
    assert torch.equal(query_argmax[others], argmax[others])
    for found, changed in ((with_passage, {"passages": passages}), (with_query, {"queries": queries})):
        wide = replace(plain, **changed).to(torch.float64)
        expected, _ = reference.maxsim(*wide.rows, None, True)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=similarity_bound(plain), equal_nan=True)


@every_isa
@pytest.mark.parametrize("exponents", [(-40, -40), (60, 60), (-90, 60), (100, -100)])
def test_scores_follow_powers_of_two_exactly(isa: str, exponents: tuple[int, int]) -> None:
    batch = ragged_batch([5, 40], [40, 7, 33], 200)
    scaled = replace(batch, queries=batch.queries * 2.0 ** exponents[0], passages=batch.passages * 2.0 ** exponents[1])
    with on_path(isa):
        scores, argmax = forward(batch)
        scaled_scores, scaled_argmax = forward(scaled)
    assert torch.equal(scaled_scores, scores * 2.0 ** sum(exponents))
    assert torch.equal(scaled_argmax, argmax)


@every_isa
@pytest.mark.parametrize("width", [64, 1024])
def test_float32_errors_are_at_most_twice_those_of_multiply_adds(isa: str, width: int) -> None:
    batch = ragged_batch([96], [1] * 96, width)
    exact = (batch.queries.double() @ batch.passages.double().T).mean(0)

    def error(of: str) -> float:
        with on_path(of):
            return float((forward(batch)[0][0].double() - exact).square().mean().sqrt())

    assert error(isa) <= 2 * error("portable"), (error(isa), error("portable"))


BEFORE_A_WALL = """
import ctypes, mmap, sys
import torch
import m3kernels
from m3kernels import quantize_rows
from tests.cpu_paths import on_path
from tests.maxsim.cases import DTYPES, ragged_batch

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def before_a_wall(rows):
    "A copy of rows whose last byte is the last one of its page; the next page cannot be read."
    page = mmap.PAGESIZE
    pages = -(-rows.nbytes // page)
    # readable and writable; private and anonymous
    begin = libc.mmap(None, (pages + 1) * page, 3, 0x22, -1, 0)
    assert libc.mprotect(begin + pages * page, page, 0) == 0
    memory = (ctypes.c_char * rows.nbytes).from_address(begin + pages * page - rows.nbytes)
    copy = torch.frombuffer(memory, dtype=rows.dtype).view(rows.shape)
    return copy.copy_(rows)


with on_path(sys.argv[1]):
    for width in (8, 24, 72, 200, 1024):
        for lengths in ([1], [3, 16], [40, 19]):
            batch = ragged_batch([5, 30, 7], lengths, width)
            for dtype in DTYPES:
                queries, passages, *offsets = batch.to(dtype).rows
                found = m3kernels.maxsim(before_a_wall(queries), before_a_wall(passages), *offsets)
                assert torch.equal(found, m3kernels.maxsim(queries, passages, *offsets))
            for bits in (8, 1):
                stored = quantize_rows(batch.passages, bits)
                walled = stored._replace(codes=before_a_wall(stored.codes), scales=before_a_wall(stored.scales))
                found = m3kernels.maxsim(batch.queries, walled, *offsets)
                assert torch.equal(found, m3kernels.maxsim(batch.queries, stored, *offsets))
"""


@every_isa
@pytest.mark.skipif(sys.platform != "linux", reason="maps pages")
def test_nothing_is_read_behind_the_last_row(isa: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", BEFORE_A_WALL, isa]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, (run.returncode, run.stderr)


@every_isa
def test_scales_that_are_not_numbers_pass_through(isa: str) -> None:
    batch = ragged_batch([20], [40, 5], 72)
    stored = quantize_rows(batch.passages)
    scales = stored.scales.clone()
    scales[17] = float("nan")
    with on_path(isa):
        scores = scores_of(batch, stored)
        changed = scores_of(batch, stored._replace(scales=scales))
    assert changed[0, 0].isnan()
    assert torch.equal(changed[:, 1], scores[:, 1])


def scores_of(batch: Batch, passages: QuantizedRows) -> Tensor:
    return m3kernels.maxsim(batch.queries, passages, batch.query_offsets, batch.passage_offsets)
