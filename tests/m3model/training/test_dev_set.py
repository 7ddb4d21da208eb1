"""nDCG@10 on a development set against the places of every passage."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from m3model import M3Model
from m3model.scoring import HEADS, head_scores
from m3model.training.data import TrainingRow
from m3model.training.dev_set import DevSet

WORDS = ["river", "mountain", "city", "bridge", "matrix", "vector", "sort", "list", "open", "file", "query", "north"]
ROWS = [
    TrainingRow(
        f"where is the {word}",
        (f"the {word} is in the north", f"{word} {word}"),
        (f"no {word}",),
        None,
        None,
        None,
        None,
    )
    for word in WORDS
]


@pytest.fixture
def own(folder: Path) -> M3Model:
    return M3Model.from_pretrained(folder)


def test_values_are_those_of_the_places(own: M3Model) -> None:
    torch.nn.init.constant_(own.sparse_linear.bias, 0.5)
    dev, weights = DevSet(ROWS), (0.7, 0.2, 1.5)
    queries, passages = own.encode(dev.queries, role="query"), own.encode(dev.passages)
    scores = {head: head_scores(head, queries, passages) for head in HEADS}
    scores["hybrid"] = torch.stack([weight * scores[head] for weight, head in zip(weights, HEADS)]).sum(0)
    found = dev.ndcg(own, weights=weights)
    assert set(found) == set(scores) and len(dev.passages) == 3 * len(WORDS)
    for name, of_head in scores.items():
        values = []
        for row, relevant in zip(of_head.tolist(), dev.relevant):
            order = sorted(range(len(row)), key=lambda place: (-row[place], str(place)))[:10]
            gained = sum(1 / math.log2(2 + n) for n, place in enumerate(order) if place in relevant and row[place] > 0)
            values.append(gained / (1 + 1 / math.log2(3)))
        assert found[name] == pytest.approx(sum(values) / len(values), abs=1e-6), name


def test_a_dead_sparse_head_finds_nothing(own: M3Model) -> None:
    torch.nn.init.zeros_(own.sparse_linear.weight)
    torch.nn.init.constant_(own.sparse_linear.bias, -1.0)
    dev = DevSet(ROWS[:3])  # ten places for nine passages
    found = dev.ndcg(own)
    assert found["sparse"] == 0.0 < found["hybrid"]
    assert found["hybrid"] == pytest.approx(dev.ndcg(own, weights=(1.0, 5.0, 1.0))["hybrid"])
