"""nDCG@10 of every head on a development set, measured during training.

rows (query, positives, negatives)  ->  collection: all different passages of all rows
relevant                            =   the positives of the query's rows
score of every query with every passage, by each head and by the weighted sum of them (exact search)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from m3model.embeddings import EncodedTexts
from m3model.evaluation import per_query
from m3model.model import M3Model, Role
from m3model.scoring import HEADS, head_scores
from m3model.training.data import TrainingRow

__all__ = ["DevSet"]

_QUERIES_AT_ONCE = 64
_DEPTH = 10


class DevSet:
    """Queries, passages and which of them belong together.

    Attributes:
        queries: different queries, instructions included; passages: different texts.
        relevant: for each query the numbers of its positives.
    """

    def __init__(self, rows: Iterable[TrainingRow], query_instruction: str = "", passage_instruction: str = "") -> None:
        """
        Args:
            rows: at least one; a query that occurs in several has the positives of all of them.
            query_instruction: before a query whose row has no prompt; passage_instruction: before every passage.

        Raises:
            ValueError: no rows.
        """
        places: dict[str, int] = {}
        relevant: dict[str, set[int]] = {}
        for row in rows:
            instruction = query_instruction if row.prompt is None else row.prompt
            of_query = relevant.setdefault(instruction + row.query, set())
            of_query.update(places.setdefault(passage_instruction + text, len(places)) for text in row.positives)
            for text in row.negatives:
                places.setdefault(passage_instruction + text, len(places))
        if not relevant:
            raise ValueError("rows is empty; a development set needs at least one row")
        self.queries, self.relevant, self.passages = list(relevant), list(relevant.values()), list(places)

    def ndcg(
        self,
        model: M3Model,
        heads: Sequence[str] = HEADS,
        weights: Sequence[float] = (1.0, 0.3, 1.0),
        *,
        query_max_length: int = 512,
        passage_max_length: int = 512,
        batch_tokens: int | None = None,
    ) -> dict[str, float]:
        """Mean nDCG@10 over the queries of each of `heads`, and of "hybrid" where there are several.

        The sparse head finds what shares a token of weight with the query, as an inverted index does; without this a
        head whose weights are all zero would have the nDCG@10 of the order of the passages.

        Raises:
            ImportError: ir-measures is not installed.
        """

        def encode(texts: Sequence[str], max_length: int, role: Role) -> EncodedTexts:
            return model.encode(
                texts,
                dense="dense" in heads,
                sparse="sparse" in heads,
                multi_vector="multi_vector" in heads,
                max_length=max_length,
                batch_tokens=batch_tokens,
                role=role,
            )

        queries = encode(self.queries, query_max_length, "query")
        passages = encode(self.passages, passage_max_length, "passage")
        runs: dict[str, dict[str, dict[str, float]]] = {}
        for begin in range(0, len(self.queries), _QUERIES_AT_ONCE):
            some = queries.select(slice(begin, begin + _QUERIES_AT_ONCE))
            scores = {head: head_scores(head, some, passages) for head in heads}
            if len(scores) > 1:
                scores["hybrid"] = sum(
                    (weight * scores[head] for head, weight in zip(HEADS, weights) if head in scores),
                    start=torch.zeros(len(some), len(self.passages)),
                )
            for name, score in scores.items():
                found = score.topk(min(_DEPTH, len(self.passages)))
                least = 0.0 if name == "sparse" else -math.inf
                for query, (values, places) in enumerate(zip(found.values.tolist(), found.indices.tolist()), begin):
                    runs.setdefault(name, {})[str(query)] = {
                        str(place): value for place, value in zip(places, values) if value > least
                    }
        judged = {str(query): dict.fromkeys(map(str, places), 1) for query, places in enumerate(self.relevant)}
        measured = {name: per_query(run, judged, ["nDCG@10"])["nDCG@10"] for name, run in runs.items()}
        return {name: sum(values.values()) / len(values) for name, values in measured.items()}
