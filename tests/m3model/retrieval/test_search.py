"""ExactIndex finds what comparing every pair finds, however the documents were added."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_texts import pair_scores, random_texts

from m3model import EncodedTexts
from m3model.retrieval import HEADS, ExactIndex, exact

WEIGHTS = (0.5, 1.5, 2.0)  # their sums are powers of 2, so that weighted means of exact scores are exact


def filled(documents: EncodedTexts, pieces: list[int]) -> ExactIndex:
    index = ExactIndex()
    bounds = sorted({0, len(documents), *(piece % (len(documents) + 1) for piece in pieces)})
    for begin, end in zip(bounds, bounds[1:]):
        index.add([f"d{i}" for i in range(begin, end)], documents.select(slice(begin, end)))
        if begin % 2:
            index.search(documents.select([0]), 1)
    return index


def weighted(scores: dict[str, np.ndarray], parts: tuple[str, ...]) -> np.ndarray:
    weights = dict(zip(("dense", "sparse", "multi_vector"), WEIGHTS))
    return sum(weights[part] * scores[part] for part in parts) / sum(weights[part] for part in parts)


def expected_numbers(
    scores: dict[str, np.ndarray], query: int, head: str, k: int, candidates: int, rerank: int | None
) -> np.ndarray:
    """The definition in m3model.retrieval.interface, with stable sorts over all documents."""
    row = {part: values[query] for part, values in scores.items()}
    row["dense+sparse"] = weighted(row, ("dense", "sparse"))
    row["all"] = weighted(row, ("dense", "sparse", "multi_vector"))

    def best(part: str, among: np.ndarray, count: int) -> np.ndarray:
        chosen = among[np.argsort(-row[part][among], kind="stable")][:count]
        return chosen[row[part][chosen] > 0] if part == "sparse" else chosen

    everything = np.arange(len(row["dense"]))
    if head in ("dense", "sparse"):
        return best(head, everything, k)
    united = np.union1d(best("dense", everything, candidates), best("sparse", everything, candidates))
    if head == "dense+sparse":
        return best(head, united, k)
    reranked = everything if rerank is None else np.sort(best("dense+sparse", united, max(rerank, k)))
    return best(head, reranked, k)


@given(
    count=st.integers(1, 40),
    seed=st.integers(0, 10_000),
    pieces=st.lists(st.integers(0, 100), max_size=4),
    k=st.integers(1, 12),
    candidates=st.integers(1, 20),
    rerank=st.none() | st.integers(1, 20),
    block=st.sampled_from([1, 7, 1 << 20]),
)
@settings(max_examples=60)
def test_every_head_ranks_as_comparing_all_pairs(
    count: int, seed: int, pieces: list[int], k: int, candidates: int, rerank: int | None, block: int
) -> None:
    documents, queries = random_texts(count, seed, steps=8), random_texts(3, seed + 1, steps=8)
    scores = pair_scores(queries, documents)
    index = filled(documents, pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "_SCORE_BLOCK", block)
        patch.setattr(exact, "_QUERY_BLOCK", 2)
        for head in HEADS:
            found = index.search(queries, k, head=head, weights=WEIGHTS, candidates=max(candidates, k), rerank=rerank)
            assert len(found) == 3
            for query, ranking in enumerate(found):
                numbers = expected_numbers(scores, query, head, k, max(candidates, k), rerank)
                assert ranking.ids == [f"d{number}" for number in numbers], head
                for part in scores:
                    np.testing.assert_array_equal(getattr(ranking, part), scores[part][query][numbers])
                row = {part: values[query] for part, values in scores.items()}
                combined = {"dense+sparse": ("dense", "sparse"), "all": ("dense", "sparse", "multi_vector")}
                total = weighted(row, combined[head]) if head in combined else row[head]
                np.testing.assert_array_equal(ranking.score, total[numbers])


@given(
    count=st.integers(1, 60), seed=st.integers(0, 1000), k=st.integers(1, 70), block=st.sampled_from([1, 5, 1 << 20])
)
@settings(max_examples=40)
def test_equal_scores_rank_in_the_order_of_adding(count: int, seed: int, k: int, block: int) -> None:
    documents, queries = random_texts(count, seed, steps=1), random_texts(4, seed + 1, steps=1)
    scores = pair_scores(queries, documents)["dense"]
    index = filled(documents, [seed, seed // 2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "_SCORE_BLOCK", block)
        for query, ranking in enumerate(index.search(queries, k, head="dense")):
            expected = np.argsort(-scores[query], kind="stable")[:k]
            assert ranking.ids == [f"d{number}" for number in expected]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_may_be_kept_in_half_precision(dtype: torch.dtype) -> None:
    documents, queries = random_texts(20, 1, row_dtype=dtype), random_texts(3, 2)
    index = filled(documents, [])
    expected = pair_scores(queries, documents)["multi_vector"]
    # One rounding of each of 8 products' query factor, then a float32 sum: 8 · eps · |q||d|.
    tolerance = 8 * torch.finfo(dtype).eps * 4
    for query, ranking in enumerate(index.search(queries, 20, head="multi_vector", rerank=None)):
        numbers = [int(document[1:]) for document in ranking.ids]
        np.testing.assert_allclose(ranking.multi_vector, expected[query][numbers], atol=tolerance)


@pytest.mark.parametrize(
    ("parts", "heads"),
    [
        (("dense",), ("dense",)),
        (("sparse",), ("sparse",)),
        (("multi_vector",), ("multi_vector",)),
        (("dense", "multi_vector"), ("dense", "multi_vector")),
        (("sparse", "multi_vector"), ("sparse", "multi_vector")),
        (("dense", "sparse"), ("dense", "sparse", "dense+sparse")),
    ],
)
def test_an_index_of_some_representations_serves_their_heads_only(
    parts: tuple[str, ...], heads: tuple[str, ...]
) -> None:
    documents, queries = random_texts(15, 3, parts=parts), random_texts(2, 4)
    index = filled(documents, [])
    for head in HEADS:
        if head in heads:
            for ranking in index.search(queries, 5, head=head):
                assert len(ranking) <= 5 and (head == "sparse" or ranking.ids)
                assert [getattr(ranking, part) is not None for part in ("dense", "sparse", "multi_vector")] == [
                    part in parts for part in ("dense", "sparse", "multi_vector")
                ]
                hits = list(ranking)
                assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        else:
            with pytest.raises(ValueError, match=r"the index has no (dense|sparse|multi_vector)"):
                index.search(queries, 5, head=head)


def test_an_empty_index_and_an_empty_list_of_queries_give_empty_results() -> None:
    queries = random_texts(2, 0)
    assert [list(ranking) for ranking in ExactIndex().search(queries)] == [[], []]
    assert filled(random_texts(4, 0), []).search(random_texts(0, 0)) == []


def test_many_small_additions_are_merged_into_few_segments() -> None:
    documents = random_texts(300, 5)
    index = ExactIndex()
    for number in range(300):
        index.add([f"d{number}"], documents.select([number]))
        index.search(documents.select([0]), 1, head="dense")
    assert len(index._segments) <= 12
    ranking = index.search(documents.select([211]), 1, head="dense")[0]
    exact_best = int(np.argmax(pair_scores(documents.select([211]), documents)["dense"][0]))
    assert ranking.ids == [f"d{exact_best}"]


def test_documents_come_back_by_id() -> None:
    index = ExactIndex()
    texts = random_texts(3, 6)
    index.add(["a", "b\x00\ud800", "Ω"], texts, [{"text": "one\x00"}, {"text": "zwei\udfff"}, {"n": [1, None]}])
    assert index.document("b\x00\ud800") == {"text": "zwei\udfff"}
    assert index.document("a") == {"text": "one\x00"} and index.document("Ω") == {"n": [1, None]}
    assert "a" in index and "c" not in index and len(index) == 3
    with pytest.raises(KeyError, match="no document 'c'"):
        index.document("c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0; accepted: a whole number"),
        ({"k": 2.0}, "k is 2.0; accepted"),
        ({"candidates": -1}, "candidates is -1"),
        ({"rerank": 0}, "rerank is 0"),
        ({"head": "colbert"}, "head is 'colbert'; accepted: dense, sparse"),
        ({"weights": (0.0, 0.0, 1.0)}, "weights are"),
        ({"queries": random_texts(1, 0, width=16)}, "dense of queries has width 16; the index has 8"),
        ({"queries": random_texts(1, 0, parts=("dense",))}, "queries have no sparse"),
    ],
)
def test_bad_arguments_of_search(change: dict, message: str) -> None:
    index = filled(random_texts(5, 7), [])
    queries = change.pop("queries", random_texts(1, 8))
    with pytest.raises(ValueError, match=message):
        index.search(queries, **change)


def test_values_that_are_not_finite_are_refused() -> None:
    broken = random_texts(3, 9)
    broken.dense[1, 2] = np.nan
    with pytest.raises(ValueError, match="embeddings have dense values that are not finite"):
        ExactIndex().add(["a", "b", "c"], broken)
    with pytest.raises(ValueError, match="queries have dense values that are not finite"):
        filled(random_texts(5, 7), []).search(broken)
    broken = random_texts(3, 9)
    broken.multi_vector.rows[0, 0] = float("inf")
    with pytest.raises(ValueError, match="multi-vector values that are not finite"):
        ExactIndex().add(["a", "b", "c"], broken)


@pytest.mark.parametrize(
    ("ids", "change", "error", "message"),
    [
        (["a", "a", "b"], {}, ValueError, "the id 'a' is twice in ids"),
        (["d1", "x", "y"], {}, ValueError, "the id 'd1' is in the index"),
        (["a", "b"], {}, ValueError, "2 ids, 3 embeddings and 2 documents"),
        (["a", 2, "b"], {}, TypeError, "ids must be a list of strings"),
        ("abc", {}, TypeError, "ids must be a list of strings"),
        (
            ["a", "b", "c"],
            {"width": 16},
            ValueError,
            "embeddings have dense of width 16.*the index has dense of width 8",
        ),
        (["a", "b", "c"], {"parts": ("dense",)}, ValueError, "embeddings have dense of width 8; the index has"),
        (["a", "b", "c"], {"row_dtype": torch.float16}, ValueError, "float16.*the index has.*float32"),
    ],
)
def test_bad_additions_leave_the_index_as_it_was(ids: list, change: dict, error: type, message: str) -> None:
    index = filled(random_texts(5, 7), [])
    with pytest.raises(error, match=message):
        index.add(ids, random_texts(3, 9, **change))
    assert len(index) == 5 and "a" not in index
    assert len(index.search(random_texts(1, 8), 10, head="dense")[0]) == 5
