"""Other retrievers in the same harness: BM25 over a model's tokens, and dense models of sentence-transformers.

A system has a name and answers a task with one or more named runs:

    class System(Protocol):
        def search(self, task: Task) -> dict[str, Run]

BM25 is Lucene's formula with Anserini's parameters k1 = 0.9, b = 0.4 over the ids of the model's tokenizer, which is
what the M3 paper compares its sparse head with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from m3model.evaluation.tasks import Collection, Run, Task
from m3model.evaluation.trec import ranked
from m3model.tokenizer import TextTokenizer

__all__ = ["BM25", "DenseBaseline", "System"]

_BLOCK = 8192


class System(Protocol):
    """Something that ranks the passages of a task's collection."""

    def search(self, task: Task) -> dict[str, Run]:
        """{name of the system in reports: run over task.judged}."""


class BM25:
    """BM25 (bm25s, Lù 2024, arXiv 2407.03618) over token ids.

    Scores of a collection are kept until another collection is asked for, so that tasks of one collection share them.
    """

    def __init__(
        self, tokenizer: TextTokenizer, *, k1: float = 0.9, b: float = 0.4, max_length: int = 8192, depth: int = 1000
    ) -> None:
        """
        Args:
            tokenizer: gives the terms; special tokens are left out.
            k1, b: saturation and normalisation by length.
            max_length: tokens of a passage that count.
            depth: passages kept for each query.

        Raises:
            ImportError: bm25s is not installed.
        """
        try:
            import bm25s
        except ImportError as error:
            raise ImportError("BM25 needs bm25s: pip install m3kernels[eval]") from error
        self._bm25s = bm25s
        self.tokenizer = tokenizer
        self.k1, self.b, self.max_length, self.depth = k1, b, max_length, depth
        self._indexed: tuple[str, list[str], Any] | None = None

    def search(self, task: Task) -> dict[str, Run]:
        """The run "BM25"; passages that share no token with the query are not listed."""
        passages, index = self._index(task.collection)
        asked = task.judged
        terms = self._terms(list(asked.values()), 8192)
        depth = min(self.depth, len(passages))
        run: Run = {}
        for query, ids in zip(asked, terms):
            scores = index.get_scores_from_ids(ids) if ids else np.zeros(len(passages), dtype=np.float32)
            best = _largest(scores, depth)
            run[query] = ranked({passages[number]: float(scores[number]) for number in best if scores[number] > 0})
        return {"BM25": run}

    def _index(self, collection: Collection) -> tuple[list[str], Any]:
        if self._indexed is None or self._indexed[0] != collection.name:
            names, ids = [], []
            block: list[str] = []
            for passage in collection:
                names.append(passage.id)
                block.append(passage.contents)
                if len(block) == _BLOCK:
                    ids += self._terms(block, self.max_length)
                    block = []
            ids += self._terms(block, self.max_length)
            vocabulary = {number: number for number in range(len(self.tokenizer))}
            index = self._bm25s.BM25(method="lucene", k1=self.k1, b=self.b)
            tokenized = self._bm25s.tokenization.Tokenized(ids=ids, vocab=vocabulary)
            index.index(tokenized, create_empty_token=False, show_progress=False)
            self._indexed = (collection.name, names, index)
        return self._indexed[1], self._indexed[2]

    def _terms(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        special = set(self.tokenizer.special_ids)
        encoded = self.tokenizer.encode(texts, max_length)
        return [[token for token in ids.tolist() if token not in special] for ids in encoded.ids]


class DenseBaseline:
    """A dense bi-encoder: cosine of its vectors over the whole collection, computed in blocks.

    Vectors of the last collection are kept, as in BM25.
    """

    def __init__(
        self,
        name: str,
        encode_queries: Callable[[list[str]], NDArray[np.float32]],
        encode_passages: Callable[[list[str]], NDArray[np.float32]],
        *,
        depth: int = 1000,
    ) -> None:
        """
        Args:
            name: of the system in reports.
            encode_queries, encode_passages: texts to float vectors [N, E]; they are normalised here.
            depth: passages kept for each query.
        """
        self.name, self.depth = name, depth
        self._encode_queries, self._encode_passages = encode_queries, encode_passages
        self._encoded: tuple[str, list[str], NDArray[np.float32]] | None = None

    @classmethod
    def from_sentence_transformers(
        cls,
        model: str,
        *,
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
        max_length: int | None = None,
        depth: int = 1000,
    ) -> DenseBaseline:
        """A model of sentence-transformers: mE5, Contriever, BGE and others.

        Args:
            model: folder or hub id.
            query_prompt, passage_prompt: text before every query and passage ("query: " and "passage: " for E5);
                default the prompts that the model's own configuration has for queries and documents.
            max_length: tokens of a text; default the model's.

        Raises:
            ImportError: sentence-transformers is not installed.
        """
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError("dense baselines need sentence-transformers: pip install m3kernels[mteb]") from error
        encoder = SentenceTransformer(model)
        if max_length is not None:
            encoder.max_seq_length = max_length

        def queries(texts: list[str]) -> NDArray[np.float32]:
            return np.asarray(encoder.encode_query(texts, prompt=query_prompt, show_progress_bar=False))

        def passages(texts: list[str]) -> NDArray[np.float32]:
            return np.asarray(encoder.encode_document(texts, prompt=passage_prompt, show_progress_bar=False))

        return cls(model.rstrip("/").split("/")[-1], queries, passages, depth=depth)

    def search(self, task: Task) -> dict[str, Run]:
        """One run under the system's name."""
        names, vectors = self._vectors(task.collection)
        asked = task.judged
        queries = _unit_rows(self._encode_queries(list(asked.values())), "encode_queries", len(asked))
        depth = min(self.depth, len(names))
        run: Run = {}
        for begin in range(0, len(asked), 64):
            for query, scores in zip(list(asked)[begin : begin + 64], queries[begin : begin + 64] @ vectors.T):
                run[query] = ranked({names[number]: float(scores[number]) for number in _largest(scores, depth)})
        return {self.name: run}

    def _vectors(self, collection: Collection) -> tuple[list[str], NDArray[np.float32]]:
        if self._encoded is None or self._encoded[0] != collection.name:
            names: list[str] = []
            parts = []
            block: list[str] = []
            for passage in collection:
                names.append(passage.id)
                block.append(passage.contents)
                if len(block) == _BLOCK:
                    parts.append(_unit_rows(self._encode_passages(block), "encode_passages", len(block)))
                    block = []
            if block:
                parts.append(_unit_rows(self._encode_passages(block), "encode_passages", len(block)))
            self._encoded = (collection.name, names, np.concatenate(parts))
        return self._encoded[1], self._encoded[2]


def _unit_rows(vectors: NDArray[np.float32], source: str, count: int) -> NDArray[np.float32]:
    vectors = np.asarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != count:
        raise ValueError(f"{source} gave an array {vectors.shape} for {count} texts; accepted: one row a text")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: NDArray[np.float32] = vectors / np.maximum(lengths, 1e-12)
    return unit


def _largest(scores: NDArray[np.float32], depth: int) -> NDArray[np.intp]:
    """Numbers of the `depth` largest scores and of all that tie with the last of them, in no order."""
    if depth >= len(scores):
        return np.arange(len(scores))
    threshold = np.partition(scores, len(scores) - depth)[len(scores) - depth]
    return np.flatnonzero(scores >= threshold)
