"""MTEBModel as MTEB calls it, and inside mteb.evaluate where mteb is installed."""

from __future__ import annotations

import importlib.util

import pytest

from m3model import M3Model
from m3model.evaluation.mteb_model import MTEBModel

CORPUS = [
    {"id": "a", "title": "", "text": "river north bridge"},
    {"id": "b", "title": "matrix", "text": "vector eigenvalue"},
    {"id": "c", "title": "", "text": "mountain city"},
]
QUERIES = [{"id": "q0", "text": "the river"}, {"id": "q1", "text": "eigenvalue of a matrix"}]
absent = importlib.util.find_spec("mteb") is None
needs_mteb = pytest.mark.skipif(absent, reason="mteb is not installed; pip install m3kernels[mteb]")


@pytest.mark.skipif(not absent, reason="mteb is installed")
def test_mteb_is_named_when_absent(model: M3Model) -> None:
    with pytest.raises(ImportError, match=r"pip install m3kernels\[mteb\]"):
        MTEBModel(model)


@needs_mteb
@pytest.mark.parametrize("head", ["dense", "sparse", "all"])
def test_search_gives_the_models_scores(model: M3Model, head: str) -> None:
    from mteb.models import SearchProtocol

    wrapped = MTEBModel(model, head=head, query_max_length=512)  # type: ignore[arg-type]
    assert isinstance(wrapped, SearchProtocol)
    with pytest.raises(RuntimeError, match="before index"):
        wrapped.search(QUERIES, top_k=2)
    wrapped.index(CORPUS)
    texts = [f"{row['title']}\n{row['text']}".strip() for row in CORPUS]
    expected = model.score([row["text"] for row in QUERIES], texts)[head]
    found = wrapped.search(QUERIES, top_k=3)
    for row, query in enumerate(QUERIES):
        for column, document in enumerate(CORPUS):
            score = float(expected[row, column])
            if score > 0 or head != "sparse":
                # Multi-vector rows of the corpus are float16.
                assert found[query["id"]][document["id"]] == pytest.approx(score, abs=3e-3)
    ranked = wrapped.search(QUERIES, top_k=3, top_ranked={"q0": ["c"], "q1": ["a", "b"]})
    assert {query: list(rows) for query, rows in ranked.items()} == {"q0": ["c"], "q1": ["a", "b"]}


@needs_mteb
def test_mteb_evaluates_a_retrieval_task(model: M3Model) -> None:
    import mteb
    from datasets import Dataset
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Toy(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Toy",
            description="three documents",
            reference=None,
            dataset={"path": "none/none", "revision": "1"},
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation=None,
        )

        def load_data(self, **_: object) -> None:
            split = {
                "corpus": Dataset.from_list(CORPUS),
                "queries": Dataset.from_list(QUERIES),
                "relevant_docs": {"q0": {"a": 1}, "q1": {"b": 1}},
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    results = mteb.evaluate(MTEBModel(model), Toy(), cache=None)
    assert 0 < results[0].get_score() <= 1
