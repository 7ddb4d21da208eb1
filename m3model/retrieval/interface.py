"""What every index offers: add documents by id, search with one head or several, rankings with the scores of each head.

    dense, sparse   the k documents of the largest score
    dense+sparse    the best `candidates` of dense united with those of sparse, all of them scored by both heads
    multi_vector    the best `rerank` of dense+sparse, ordered by MaxSim
    all             the best `rerank` of dense+sparse, ordered by the weighted mean of the three scores

This is the hybrid search of the paper (arXiv 2402.03216, section 4: 1000 candidates, 200 reranked) but for two things
in FlagEmbedding's scripts: a candidate that only one of the two heads found is scored by the other as well, where they
count 0 for it; and what is reranked is the best of dense+sparse, where they rerank the best of dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from m3model.embeddings import EncodedTexts
from m3model.retrieval.reranking import Encode
from m3model.scoring import DEFAULT_WEIGHTS

__all__ = ["CANDIDATES", "HEADS", "RERANK", "Head", "Hit", "Ranking", "SearchIndex"]

Head = Literal["dense", "sparse", "multi_vector", "dense+sparse", "all"]
HEADS: tuple[Head, ...] = ("dense", "sparse", "multi_vector", "dense+sparse", "all")
CANDIDATES = 1000
"""Documents that the dense and the sparse head each contribute."""
RERANK = 200
"""Documents that the multi-vector head scores."""

Scores = NDArray[np.float32]


class Hit(NamedTuple):
    """One document found; the score of a head that the index does not hold is None."""

    id: str
    score: float
    dense: float | None
    sparse: float | None
    multi_vector: float | None


@dataclass(frozen=True)
class Ranking:
    """The documents found for one query, best first.

    Attributes:
        ids: [k] of the documents.
        score: [k], that of the head searched with.
        dense, sparse, multi_vector: [k], the scores of each head, None where the index does not hold it.
    """

    ids: list[str]
    score: Scores
    dense: Scores | None
    sparse: Scores | None
    multi_vector: Scores | None

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Hit]:
        columns = (self.dense, self.sparse, self.multi_vector)
        for row, (document, score) in enumerate(zip(self.ids, self.score.tolist())):
            yield Hit(document, score, *(None if column is None else float(column[row]) for column in columns))


class SearchIndex(Protocol):
    """An index over the embeddings of documents."""

    def __len__(self) -> int: ...

    def __contains__(self, document: object) -> bool: ...

    def add(
        self,
        ids: Sequence[str],
        embeddings: EncodedTexts,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Add documents under new ids, with what the index should give back for them (JSON objects)."""

    def upsert(
        self,
        ids: Sequence[str],
        embeddings: EncodedTexts,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Add documents, or replace those of the same ids."""

    def delete(self, ids: Sequence[str]) -> int:
        """Remove documents; how many of the ids were there."""

    def search(
        self,
        queries: EncodedTexts,
        k: int = 10,
        *,
        head: Head = "all",
        weights: tuple[float, float, float] = DEFAULT_WEIGHTS,
        candidates: int = CANDIDATES,
        rerank: int | None = RERANK,
        encode: Encode | None = None,
    ) -> list[Ranking]:
        """The best k documents for every query."""

    def document(self, document: str) -> dict[str, Any]:
        """What was stored with the document of this id."""
