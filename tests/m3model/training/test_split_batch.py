"""Split batches give the gradients of the whole batch, with dropout those of the same dropout masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m3model import M3Embeddings, M3Model
from m3model.training import m3_loss, split_batch_backward
from m3model.training.losses import M3Loss
from m3model.training.split_batch import sub_batches

QUERIES = ["the river", "how do i sort a list", "what is north of the city", "matrix"]
PASSAGES = [f"{'the bridge of ' * (number % 4)}{text}" for number, text in enumerate(QUERIES * 3)]
TOLERANCE = 1e-5


def loss_of(embeddings: M3Embeddings[Any]) -> M3Loss:
    return m3_loss(embeddings.select(slice(0, 4)), embeddings.select(slice(4, 16)), temperature=0.1)


def load(folder: Path, *, dropout: bool) -> M3Model:
    model = M3Model.from_pretrained(folder, dtype=torch.float64)
    return model.train(dropout)


def gradients(model: M3Model) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def compare(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert ours.keys() == wanted.keys() and len(wanted) > 20
    largest = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=TOLERANCE * largest)


@pytest.mark.parametrize("tokens", [1, 40, 10_000])
def test_equal_to_the_whole_batch(folder: Path, tokens: int) -> None:
    whole, split = load(folder, dropout=False), load(folder, dropout=False)
    ids, offsets = whole.tokenize(QUERIES + PASSAGES)
    wanted = loss_of(whole(ids, offsets))
    (0.5 * wanted.total).backward()
    loss = split_batch_backward(split, ids, offsets, loss_of, sub_batch_tokens=tokens, scale=0.5)
    for ours, theirs in zip(loss, wanted):
        torch.testing.assert_close(ours, theirs.detach(), rtol=TOLERANCE, atol=0)
        assert not ours.requires_grad
    compare(gradients(split), gradients(whole))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_passes_have_the_same_dropout(folder: Path, checkpointing: bool) -> None:
    graph, split = load(folder, dropout=True), load(folder, dropout=True)
    split.set_gradient_checkpointing(checkpointing)
    ids, offsets = graph.tokenize(QUERIES + PASSAGES)
    torch.manual_seed(7)
    parts = [
        graph(ids[offsets[first] : offsets[last]], offsets[first : last + 1] - offsets[first])
        for first, last in sub_batches(offsets, 40)
    ]
    state = torch.get_rng_state()
    assert len(parts) > 2
    wanted = loss_of(M3Embeddings.concatenate(parts))
    wanted.total.backward()
    torch.manual_seed(7)
    loss = split_batch_backward(split, ids, offsets, loss_of, sub_batch_tokens=40)
    torch.testing.assert_close(loss.total, wanted.total.detach(), rtol=TOLERANCE, atol=0)
    compare(gradients(split), gradients(graph))
    assert torch.equal(torch.get_rng_state(), state), "the next step must draw other masks"
    torch.manual_seed(8)
    assert not torch.equal(loss_of(graph(ids, offsets)).total, wanted.total), "the dropout does nothing"


def test_sub_batches_hold_every_text_once() -> None:
    offsets = torch.tensor([0, 3, 3, 10, 12, 14], dtype=torch.int32)
    assert sub_batches(offsets, 5) == [(0, 2), (2, 3), (3, 5)]
    assert sub_batches(offsets, 1) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert sub_batches(offsets, 14) == [(0, 5)]
    with pytest.raises(ValueError, match="sub_batch_tokens"):
        sub_batches(offsets, 0)
    with pytest.raises(ValueError, match="offsets"):
        sub_batches(offsets[:1], 4)


def test_an_encoder_that_changes_between_the_passes_is_an_error(folder: Path) -> None:
    model = load(folder, dropout=False)
    ids, offsets = model.tokenize(QUERIES + PASSAGES)
    calls = 0

    def encoder(rows: Tensor, bounds: Tensor) -> M3Embeddings[Any]:
        nonlocal calls
        calls += 1
        return model((rows + (calls == 2)) % model.config.vocab_size, bounds)

    with pytest.raises(RuntimeError, match="not deterministic"):
        split_batch_backward(encoder, ids, offsets, loss_of, sub_batch_tokens=10_000)
