"""The model in the harness: rankings against scores computed pair by pair, caching, unions of collections."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from m3model import M3Model
from m3model.evaluation import Collection, HybridWeights, M3System, Passage, Task
from m3model.retrieval import HEADS, ExactIndex

TEXTS = ["river north bridge", "matrix vector eigenvalue", "river river south", "mountain city", "query passage", "a"]
QUERIES = {"q0": "river bridge", "q1": "eigenvalue of a matrix", "q2": "where is the city", "q3": "sort the list"}
WEIGHTS = HybridWeights((1.0, 0.3), (1.0, 0.3, 0.8), "a test", candidates=4, reranked=3)
pytestmark = pytest.mark.skipif(importlib.util.find_spec("ir_measures") is None, reason="needs m3kernels[eval]")


def collection(name: str, first: int, last: int) -> Collection:
    passages = [Passage(f"d{number}", TEXTS[number]) for number in range(first, last)]
    return Collection(name, lambda: passages)


def task(where: Collection) -> Task:
    return Task("toy", "en", where, QUERIES, ("nDCG@10",), "miracl", {query: {"d0": 1} for query in QUERIES})


def test_runs_are_those_of_the_papers_search(model: M3Model, tmp_path: Path) -> None:
    runs = M3System(model, tmp_path, weights=WEIGHTS).search(task(collection("all", 0, 6)))
    assert list(runs) == list(HEADS)
    scores = {name: part.numpy() for name, part in model.score(list(QUERIES.values()), TEXTS).items()}
    # Multi-vectors are kept in float16: products of unit rows are wrong by at most 2 · 2**-11 and their sum's rounding.
    tolerance = {"multi_vector": 3e-3, "all": 3e-3}
    for number, query in enumerate(QUERIES):
        dense, sparse, rows = (scores[part][number] for part in ("dense", "sparse", "multi_vector"))
        best = {
            "dense": set(np.argsort(-dense)[:4]),
            "sparse": set(np.argsort(-sparse, kind="stable")[:4]) & set(np.flatnonzero(sparse > 0)),
        }
        kept = np.argsort(-dense)[:3]
        united = {d: dense[d] * (d in best["dense"]) + 0.3 * sparse[d] * (d in best["sparse"]) for d in range(6)}
        expected = {
            "dense": {d: dense[d] for d in best["dense"]},
            "sparse": {d: sparse[d] for d in best["sparse"]},
            "dense+sparse": dict(sorted(united.items(), key=lambda item: -item[1])[:4]),
            "multi_vector": {d: rows[d] for d in kept},
            "all": {d: dense[d] + 0.3 * sparse[d] + 0.8 * rows[d] for d in kept},
        }
        for head in HEADS:
            found = runs[head][query]
            wanted = {f"d{d}": float(score) for d, score in expected[head].items() if head != "dense+sparse" or score}
            assert found.keys() == wanted.keys(), head
            for document, score in found.items():
                assert score == pytest.approx(wanted[document], abs=tolerance.get(head, 1e-5)), head
            assert list(found.values()) == sorted(found.values(), reverse=True)


def test_encodings_are_used_again_and_bound_to_the_model(
    folder: Path, model: M3Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = M3System(model, tmp_path, weights=WEIGHTS).search(task(collection("all", 0, 6)))
    again = M3System(model, tmp_path, weights=WEIGHTS)
    monkeypatch.setattr(model, "encode", lambda *_args, **_kwargs: pytest.fail("encoded again"))
    assert again.search(task(collection("all", 0, 6))) == runs
    monkeypatch.undo()
    other = M3Model(model.config, model.tokenizer)
    with pytest.raises(ValueError, match=r"another model|not the one that made"):
        M3System(other, tmp_path, weights=WEIGHTS).search(task(collection("all", 0, 6)))
    before = set(tmp_path.iterdir())
    quantized = M3Model.from_pretrained(folder, quantize="int8")
    M3System(quantized, tmp_path, weights=WEIGHTS).search(task(collection("all", 0, 6)))
    assert set(tmp_path.iterdir()) - before == {tmp_path / "int8"} and list((tmp_path / "int8").iterdir())


def test_a_union_of_collections_ranks_as_one(model: M3Model, tmp_path: Path) -> None:
    whole = M3System(model, tmp_path / "a", weights=WEIGHTS).search(task(collection("all", 0, 6)))
    parts = Collection.union("pool", [collection("first", 0, 2), collection("second", 2, 6)])
    system = M3System(model, tmp_path / "b", weights=WEIGHTS)
    for head, run in system.search(task(parts)).items():
        for query in QUERIES:
            assert list(run[query]) == list(whole[head][query])
            assert list(run[query].values()) == pytest.approx(list(whole[head][query].values()), abs=1e-5)
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "b").iterdir()) == ["first", "queries", "second"]


def test_only_what_the_heads_need_is_computed(model: M3Model, tmp_path: Path) -> None:
    runs = M3System(model, tmp_path, heads=["sparse"], name="tiny").search(task(collection("all", 0, 6)))
    assert list(runs) == ["tiny sparse"]
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert ExactIndex.load(folder).parts == ("sparse",)
    with pytest.raises(ValueError, match="heads are \\['colbert'\\]; accepted: dense, sparse"):
        M3System(model, tmp_path, heads=["colbert"])  # type: ignore[list-item]


def test_union_refuses_equal_ids_and_absent_parts(model: M3Model, tmp_path: Path) -> None:
    system = M3System(model, tmp_path, heads=["dense"])
    one = system._index(collection("one", 0, 2))
    with pytest.raises(ValueError, match="a document id occurs in two"):
        ExactIndex.union([one, one])
    with pytest.raises(ValueError, match="an index has no sparse"):
        ExactIndex.union([one], parts=("sparse",))
    assert len(ExactIndex.union([])) == 0
