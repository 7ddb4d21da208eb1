"""The host side of the CUDA sources: empty inputs, limits and messages, run on the CPU with the emulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.simt.emulated import load_kernels, needs_emulator

pytestmark = needs_emulator
NO_SEQUENCES = torch.tensor([0], dtype=torch.int32)
NO_IDS = torch.empty(0, dtype=torch.int32)
HUGE = 2**31


@pytest.fixture(scope="session")
def simt() -> Any:
    return load_kernels()


def huge(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """2^31 elements in the memory of one."""
    return torch.zeros(1, dtype=dtype).expand(HUGE)


@pytest.mark.parametrize("sequences", [0, 1, 3])
def test_empty_inputs_give_empty_results(simt: Any, sequences: int) -> None:
    offsets = torch.zeros(sequences + 1, dtype=torch.int32)
    none = torch.empty(0)
    for result in (
        simt.sparse_pool(none, NO_IDS, offsets, []),
        simt.sparse_embed(torch.empty(0, 8), torch.ones(8), torch.ones(1), NO_IDS, offsets, [1]),
    ):
        assert [x.numel() for x in result] == [0, 0, sequences + 1, 0]
        assert not result[2].any()
    assert simt.sparse_pool_backward(none, NO_IDS).shape == (0,)
    grad_hidden, grad_weight, grad_bias = simt.sparse_embed_backward(none, torch.empty(0, 8), torch.ones(8), NO_IDS)
    assert grad_hidden.shape == (0, 8)
    assert grad_weight.tolist() == [0] * 8
    assert grad_bias.tolist() == [0]
    side = (NO_IDS, none, offsets)
    scores = simt.sparse_scores(*side, *side)
    assert scores.shape == (sequences, sequences)
    assert not scores.any()
    assert [x.shape for x in simt.sparse_scores_backward(scores, *side, *side)] == [(0,), (0,)]
    assert simt.pack(torch.empty(sequences, 0, 4), offsets, 0).shape == (0, 4)
    assert simt.unpack(torch.empty(0, 4), offsets, 2).shape == (sequences, 2, 4)


def test_more_elements_than_int32_can_number_are_refused(simt: Any) -> None:
    ids = huge(torch.int32)
    message = r"has 2147483648 entries; accepted: fewer than 2\^31"
    with pytest.raises(RuntimeError, match="sparse_pool: token_ids " + message):
        simt.sparse_pool(huge(), ids, NO_SEQUENCES, [])
    with pytest.raises(RuntimeError, match="sparse_embed: token_ids " + message):
        simt.sparse_embed(torch.zeros(1, 1).expand(HUGE, 1), torch.ones(1), torch.ones(1), NO_IDS, NO_SEQUENCES, [])
    with pytest.raises(RuntimeError, match="sparse_pool_backward: rows " + message):
        simt.sparse_pool_backward(huge(), ids)
    with pytest.raises(RuntimeError, match="sparse_embed_backward: rows " + message):
        simt.sparse_embed_backward(huge(), torch.zeros(1, 1).expand(HUGE, 1), torch.ones(1), ids)
    side = (NO_IDS, torch.empty(0), NO_SEQUENCES)
    with pytest.raises(RuntimeError, match="sparse_scores: passages " + message):
        simt.sparse_scores(*side, ids, huge(), NO_SEQUENCES)
    with pytest.raises(RuntimeError, match="unpack: rows " + message):
        simt.unpack(torch.zeros(1, 1).expand(HUGE, 1), NO_SEQUENCES, 1)
    with pytest.raises(RuntimeError, match="pack: the packed tensor " + message):
        simt.pack(torch.zeros(0, 1, 1), NO_SEQUENCES, HUGE)


def test_what_the_kernels_do_not_take_is_named(simt: Any) -> None:
    ids, offsets = torch.tensor([5, 5], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="sparse_pool: the compiled kernel takes float32, bfloat16 and float16"):
        simt.sparse_pool(torch.ones(2).double(), ids, offsets, [])
    with pytest.raises(RuntimeError, match="sparse_pool: 65 ignored_ids; accepted on a GPU: at most 64"):
        simt.sparse_pool(torch.ones(2), ids, offsets, list(range(65)))
    with pytest.raises(RuntimeError, match="sparse_embed: hidden has width 0; accepted: at least 1"):
        simt.sparse_embed(torch.ones(2, 0), torch.ones(0), torch.ones(1), ids, offsets, [])
    with pytest.raises(RuntimeError, match="sparse_embed: hidden must be contiguous"):
        simt.sparse_embed(torch.ones(2, 4)[:, ::2], torch.ones(2), torch.ones(1), ids, offsets, [])


@pytest.mark.parametrize("passages", [63, 64, 65, 65535 * 64, 65535 * 64 + 1])
def test_the_grid_of_scores_covers_all_passages_within_the_limits(
    simt: Any, passages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = (torch.tensor([7], dtype=torch.int32), torch.tensor([2.0]), torch.tensor([0, 1], dtype=torch.int32))
    monkeypatch.setenv("SIMT_DRY_RUN", "1")
    simt.sparse_scores(*query, *query[:2], torch.zeros(passages + 1, dtype=torch.int32))
    blocks, threads = simt.last_launch()
    tile = 64 if passages <= 65535 * 64 else 65
    assert (blocks, threads) == (-(-passages // tile), 256)


def test_a_loop_over_rows_takes_as_many_blocks_as_rows_need_up_to_a_million(
    simt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIMT_DRY_RUN", "1")
    for rows, blocks in ((1, 1), (256, 1), (257, 2), (2**28 + 1, 2**20)):
        simt.pack(torch.zeros(1, 1, dtype=torch.bool), torch.tensor([0, 1], dtype=torch.int32), rows)
        assert simt.last_launch() == [blocks, 256]
