"""M3Model as a system of the harness: the five rankings of the paper's tables.

    dense, sparse   the best `candidates` (1000) of each
    dense+sparse    both lists united, a passage that one lacks counts 0 there (m3model.evaluation.hybrid)
    multi_vector    the best `reranked` (200) dense passages, ordered by MaxSim
    all             the same passages, ordered by the weighted sum of the three scores

This is how the published figures were made (m3model.retrieval.presets); m3model.retrieval's own hybrid search scores
candidates of either head with both.

Collections are encoded once into an index folder below `cache` and queries into a file there; encoding that was cut off
goes on where it stopped. Multi-vectors are kept in float16: 2 · width bytes for every token.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m3kernels import SparseBatch
from m3model.embeddings import EncodedTexts, M3Embeddings, MultiVectors
from m3model.evaluation.hybrid import unite
from m3model.evaluation.tasks import Collection, Run, Task
from m3model.evaluation.trec import ranked
from m3model.model import M3Model
from m3model.retrieval import HEADS, ExactIndex, Head, Ranking, fingerprint, same_model
from m3model.retrieval.presets import HybridWeights, preset
from m3model.retrieval.streaming import ingest_stream

__all__ = ["M3System"]

_NEEDED: dict[Head, tuple[str, ...]] = {
    "dense": ("dense",),
    "sparse": ("sparse",),
    "dense+sparse": ("dense", "sparse"),
    "multi_vector": ("dense", "multi_vector"),
    "all": ("dense", "sparse", "multi_vector"),
}


class M3System:
    """Rankings of an M3Model; runs are named "NAME dense" and so on, or just "dense" for an empty name."""

    def __init__(
        self,
        model: M3Model,
        cache: str | os.PathLike[str],
        *,
        heads: Sequence[Head] = HEADS,
        name: str = "",
        weights: HybridWeights | None = None,
        max_length: int = 8192,
        query_max_length: int = 512,
        batch_tokens: int | None = None,
        block: int = 1024,
        progress: Callable[[str], None] = lambda _line: None,
    ) -> None:
        """
        Args:
            model: with tokenizer.
            cache: folder of this model's encodings; made if it is not there. Those of a quantized model, or in another
                dtype than float32, are in a folder of their own within it.
            heads: which rankings to make; representations that none of them needs are not computed.
            name: put before the heads' names.
            weights: default those published for each task's dataset.
            max_length, query_max_length: tokens of a passage and of a query.
            batch_tokens: as in M3Model.encode.
            block: passages encoded and stored together.
            progress: told how far encoding is.

        Raises:
            ValueError: no head, or an unknown one.
        """
        unknown = [head for head in heads if head not in HEADS]
        if unknown or not heads:
            raise ValueError(f"heads are {list(heads)}; accepted: {', '.join(HEADS)}")
        self.model, self.name, self.weights = model, name, weights
        self.heads = [head for head in HEADS if head in heads]
        self.max_length, self.query_max_length, self.batch_tokens = max_length, query_max_length, batch_tokens
        self.block, self.progress = block, progress
        self._cache = Path(cache) / _precision(model)
        self._parts = {part for head in self.heads for part in _NEEDED[head]}
        self._fingerprint = fingerprint(model)
        self._open: dict[str, ExactIndex] = {}

    def search(self, task: Task) -> dict[str, Run]:
        """A run for each head, over the task's judged queries."""
        weights = preset(task.preset) if self.weights is None else self.weights
        asked = task.judged
        queries = self._queries(asked)
        leaves = [self._index(collection) for collection in _leaves(task.collection)]
        depth = weights.candidates
        runs: dict[str, Run] = {}
        first: dict[str, Run] = {}
        for part in ("dense", "sparse"):
            if {part, "dense+sparse"} & set(self.heads):
                index = ExactIndex.union(leaves, parts=(part,))
                found = index.search(_only(queries, (part,)), depth, head="dense" if part == "dense" else "sparse")
                first[part] = _run(asked, found, lambda ranking: ranking.score)
        for head in self.heads:
            if head in first:
                runs[head] = first[head]
        if "dense+sparse" in self.heads:
            runs["dense+sparse"] = unite([first["dense"], first["sparse"]], weights.dense_sparse, depth)
        if {"multi_vector", "all"} & set(self.heads):
            index = ExactIndex.union(leaves)
            # Weights (1, 0, 0) make the candidates those of the dense head alone.
            found = index.search(
                queries, weights.reranked, head="multi_vector", weights=(1, 0, 0), rerank=weights.reranked
            )
            if "multi_vector" in self.heads:
                runs["multi_vector"] = _run(asked, found, lambda ranking: ranking.score)
            if "all" in self.heads:
                runs["all"] = _run(asked, found, lambda ranking: _sum(ranking, weights.all))
        return {f"{self.name} {head}".strip(): runs[head] for head in self.heads}

    def _index(self, collection: Collection) -> ExactIndex:
        """The index of a collection, encoded as far as that has not been done."""
        if collection.name in self._open:
            return self._open[collection.name]
        folder = self._cache / f"{collection.name}-{self.max_length}-{'-'.join(sorted(self._parts))}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            index = ExactIndex.load(folder, verify=False)
            index.check_model(self._fingerprint)
        else:
            index = ExactIndex(self._fingerprint)
        documents = ((passage.id, {"text": passage.contents}) for passage in collection)
        done = 0
        for acknowledged in ingest_stream(
            index, documents, self._encode_passages, folder=str(folder), block=self.block
        ):
            done += len(acknowledged)
            self.progress(f"{collection.name}: {done} passages encoded")
        if not done:
            raise ValueError(f"the collection {collection.name} has no passages")
        self._open[collection.name] = ExactIndex.load(folder, verify=False)
        return self._open[collection.name]

    def _encode_passages(self, contents: Sequence[Mapping[str, Any]]) -> EncodedTexts:
        return self._encode([content["text"] for content in contents], "passage", self.max_length)

    def _encode(self, texts: list[str], role: Any, max_length: int) -> EncodedTexts:
        wanted = {part: part in self._parts for part in ("dense", "sparse", "multi_vector")}
        return self.model.encode(
            texts,
            **wanted,
            role=role,
            max_length=max_length,
            batch_tokens=self.batch_tokens,
            multi_vector_dtype=torch.float16,
        )

    def _queries(self, asked: Mapping[str, str]) -> EncodedTexts:
        """Embeddings of the queries, from the cache if the same texts were encoded before."""
        texts = list(asked.values())
        described = json.dumps([texts, self.query_max_length, sorted(self._parts)])
        path = self._cache / f"queries-{hashlib.sha256(described.encode()).hexdigest()[:24]}.npz"
        if path.exists():
            stored = np.load(path)
            if not same_model(str(stored["fingerprint"]), self._fingerprint):
                raise ValueError(f"{path} was encoded by another model; give each model a cache of its own")
            return _from_arrays(stored)
        embeddings = self._encode(texts, "query", self.query_max_length)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part.npz")
        np.savez(beside, fingerprint=np.array(self._fingerprint), **_to_arrays(embeddings))
        beside.replace(path)
        self.progress(f"{len(texts)} queries encoded")
        return embeddings


