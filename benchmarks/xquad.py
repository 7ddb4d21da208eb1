"""XQuAD's paragraphs and questions as a search task, and its measure."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def ndcg_at_10(scores: torch.Tensor, relevant: torch.Tensor) -> float:
    """One relevant passage a query; ties count against us."""
    own = scores.gather(1, relevant[:, None])
    ranks = (scores >= own).sum(1)
    return float(torch.where(ranks <= 10, 1 / torch.log2(ranks.double() + 1), 0.0).mean())


def paragraphs(path: Path) -> list[tuple[str, list[str]]]:
    """Every paragraph of a file, with the questions that it answers."""
    articles = json.loads(path.read_text())["data"]
    return [
        (paragraph["context"], [question["question"] for question in paragraph["qas"]])
        for article in articles
        for paragraph in article["paragraphs"]
    ]
