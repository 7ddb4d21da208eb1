"""Multi-vectors made of the candidates alone give the rankings of an index that holds them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embeddings import random_embeddings

from m3model import EncodedTexts, M3Embeddings
from m3model.retrieval import ExactIndex
from m3model.retrieval.milvus import MilvusIndex

COUNT = 60
DOCUMENTS = random_embeddings(COUNT, seed=10)
QUERIES = random_embeddings(4, seed=11)
IDS = [f"d{number}" for number in range(COUNT)]
CONTENTS = [{"n": number} for number in range(COUNT)]
absent = [name for name in ("pymilvus", "milvus_lite") if importlib.util.find_spec(name) is None]
engines = [
    "exact",
    pytest.param("milvus", marks=pytest.mark.skipif(bool(absent), reason=f"{absent}; pip install m3kernels[milvus]")),
]


class Encoder:
    """Gives the documents' own multi-vectors and counts what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, contents: Sequence[Mapping[str, Any]]) -> EncodedTexts:
        self.asked += (numbers := [content["n"] for content in contents])
        return M3Embeddings(multi_vector=DOCUMENTS.select(numbers).multi_vector)


@pytest.fixture
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], ExactIndex | MilvusIndex]]:
    opened: list[MilvusIndex] = []

    def made(engine: str) -> ExactIndex | MilvusIndex:
        index: ExactIndex | MilvusIndex = ExactIndex()
        if engine == "milvus":
            opened.append(index := MilvusIndex(tmp_path / "index.db", width=32))
        index.add(IDS, M3Embeddings(DOCUMENTS.dense, DOCUMENTS.sparse), CONTENTS)
        return index

    yield made
    for index in opened:
        index.close()


@pytest.mark.parametrize("engine", engines)
def test_only_candidates_are_encoded_and_rank_as_stored_ones(engine: str, make: Callable) -> None:
    whole = ExactIndex()
    whole.add(IDS, DOCUMENTS, CONTENTS)
    index = make(engine)
    for head in ("multi_vector", "all"):
        encoder = Encoder()
        options = {"head": head, "candidates": 20, "rerank": 7}
        found = index.search(QUERIES, 5, encode=encoder, **options)
        for mine, expected in zip(found, whole.search(QUERIES, 5, **options)):
            assert mine.ids == expected.ids
            # Rows are float16 on both sides: sums of 16 products, rounded once.
            np.testing.assert_allclose(mine.score, expected.score, atol=2**-10)
            np.testing.assert_allclose(mine.multi_vector, expected.multi_vector, atol=2**-10)
        assert len(encoder.asked) == len(set(encoder.asked)) <= 4 * 7
    encoder = Encoder()
    for ranking in index.search(QUERIES, 5, head="dense", encode=encoder):
        assert ranking.multi_vector is None
    assert encoder.asked == []


@pytest.mark.parametrize("engine", engines)
def test_what_cannot_rerank_is_refused(engine: str, make: Callable) -> None:
    index = make(engine)
    with pytest.raises(ValueError, match="the index has no multi_vector"):
        index.search(QUERIES, 5, head="all")
    with pytest.raises(ValueError, match="queries have no multi_vector"):
        index.search(M3Embeddings(QUERIES.dense, QUERIES.sparse), 5, head="all", encode=Encoder())
    with pytest.raises(ValueError, match="it gave none"):
        index.search(QUERIES, 5, head="all", encode=lambda contents: M3Embeddings(QUERIES.dense))
    with pytest.raises(ValueError, match="as many multi-vectors of width 16"):
        index.search(QUERIES, 5, head="all", encode=lambda contents: QUERIES)