def _precision(model: M3Model) -> str:
    parts = [] if model.dtype == torch.float32 else [str(model.dtype).removeprefix("torch.")]
    return "-".join([*parts, *([] if model.config.quantization is None else [model.config.quantization])])


def _leaves(collection: Collection) -> list[Collection]:
    """The collections that one is put together from; itself if it is not."""
    return [leaf for part in collection.parts for leaf in _leaves(part)] if collection.parts else [collection]


def _only(embeddings: EncodedTexts, parts: Sequence[str]) -> EncodedTexts:
    return M3Embeddings(**{part: getattr(embeddings, part) for part in parts})


def _run(asked: Mapping[str, str], found: Sequence[Ranking], score: Callable[[Ranking], Any]) -> Run:
    return {
        query: ranked(dict(zip(ranking.ids, score(ranking).tolist())))
        for query, ranking in zip(asked, found, strict=True)
    }


def _sum(ranking: Ranking, weights: tuple[float, float, float]) -> Any:
    assert ranking.dense is not None and ranking.sparse is not None and ranking.multi_vector is not None
    return weights[0] * ranking.dense + weights[1] * ranking.sparse + weights[2] * ranking.multi_vector


def _to_arrays(embeddings: EncodedTexts) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if embeddings.dense is not None:
        found["dense"] = embeddings.dense
    if embeddings.sparse is not None:
        names = ("token_ids", "token_weights", "token_offsets")
        found |= {name: part.numpy() for name, part in zip(names, embeddings.sparse)}
    if embeddings.multi_vector is not None:
        found |= {name: part.numpy() for name, part in zip(("rows", "row_offsets"), embeddings.multi_vector)}
    return found


def _from_arrays(stored: Mapping[str, Any]) -> EncodedTexts:
    sparse = rows = None
    if "token_ids" in stored:
        sparse = SparseBatch(
            *(torch.from_numpy(stored[name]) for name in ("token_ids", "token_weights", "token_offsets"))
        )
    if "rows" in stored:
        rows = MultiVectors(torch.from_numpy(stored["rows"]), torch.from_numpy(stored["row_offsets"]))
    return M3Embeddings(stored.get("dense"), sparse, rows)
