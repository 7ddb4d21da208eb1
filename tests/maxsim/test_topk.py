"""maxsim_topk returns what sorting all scores would, whatever the size of its runs."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import m3kernels
from tests.maxsim.cases import Batch, offsets_of, ragged_batch, ragged_batches

maxsim_package = sys.modules["m3kernels.maxsim"]


@settings(deadline=None, max_examples=40)
@given(batch=ragged_batches(), k=st.integers(1, 7), at_a_time=st.integers(1, 12), bits=st.sampled_from([None, 8, 1]))
def test_topk_equals_sorting_all_scores(batch: Batch, k: int, at_a_time: int, bits: int | None) -> None:
    passages = batch.passages if bits is None else m3kernels.quantize_rows(batch.passages, bits)  # type: ignore[arg-type]
    rows = (batch.queries, passages, batch.query_offsets, batch.passage_offsets)
    scores = m3kernels.maxsim(*rows, zero_floor=batch.zero_floor)
    expected, order = scores.sort(dim=1, descending=True, stable=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maxsim_package, "_SCORES_AT_A_TIME", at_a_time)
        best = m3kernels.maxsim_topk(*rows, k, zero_floor=batch.zero_floor)
    assert torch.equal(best.scores, expected[:, :k])
    assert torch.equal(best.passages, order[:, :k])


def test_equal_scores_keep_the_lower_passage_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maxsim_package, "_SCORES_AT_A_TIME", 2)
    row = torch.ones(1, 8)
    offsets = offsets_of([1] * 9)
    best = m3kernels.maxsim_topk(row, row.repeat(9, 1), offsets_of([1]), offsets, 4)
    assert best.passages.tolist() == [[0, 1, 2, 3]]


def test_topk_refuses_a_k_below_one() -> None:
    batch = ragged_batch([2], [3], 8)
    with pytest.raises(ValueError, match="k is 0; accepted"):
        m3kernels.maxsim_topk(*batch.rows, 0)
