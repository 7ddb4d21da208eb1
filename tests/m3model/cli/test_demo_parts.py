"""Parts of the demo: sets and folds of docstrings, what the fitted sparse head knows, what is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from m3model import M3Model
from m3model.demo.docstrings import LONGEST, USUAL, Pair, apart, choose, collect, folds, split_docstring
from m3model.demo.fine_tuning import _LEAST_CHARACTERS, _MOST_CHARACTERS, _beginning, _files
from m3model.demo.measuring import MEASURES, lead, measure
from m3model.demo.questions import QUESTIONS
from m3model.demo.token_weights import SCALE, fit_token_weights
from m3model.retrieval import Ranking

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
    assert len(pairs) > 1000 and {pair.name.split(".")[0] for pair in pairs} == {"torch", "numpy", "scipy"}
    for part in ("name", "summary", "body"):
        assert len({getattr(pair, part) for pair in pairs}) == len(pairs)
    assert not [pair for pair in pairs if pair.summary.lower() in pair.body.lower()]
    names = {pair.name for pair in pairs}
    for question in QUESTIONS:
        assert names & set(question.answers), question


def test_the_longest_and_the_named_are_always_chosen_and_the_budget_kept() -> None:
    pairs = [Pair(f"numpy.p{n}", "s", "b") for n in range(100)]
    lengths = list(range(100))
    chosen = choose(pairs, lengths, 1500, {"numpy.p3", "numpy.p50", "elsewhere"})
    names = [pair.name for pair in chosen]
    numbers = [int(name.removeprefix("numpy.p")) for name in names]
    assert {*range(100 - LONGEST, 100), 3, 50} <= set(numbers)
    assert sum(numbers) <= 1500 and numbers == sorted(numbers)
    assert chosen == choose(pairs, lengths, 1500, {"numpy.p50", "numpy.p3"})
    assert set(names) < {pair.name for pair in choose(pairs, lengths, 3000, {"numpy.p3", "numpy.p50"})}
    long = [length + USUAL - 90 for length in lengths]
    assert len(choose(pairs, long, 10**6, {"numpy.p97"})) == 91 + LONGEST + 1
    assert choose([Pair("scipy.p", "s", "b")], [10], 100) == []


def words(begin: int, count: int = 60) -> str:
    return " ".join(f"w{number}" for number in range(begin, begin + count))


def test_no_body_that_is_trained_on_is_like_one_that_is_searched() -> None:
    held_out = [Pair("numpy.a", "s", words(0))]
    others = [Pair(f"torch.{n}", "s", words(1000 * n)) for n in range(1, 31)]
    alike = [Pair(f"scipy.{n}", "s", words(1000 * n + 10)) for n in range(1, 31)]
    pairs = [
        *held_out,
        Pair("torch.alike", "s", words(20)),  # 33 of 53 runs of eight words
        Pair("scipy.contained", "s", f"{words(10, 20)} {words(9000, 5)}"),
        Pair("scipy.apart", "s", words(40)),  # 13 of 53
        Pair("torch.long", "s", words(10**6, 300)),
        *others,
        *alike,
    ]
    training = apart(pairs, held_out)
    names = {pair.name for pair in pairs} - {"numpy.a", "torch.alike", "scipy.contained"}
    assert {pair.name for pair in training} == names
    searched = [[pair.name for pair in fold.development] for fold in folds(pairs, held_out)]
    assert sorted(searched[0] + searched[1]) == sorted(["torch.alike", *(pair.name for pair in others)])
    assert {len(names) for names in searched} == {15, 16}
    for fold in folds(pairs, held_out):
        # scipy.N is like torch.N, scipy.apart like torch.alike.
        there = {pair.name.split(".")[1].replace("alike", "apart") for pair in fold.development}
        assert {pair.name for pair in fold.training} == {name for name in names if name.split(".")[1] not in there}


def test_bodies_of_rows_are_beginnings_of_every_length() -> None:
    pairs = [Pair(f"numpy.{n}", "s", f"{n} {BODY}" * 10) for n in range(400)]
    lengths = np.array([len(_beginning(pair)) for pair in pairs])
    assert all(pair.body.startswith(_beginning(pair)) for pair in pairs)
    assert lengths.min() >= _LEAST_CHARACTERS and lengths.max() <= _MOST_CHARACTERS
    middle = (_LEAST_CHARACTERS * _MOST_CHARACTERS) ** 0.5
    assert 160 < (lengths < middle).sum() < 240
    assert _beginning(Pair("numpy.1", "s", "short")) == "short"


def test_a_module_that_fills_a_batch_has_a_file_of_its_own() -> None:
    pairs = [Pair(f"{module}.{n}", f"{module} {n}", "b") for n in range(32) for module in ("torch.nn", "numpy.fft")]
    pairs += [Pair(f"numpy.{n}", f"numpy {n}", "b") for n in range(3)]
    pairs = [pair for pair in pairs if pair.name != "numpy.fft.7"]
    files = _files(pairs)
    rows = {name: [json.loads(line)["query"] for line in content.splitlines()] for name, content in files.items()}
    assert {name: len(found) for name, found in rows.items()} == {"torch.nn": 32, "numpy": 34}
    assert sorted(rows["torch.nn"] + rows["numpy"]) == sorted(pair.summary for pair in pairs)
    assert files == _files(pairs[::-1])


def test_the_sets_of_this_installation_are_disjoint() -> None:
    pairs = collect()
    lengths = [len(pair.body) // 4 for pair in pairs]
    held_out = choose(pairs, lengths, 150_000)
    training, (first, second) = apart(pairs, held_out), folds(pairs, held_out)
    assert len(held_out) > 400 and len(training) > 1500 and abs(len(first.development) - len(second.development)) <= 1
    for sets in ([held_out, training], [held_out, first.development, second.development]):
        for part in ("name", "summary", "body"):
            assert len({getattr(pair, part) for some in sets for pair in some}) == sum(map(len, sets))
    assert {pair.name.split(".")[0] for pair in held_out + first.development} == {"torch", "numpy"}
    for fold in (first, second):
        assert len(fold.development) > 200 and set(fold.training) < set(training) - set(fold.development)
        assert len(fold.training) > len(training) - 2 * len(fold.development)
    assert apart(pairs, held_out) == training and folds(pairs, held_out) == (first, second)


def test_the_collection_is_the_same_in_every_process() -> None:
    program = "from m3model.demo.docstrings import collect; print(*(repr(pair) for pair in collect()), sep='\\n')"
    found = [
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    pairs, others = (output.splitlines() for output in found)
    assert [pair for pair, other in zip(pairs, others) if pair != other] == [] and len(pairs) == len(others) > 1000


def test_the_fitted_head_gives_rare_tokens_more_weight(model: M3Model, folder: object) -> None:
    own = M3Model.from_pretrained(folder)
    texts = [f"the {'river' if n == 0 else 'city'} and the bridge" for n in range(40)]
    ids = own.tokenizer.encode(texts, 512).ids
    fit_token_weights(own, ids, ids)
    weights = own.encode(["the river and the city"], dense=False, multi_vector=False).sparse.to_dicts()[0]
    token = {own.tokenizer.token(number): weight for number, weight in weights.items()}
    assert token["▁river"] > 2 * max(token.get("▁city", 0.0), token.get("▁the", 0.0), token.get("▁and", 0.0))
    # df = 1 of 40; one text of forty, so the fit is not exact.
    assert token["▁river"] == pytest.approx(SCALE * (np.sqrt(np.log1p(39.5 / 1.5)) - np.sqrt(np.log(2))), rel=0.5)
    assert token.get("▁the", 0.0) < 0.1 * SCALE


class Index:
    """A search that finds twelve documents with given scores, best hybrid score first."""

    def __init__(self, scores: dict[str, list[float]]) -> None:
        columns = {name: np.array(values, dtype=np.float32) for name, values in scores.items()}
        order = np.argsort(-columns["score"], kind="stable")
        self.found = Ranking([f"p{n}" for n in order], **{name: values[order] for name, values in columns.items()})

    def __len__(self) -> int:
        return len(self.found)

    def search(self, queries: object, k: int, **_options: object) -> list[Ranking]:
        assert k == len(self.found)
        return [self.found] * 2


def test_a_body_stands_behind_all_that_score_as_much(model: M3Model) -> None:
    falling = [1 - n / 100 for n in range(12)]
    scores = {"dense": falling, "sparse": [0.5] * 12, "multi_vector": falling[::-1], "score": [0.0, *falling[:11]]}
    pairs = [Pair("p0", "river", "b"), Pair("p2", "city", "b")]
    found = measure(Index(scores), model, pairs, (1.0, 0.3, 1.0))
    # Twelve sparse scores are equal, so each body stands at the twelfth place.
    assert found.places == {"dense": [1, 3], "sparse": [0, 0], "multi_vector": [0, 10], "all": [0, 2]}


def test_places_beyond_the_tenth_count_nothing_and_leads_are_paired() -> None:
    assert MEASURES["MRR@10"]([1, 2, 0, 4]).tolist() == [1, 0.5, 0, 0.25]
    assert MEASURES["nDCG@10"]([1, 3, 0, 7]).tolist() == pytest.approx([1, 0.5, 0, 1 / 3])
    places = {"all": [1, 3, 1, 0], "dense": [3, 3, 1, 0]}
    for name, gain in (("MRR@10", 2 / 3), ("nDCG@10", 0.5)):
        found = lead(name, places, "dense")
        assert found.mean == pytest.approx(gain / 4)
        assert found.error == pytest.approx(np.std([gain, 0, 0, 0], ddof=1) / 2)
        assert lead(name, {"all": [1, 2], "dense": [1, 2]}, "dense") == (0, 0)
