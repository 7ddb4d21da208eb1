"""MilvusIndex on milvus-lite against ExactIndex, and what it refuses."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from embeddings import random_embeddings

from m3model.retrieval.exact import ExactIndex
from m3model.retrieval.interface import HEADS, Ranking
from m3model.retrieval.milvus import MilvusIndex

absent = [name for name in ("pymilvus", "milvus_lite") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(absent), reason=f"{absent} not installed; pip install m3kernels[milvus]")

COUNT = 100
QUERIES = random_embeddings(5, seed=1)
IDS = [f"d{number}" for number in range(COUNT)]
DOCUMENTS = [{"lang": ("de", "en", "ja")[n % 3], "year": 2000 + n % 5, "text": f"text {n}"} for n in range(COUNT)]


@pytest.fixture(scope="module")
def exact() -> ExactIndex:
    index = ExactIndex()
    index.add(IDS, random_embeddings(COUNT, seed=0), DOCUMENTS)
    return index


@pytest.fixture(scope="module")
def milvus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusIndex]:
    with MilvusIndex(tmp_path_factory.mktemp("milvus") / "index.db", width=32, row_width=16) as index:
        index.add(IDS, random_embeddings(COUNT, seed=0), DOCUMENTS)
        yield index


def assert_same(found: Ranking, expected: Ranking) -> None:
    """Equal scores place by place, and equal documents except among scores that tie.

    Both engines add up the same float32 products in different orders: errors grow with the sum's length of at most 32.
    """
    tolerance = 32 * 2**-23 * 4
    assert len(found) == len(expected)
    np.testing.assert_allclose(found.score, expected.score, rtol=0, atol=tolerance)
    scores = dict(zip(expected.ids, expected.score))
    least = min(expected.score, default=0.0)
    for document, score in zip(found.ids, found.score):
        assert abs(scores.get(document, least) - score) <= 2 * tolerance


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("k", "candidates", "rerank"), [(10, 1000, 200), (5, 20, 15), (1000, 1000, 1000)])
def test_both_engines_rank_alike(
    exact: ExactIndex, milvus: MilvusIndex, head: str, k: int, candidates: int, rerank: int
) -> None:
    options = {"head": head, "candidates": candidates, "rerank": rerank, "weights": (1.0, 0.4, 0.8)}
    pairs = zip(milvus.search(QUERIES, k, **options), exact.search(QUERIES, k, **options))
    for found, expected in pairs:
        assert_same(found, expected)
        for part in ("dense", "sparse", "multi_vector"):
            mine = dict(zip(found.ids, getattr(found, part)))
            other = dict(zip(expected.ids, getattr(expected, part)))
            shared = mine.keys() & other.keys()
            # Rows are float16 in both; their products are added up in float32 and rounded to float16 once.
            np.testing.assert_allclose([mine[d] for d in shared], [other[d] for d in shared], rtol=0, atol=2**-10)


def test_filters_leave_only_matching_documents(exact: ExactIndex, milvus: MilvusIndex) -> None:
    for head in HEADS:
        rankings = milvus.search(QUERIES, 50, head=head, filter={"lang": ["de", "ja"], "year": 2003})
        assert sum(map(len, rankings)) > 10
        for ranking in rankings:
            for document in ranking.ids:
                content = exact.document(document)
                assert content["lang"] in ("de", "ja") and content["year"] == 2003
    kept = [n for n in range(COUNT) if DOCUMENTS[n]["lang"] == "de"]
    alone = ExactIndex()
    alone.add([IDS[n] for n in kept], random_embeddings(COUNT, seed=0).select(kept))
    found = milvus.search(QUERIES, 10, head="dense+sparse", filter={"lang": "de"})
    for mine, expected in zip(found, alone.search(QUERIES, 10, head="dense+sparse")):
        assert_same(mine, expected)
    with pytest.raises(ValueError, match=r"filter\['lang'\] is None"):
        milvus.search(QUERIES, 10, filter={"lang": None})  # type: ignore[dict-item]


def test_reciprocal_rank_fusion_is_its_formula(milvus: MilvusIndex) -> None:
    dense = milvus.search(QUERIES, 40, head="dense")
    sparse = milvus.search(QUERIES, 40, head="sparse")
    fused = milvus.search(QUERIES, 10, head="dense+sparse", candidates=40, fusion="rrf")
    for first, second, ranking in zip(dense, sparse, fused):
        expected: dict[str, float] = {}
        for part in (first, second):
            for place, document in enumerate(part.ids, 1):
                expected[document] = expected.get(document, 0.0) + 1 / (60 + place)
        best = sorted(expected.values(), reverse=True)[: len(ranking)]
        np.testing.assert_allclose(ranking.score, best, atol=1e-6)
    with pytest.raises(ValueError, match="fusion is 'rrf' for head 'all'"):
        milvus.search(QUERIES, fusion="rrf")


def test_upsert_replaces_and_delete_removes(tmp_path: Path) -> None:
    with MilvusIndex(tmp_path / "index.db", width=32, row_width=16) as index:
        first = random_embeddings(4, seed=2)
        names = ["q\"u\\o'te", "日本/語", "line\nbreak", "\ud800"]
        index.add(names, first, [{"text": "x" * 200_000}, {"n": 1}, {}, {"s": "\ud800"}])
        assert len(index) == 4 and all(name in index for name in names) and "other" not in index
        assert index.document(names[0]) == {"text": "x" * 200_000}
        assert index.document(names[3]) == {"s": "\ud800"}
        with pytest.raises(ValueError, match="is in the index"):
            index.add([names[1]], first.select([1]))
        index.upsert([names[0]], first.select([2]), [{"text": "short"}])
        assert len(index) == 4 and index.document(names[0]) == {"text": "short"}
        left = index._client.query("m3_pieces", filter="", output_fields=["count(*)"])[0]["count(*)"]
        # One piece of JSON and one of rows for each document, and the facts: nothing is left of the long text.
        assert left == 4 * 2 + 1
        assert index.delete([names[0], "other"]) == 1
        assert len(index) == 3 and names[0] not in index
        with pytest.raises(KeyError, match="no document"):
            index.document(names[0])
        assert all(names[0] not in ranking.ids for ranking in index.search(QUERIES, 10))


def test_index_opens_again_and_refuses_another_model_or_width(tmp_path: Path) -> None:
    from m3model.retrieval.fingerprint import same_model

    prints = [_fingerprint(seed) for seed in (0, 1)]
    assert not same_model(*prints)
    with MilvusIndex(tmp_path / "index.db", width=32, fingerprint=prints[0]) as index:
        index.add(IDS[:3], random_embeddings(3, seed=3, row_width=None))
    with MilvusIndex(tmp_path / "index.db", fingerprint=prints[0]) as index:
        assert (index.width, index.row_width, len(index)) == (32, None, 3)
        assert [len(ranking) for ranking in index.search(QUERIES, 10, head="dense")] == [3] * 5
        with pytest.raises(ValueError, match="no multi_vector"):
            index.search(QUERIES, 10, head="all")
        with pytest.raises(ValueError, match=r"the index has width 32"):
            index.upsert(["x"], random_embeddings(1, seed=3, width=16))
    with pytest.raises(ValueError, match="not the one that made the index"):
        MilvusIndex(tmp_path / "index.db", fingerprint=prints[1])
    with pytest.raises(ValueError, match="width is 64, but the collection 'm3'"):
        MilvusIndex(tmp_path / "index.db", width=64)
    with pytest.raises(FileNotFoundError, match="no index 'other'"):
        MilvusIndex(tmp_path / "index.db", "other")


def test_foreign_collection_is_refused(tmp_path: Path) -> None:
    import pymilvus

    client = pymilvus.MilvusClient(str(tmp_path / "index.db"))
    client.create_collection("m3", dimension=4)
    client.close()
    with pytest.raises(ValueError, match="is no index of m3model"):
        MilvusIndex(tmp_path / "index.db", width=4)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "http://10.255.255.1:19530"])
def test_unreachable_milvus_is_a_clear_error_in_bounded_time(uri: str) -> None:
    begin = time.monotonic()
    with pytest.raises(ConnectionError, match=f"no Milvus answers at {uri} within 2 s"):
        MilvusIndex(uri, width=8, timeout=2)
    assert time.monotonic() - begin < 10


def test_bad_documents_are_refused(milvus: MilvusIndex) -> None:
    one = random_embeddings(1, seed=4)
    with pytest.raises(TypeError, match="ids must be a list of strings"):
        milvus.upsert("d", one)
    with pytest.raises(ValueError, match="2 ids, 1 embeddings"):
        milvus.upsert(["a", "b"], one)
    with pytest.raises(ValueError, match="the id 'a' is twice in ids"):
        milvus.upsert(["a", "a"], random_embeddings(2, seed=4))
    with pytest.raises(ValueError, match="have no multi_vector"):
        milvus.upsert(["a"], random_embeddings(1, seed=4, row_width=None))
    one.dense[0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        milvus.upsert(["a"], one)
    with pytest.raises(ValueError, match="k is 0"):
        milvus.search(QUERIES, 0)
    assert len(milvus) == COUNT


def _fingerprint(seed: int) -> str:
    import base64

    generator = np.random.default_rng(seed)
    return base64.b64encode(np.concatenate([[8, 4, 8], generator.random(20)]).astype("<f4").tobytes()).decode()
