"""Parts of the demo: how docstrings become pairs, how they are chosen, what the fitted sparse head knows."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from m3model import M3Model
from m3model.demo import hybrid_weights
from m3model.demo.docstrings import LONGEST, USUAL, Pair, choose, collect, split_docstring
from m3model.demo.hybrid_weights import LEAST_PAIRS, SPARSE_WEIGHTS, chosen_weights, reciprocal_ranks
from m3model.demo.questions import QUESTIONS
from m3model.demo.run import _mrr
from m3model.demo.token_weights import SCALE, fit_token_weights
from m3model.scoring import DEFAULT_WEIGHTS

BODY = "Parameters and returns. " * 10


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        (f"Compute the sum of a.\n\n{BODY}", "Compute the sum of a."),
        (f"add(x1, x2, /, out=None, *, where=True)\n\nAdd arguments element by element.\n\n{BODY}", "Add arguments"),
        (
            f"\nabs(input: Tensor, *, out=None) -> Tensor\n\nComputes the value\nof it. And more.\n{BODY}",
            "Computes the",
        ),
        (f"a(x)\nb(x, y)\n\nReturn the larger of two.\n\n{BODY}", "Return the larger of two."),
    ],
)
def test_the_summary_is_the_first_sentence_behind_signatures(docstring: str, summary: str) -> None:
    found = split_docstring(docstring)
    assert found is not None and found[0].startswith(summary) and found[0].endswith(".")
    assert BODY.strip() in found[1] and found[0] not in found[1]


@pytest.mark.parametrize(
    "docstring",
    [
        "",
        "f(x)",
        "Compute the sum of a.\n\nShort.",
        f"See :func:`torch.abs` for more.\n\n{BODY}",
        f"In-place version of the sum.\n\n{BODY}",
        f"Sum.\n\n{BODY}",
        f"Compute the sum of a.\n\n{BODY} compute THE sum of `a`",
        f"no sentence ends here\n\n{BODY}".replace(".", ","),
    ],
)
def test_docstrings_without_a_pair_are_left_out(docstring: str) -> None:
    assert split_docstring(docstring) is None


def test_the_collection_has_no_leaks_and_no_duplicates_and_answers_the_questions() -> None:
    pairs = collect()
    assert len(pairs) > 1000 and {pair.name.split(".")[0] for pair in pairs} == {"torch", "numpy"}
    for part in ("name", "summary", "body"):
        assert len({getattr(pair, part) for pair in pairs}) == len(pairs)
    assert not [pair for pair in pairs if pair.summary.lower() in pair.body.lower()]
    names = {pair.name for pair in pairs}
    for question in QUESTIONS:
        assert names & set(question.answers), question


def test_the_longest_and_the_named_are_always_chosen_and_the_budget_kept() -> None:
    pairs = [Pair(f"p{n}", "s", "b") for n in range(100)]
    lengths = list(range(100))
    chosen = choose(pairs, lengths, 1500, {"p3", "p50", "elsewhere"})
    names = [pair.name for pair in chosen]
    assert {*(f"p{n}" for n in range(100 - LONGEST, 100)), "p3", "p50"} <= set(names)
    assert sum(int(name[1:]) for name in names) <= 1500 and names == sorted(names, key=lambda name: int(name[1:]))
    assert chosen == choose(pairs, lengths, 1500, {"p50", "p3"})
    assert set(names) < {pair.name for pair in choose(pairs, lengths, 3000, {"p3", "p50"})}
    long = [length + USUAL - 90 for length in lengths]
    assert len(choose(pairs, long, 10**6, {"p97"})) == 91 + LONGEST + 1


def test_the_collection_is_the_same_in_every_process() -> None:
    program = "from m3model.demo.docstrings import collect; print(*(pair.name for pair in collect()))"
    found = [
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1] and len(found[0].split()) > 1000


def test_the_fitted_head_gives_rare_tokens_more_weight(model: M3Model, folder: object) -> None:
    own = M3Model.from_pretrained(folder)
    texts = [f"the {'river' if n == 0 else 'city'} and the bridge" for n in range(40)]
    ids = own.tokenizer.encode(texts, 512).ids
    fit_token_weights(own, ids, ids)
    weights = own.encode(["the river and the city"], dense=False, multi_vector=False).sparse.to_dicts()[0]
    token = {own.tokenizer.token(number): weight for number, weight in weights.items()}
    assert token["▁river"] > 2 * max(token["▁city"], token.get("▁the", 0.0), token.get("▁and", 0.0))
    # SCALE · √idf with df = 1 of 40; one text of forty, so the fit is not exact.
    assert token["▁river"] == pytest.approx(SCALE * np.sqrt(np.log1p(39.5 / 1.5)), rel=0.5)


def test_the_sparse_weight_is_the_one_that_ranks_best(model: M3Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [Pair(f"p{n}", f"where is {n}", f"the city of {n}") for n in range(LEAST_PAIRS)]
    count = len(pairs)
    right, wrong = torch.eye(count), torch.eye(count).roll(1, 1)
    # Dense is misled by 0.25, which takes a sparse weight above 0.25; multi-vector knows nothing.
    scores = {"dense": 0.25 * wrong, "sparse": right, "multi_vector": torch.zeros(count, count)}
    monkeypatch.setattr(hybrid_weights, "head_scores", lambda head, queries, passages: scores[head])
    assert chosen_weights(model, pairs) == (1.0, 0.3, 1.0)
    scores["sparse"] = wrong
    assert chosen_weights(model, pairs) == (1.0, SPARSE_WEIGHTS[0], 1.0)
    assert chosen_weights(model, pairs[1:]) == DEFAULT_WEIGHTS


def test_reciprocal_ranks_end_at_ten() -> None:
    scores = torch.zeros(12, 12) - torch.arange(12.0)  # the first column scores highest in every row
    expected = [1 / place if place <= 10 else 0.0 for place in range(1, 13)]
    assert reciprocal_ranks(scores).tolist() == pytest.approx(expected)


def test_the_reciprocal_rank_of_what_is_not_found_is_zero() -> None:
    assert _mrr([1, 2, 0, 4]) == pytest.approx((1 + 0.5 + 0.25) / 4)
