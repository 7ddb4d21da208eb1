"""Baselines, hybrid runs, the harness and its report on a small collection."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from m3model import M3Model
from m3model.evaluation import (
    BM25,
    PRESETS,
    Collection,
    DenseBaseline,
    Passage,
    Results,
    Task,
    evaluate,
    preset,
    unite,
    write_report,
)

absent = [name for name in ("ir_measures", "bm25s", "matplotlib") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(absent), reason=f"{absent} not installed; pip install m3kernels[eval]")

TEXTS = ["river north bridge", "matrix vector eigenvalue", "river river south", "mountain city", "the query passage"]


def small_task(name: str = "en", group: str = "all") -> Task:
    passages = [Passage(f"d{number}", text) for number, text in enumerate(TEXTS)]
    queries = {"q0": "river bridge", "q1": "eigenvalue of a matrix", "q2": "city"}
    qrels = {"q0": {"d0": 1}, "q1": {"d1": 1}, "q2": {"d3": 1, "d0": 0}}
    return Task(
        "toy", name, Collection("toy", lambda: passages), queries, ("nDCG@10", "RR@10"), "miracl", qrels, group=group
    )


def hashed(texts: list[str]) -> np.ndarray:
    """Bag of words under a fixed hash: stands for any dense encoder."""
    rows = np.zeros((len(texts), 64), dtype=np.float32)
    for row, text in zip(rows, texts):
        for word in text.split():
            row[sum(map(ord, word)) % 64] += 1
    return rows


def test_bm25_is_lucenes_formula_over_the_models_tokens(model: M3Model) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    run = BM25(tokenizer).search(small_task())["BM25"]
    bare = [[int(i) for i in ids if i not in tokenizer.special_ids] for ids in tokenizer.encode(TEXTS, 512).ids]
    asked = tokenizer.encode(["river bridge"], 512).ids[0]
    mean = sum(map(len, bare)) / len(bare)
    expected = {}
    for number, ids in enumerate(bare):
        score = 0.0
        for token in asked:
            frequency, holding = ids.count(int(token)), sum(int(token) in other for other in bare)
            idf = math.log(1 + (len(bare) - holding + 0.5) / (holding + 0.5))
            score += idf * frequency / (frequency + 0.9 * (1 - 0.4 + 0.4 * len(ids) / mean))
        if score > 0:
            expected[f"d{number}"] = score
    assert run["q0"].keys() == expected.keys()
    for passage, score in expected.items():
        assert run["q0"][passage] == pytest.approx(score, rel=1e-5)
    assert next(iter(run["q0"])) == "d0"


def test_bm25_of_a_query_without_known_tokens_lists_nothing(model: M3Model) -> None:
    assert model.tokenizer is not None
    task = small_task()
    empty = Task("toy", "en", task.collection, {"q": ""}, ("AP",), "miracl", {"q": {"d0": 1}})
    assert BM25(model.tokenizer).search(empty) == {"BM25": {"q": {}}}


def test_dense_baseline_ranks_by_cosine() -> None:
    run = DenseBaseline("bag", hashed, hashed, depth=2).search(small_task())["bag"]
    vectors = hashed(TEXTS) / np.linalg.norm(hashed(TEXTS), axis=1, keepdims=True)
    query = hashed(["river bridge"])[0] / np.linalg.norm(hashed(["river bridge"]))
    best = np.sort(vectors @ query)[::-1][:2]
    assert list(run["q0"].values())[:2] == pytest.approx(best.tolist(), abs=1e-6)
    assert next(iter(run["q0"])) == "d0"
    with pytest.raises(ValueError, match="encode_passages gave an array"):
        DenseBaseline("bad", hashed, lambda texts: np.zeros((1, 4), np.float32)).search(small_task())


def test_a_model_of_sentence_transformers_ranks_as_by_its_own_cosines(folder: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("sentence-transformers is not installed; pip install m3kernels[mteb]")
    from sentence_transformers import SentenceTransformer, models

    encoder = models.Transformer(str(folder))
    SentenceTransformer(modules=[encoder, models.Pooling(64, "mean")]).save(str(tmp_path / "small"))
    baseline = DenseBaseline.from_sentence_transformers(str(tmp_path / "small"))
    task = small_task()
    loaded = SentenceTransformer(str(tmp_path / "small"))
    names = [passage.id for passage in task.collection]
    passages = loaded.encode([passage.contents for passage in task.collection], normalize_embeddings=True)
    runs = baseline.search(task)
    assert list(runs) == ["small"]
    for query, text in task.judged.items():
        cosines = passages @ loaded.encode([text], normalize_embeddings=True)[0]
        assert runs["small"][query] == pytest.approx(dict(zip(names, cosines.tolist())), abs=1e-5)


def test_sentence_transformers_is_named_when_absent() -> None:
    if importlib.util.find_spec("sentence_transformers") is not None:
        pytest.skip("sentence-transformers is installed")
    with pytest.raises(ImportError, match=r"pip install m3kernels\[mteb\]"):
        DenseBaseline.from_sentence_transformers("any")


def test_unite_counts_a_missing_passage_as_zero() -> None:
    dense = {"q": {"a": 0.9, "b": 0.8}}
    sparse = {"q": {"b": 1.0, "c": 0.5}}
    assert unite([dense, sparse], (1.0, 0.3), 10)["q"] == pytest.approx({"b": 1.1, "a": 0.9, "c": 0.15})
    assert list(unite([dense, sparse], (1.0, 0.3), 2)["q"]) == ["b", "a"]
    with pytest.raises(ValueError, match="different queries"):
        unite([dense, {}], (1, 1), 5)
    with pytest.raises(ValueError, match="one weight of at least 0"):
        unite([dense, sparse], (1, -1), 5)


def test_presets_are_the_published_weights() -> None:
    assert preset("mldr").all == (0.15, 0.5, 0.35) and preset("mldr").dense_sparse == (0.2, 0.8)
    assert preset("miracl").all == preset("mkqa").all == (1.0, 0.3, 1.0)
    assert all(weights.source for weights in PRESETS.values())
    with pytest.raises(ValueError, match="accepted: miracl, mkqa, mldr, beir"):
        preset("msmarco")


def test_harness_writes_files_from_which_ir_measures_computes_the_same(model: M3Model, tmp_path: Path) -> None:
    import ir_measures

    assert model.tokenizer is not None
    tasks = [small_task("en", "monolingual"), small_task("en-x", "cross-lingual")]
    results = evaluate(tasks, [BM25(model.tokenizer), DenseBaseline("bag", hashed, hashed)], tmp_path)
    assert list(results.values) == ["BM25", "bag"]
    for system in results.values:
        for task in tasks:
            run = ir_measures.read_trec_run(str(tmp_path / "runs" / task.name / f"{system}.trec"))
            qrels = ir_measures.read_trec_qrels(str(tmp_path / "qrels" / f"{task.name}.qrels"))
            measure = ir_measures.parse_measure("nDCG@10")
            expected = ir_measures.calc_aggregate([measure], list(qrels), list(run))[measure]
            mean = np.mean(list(results.values[system][task.name]["nDCG@10"].values()))
            assert mean == pytest.approx(expected, abs=1e-9)
    assert Results.load(tmp_path / "results.json") == results
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match=r"no results.json of m3 eval"):
        Results.load(tmp_path / "results.json")


def test_harness_refuses_equal_names(tmp_path: Path) -> None:
    bag = DenseBaseline("bag", hashed, hashed)
    with pytest.raises(ValueError, match="two systems give a run 'bag'"):
        evaluate([small_task()], [bag, bag], tmp_path)
    with pytest.raises(ValueError, match="with different names"):
        evaluate([small_task(), small_task()], [bag], tmp_path)


def test_answer_judged_tasks_keep_judgements_for_each_run(tmp_path: Path) -> None:
    base = small_task()
    answers = {"q0": ("bridge",), "q1": ("nowhere",)}
    queries = {"q0": "river", "q1": "matrix"}
    task = Task("toy", "qa", base.collection, queries, ("Success@1", "Success@5"), "mkqa", answers=answers)
    results = evaluate([task], [DenseBaseline("bag", hashed, hashed)], tmp_path)
    assert results.values["bag"]["qa"]["Success@5"] == {"q0": 1.0, "q1": 0.0}
    assert (tmp_path / "qrels/qa/bag.qrels").is_file()


def test_report_holds_every_value_and_is_self_contained(model: M3Model, tmp_path: Path) -> None:
    assert model.tokenizer is not None
    tasks = [small_task("en", "monolingual"), small_task("de", "monolingual")]
    systems = [BM25(model.tokenizer), DenseBaseline("bag <b>", hashed, hashed)]
    results = evaluate(tasks, systems, tmp_path)
    markdown, page = write_report(results, tmp_path, "Toy & table", note="machine <x>")
    text = markdown.read_text()
    mean = 100 * np.mean(list(results.values["BM25"]["de"]["nDCG@10"].values()))
    row = next(line for line in text.splitlines() if line.startswith("| BM25"))
    assert f"{mean:.1f}" in row and "95 % interval" in text and "p (Holm)" in text
    for name in re.findall(r"\]\((\S+\.png)\)", text):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    document = page.read_text()
    assert document.count("data:image/png;base64,") == 2
    assert "Toy &amp; table" in document and "bag &lt;b&gt;" in document and "<b>" not in document
    assert not re.search(r'(src|href)="(?!data:)', document)
    assert json.loads((tmp_path / "results.json").read_text())["tasks"][0]["queries"] == 3
    with pytest.raises(ValueError, match="results are empty"):
        write_report(Results(), tmp_path, "nothing")
