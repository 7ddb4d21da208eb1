"""Quantized passages: codes and scales, exactness of the integer sums, closeness to float scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import m3kernels
from m3kernels import QuantizedRows, _library, quantize_rows
from m3kernels.maxsim import reference
from tests.maxsim.cases import DTYPES, Batch, offsets_of, ragged_batch, ragged_batches
from tests.maxsim.test_scores_and_gradients import isa  # noqa: F401  (fixture)

BITS = (8, 1)
needs_kernels = pytest.mark.skipif(
    _library.cpu_kernel("maxsim_quantized") is None, reason="the compiled CPU kernels are missing"
)


def seven_bit_queries(queries: Tensor) -> Tensor:
    """Query rows as the kernel rounds them, in float64: 63 steps on either side of zero."""
    wide = queries.float()
    scales = wide.abs().amax(1, keepdim=True) / 63 if wide.numel() else wide[:, :1]
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    return (wide * inverse).round().double() * scales.double()


def expected_scores(batch: Batch, passages: QuantizedRows, floor: bool) -> Tensor:
    rows = (
        seven_bit_queries(batch.queries),
        passages.dequantize().double(),
        batch.query_offsets,
        batch.passage_offsets,
    )
    return reference.maxsim(*rows, batch.zero_floor if floor else None)[0]


@needs_kernels
@settings(deadline=None, max_examples=60)
@given(batch=ragged_batches(), bits=st.sampled_from(BITS), dtype=st.sampled_from(DTYPES), floor=st.booleans())
def test_integer_scores_equal_those_of_the_rounded_rows(
    batch: Batch, bits: int, dtype: torch.dtype, floor: bool
) -> None:
    batch = batch.to(dtype)
    passages = quantize_rows(batch.passages, bits)
    rows = (batch.queries, passages, batch.query_offsets, batch.passage_offsets)
    scores = m3kernels.maxsim(*rows, zero_floor=batch.zero_floor if floor else False)
    # The sums are exact; three float32 products and the mean are rounded. A query element that lies on the edge
    # between two codes may fall to either side: one step of one element.
    largest = passages.dequantize().abs().max() if passages.codes.numel() else 0.0
    step = batch.queries.float().abs().max() / 63 if batch.queries.numel() else 0.0
    torch.testing.assert_close(
        scores.double(), expected_scores(batch, passages, floor), rtol=1e-6, atol=float(largest * step) * 1.01 + 1e-6
    )


@needs_kernels
@pytest.mark.parametrize("bits", BITS)
def test_extreme_codes_do_not_saturate_on_any_instruction_set(isa: str, bits: int) -> None:  # noqa: F811
    width = 1024
    rows = torch.cat([torch.ones(5, width), -torch.ones(4, width)])
    queries = torch.stack([torch.ones(width), -torch.ones(width)])
    arguments = (queries, quantize_rows(rows, bits), offsets_of([1, 1]), offsets_of([5, 4]))
    scores = m3kernels.maxsim(*arguments)
    assert torch.equal(scores, torch.tensor([[1024.0, -1024.0], [-1024.0, 1024.0]]))


@needs_kernels
def test_every_instruction_set_gives_the_same_bits(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    batch = ragged_batch([1, 37, 0, 60], [13, 1, 0, 29, 6], 264)
    pairs = torch.tensor([[1, 0], [3, 3], [2, 1], [0, 2]], dtype=torch.int32)
    for bits in BITS:
        passages = quantize_rows(batch.passages, bits)
        rows = (batch.queries, passages, batch.query_offsets, batch.passage_offsets)
        scores, of_pairs = m3kernels.maxsim(*rows), m3kernels.maxsim_pairs(*rows, pairs)
        assert torch.equal(of_pairs, scores[pairs[:, 0].long(), pairs[:, 1].long()])
        with monkeypatch.context() as patch:
            patch.setenv("M3_CPU_ISA", "portable")
            assert torch.equal(m3kernels.maxsim(*rows), scores)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**16), rows=st.integers(0, 9), width=st.integers(1, 8), dtype=st.sampled_from(DTYPES))
def test_eight_bit_rows_are_within_half_a_step(seed: int, rows: int, width: int, dtype: torch.dtype) -> None:
    values = torch.randn(rows, 8 * width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    quantized = quantize_rows(values, 8)
    assert quantized.width == 8 * width
    error = (quantized.dequantize() - values.float()).abs()
    assert (error <= quantized.scales[:, None] * (0.5 + 1e-5)).all()


def test_one_bit_rows_keep_signs_and_the_product_with_themselves() -> None:
    values = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    quantized = quantize_rows(values, 1)
    assert quantized.codes.shape == (7, 8)
    assert quantized.width == 64
    restored = quantized.dequantize()
    assert torch.equal(restored.sign(), values.sign())
    torch.testing.assert_close((restored * values).sum(1), values.square().sum(1))


def test_rows_of_zeros_stay_zeros() -> None:
    for bits in BITS:
        assert not quantize_rows(torch.zeros(3, 16), bits).dequantize().any()


def test_scores_of_unit_rows_stay_within_a_percent_at_eight_bits() -> None:
    batch = ragged_batch([32, 12], [60, 90, 30], 384)
    queries, passages = (torch.nn.functional.normalize(x, dim=1) for x in (batch.queries, batch.passages))
    # A passage that answers its query: similarities of the size that embeddings have.
    passages[:32] = torch.nn.functional.normalize(queries[:32] + 0.5 * passages[:32], dim=1)
    exact = m3kernels.maxsim(queries, passages, batch.query_offsets, batch.passage_offsets)
    rows = (queries, quantize_rows(passages), batch.query_offsets, batch.passage_offsets)
    estimate = m3kernels.maxsim(*rows)
    worst = float(((estimate - exact).abs() / exact.abs()).max())
    assert worst <= 0.01, worst


def test_bad_quantized_arguments_are_named() -> None:
    rows = torch.zeros(5, 16)
    offsets = offsets_of([2, 3])
    good = quantize_rows(rows)
    with pytest.raises(ValueError, match="bits is 4; accepted: 8, 1"):
        quantize_rows(rows, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rows have width 12"):
        quantize_rows(rows[:, :12])
    with pytest.raises(TypeError, match=r"passages\.codes has dtype torch\.int8"):
        m3kernels.maxsim(rows, good._replace(codes=good.codes.to(torch.int8)), offsets, offsets)
    with pytest.raises(ValueError, match=r"passages\.scales has 4 entries, but there are 5 rows"):
        m3kernels.maxsim(rows, good._replace(scales=good.scales[:4]), offsets, offsets)
    with pytest.raises(ValueError, match="passages have width 24, but queries have 16"):
        m3kernels.maxsim(rows, quantize_rows(torch.zeros(5, 24)), offsets, offsets)
