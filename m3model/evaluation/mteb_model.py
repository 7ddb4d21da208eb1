"""M3Model in MTEB (Muennighoff et al. 2023, arXiv 2210.07316), with any of its heads, through MTEB's search protocol.

    results = mteb.evaluate(MTEBModel(model, head="all"), mteb.get_tasks(["MIRACLRetrieval"], languages=["swa"]))

MTEB hands over corpus and queries; the rankings are those of ExactIndex.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from m3model.evaluation.tasks import Passage
from m3model.model import M3Model
from m3model.retrieval import HEADS, ExactIndex, Head
from m3model.retrieval.interface import CANDIDATES, RERANK
from m3model.scoring import DEFAULT_WEIGHTS, check_weights

__all__ = ["MTEBModel"]

_BLOCK = 1024


class MTEBModel:
    """An M3Model as MTEB's SearchProtocol."""

    def __init__(
        self,
        model: M3Model,
        *,
        name: str = "m3kernels/m3model",
        revision: str = "local",
        head: Head = "all",
        weights: tuple[float, float, float] = DEFAULT_WEIGHTS,
        max_length: int = 8192,
        query_max_length: int = 512,
        batch_tokens: int | None = None,
    ) -> None:
        """
        Args:
            model: with tokenizer.
            name, revision: under which MTEB files the results; the name has the form "organisation/model".
            head, weights: of the ranking, as ExactIndex.search.
            max_length, query_max_length, batch_tokens: as M3Model.encode.

        Raises:
            ImportError: mteb is not installed.
            ValueError: an unknown head, or weights as m3model.scoring.combine.
        """
        try:
            from mteb.models.model_meta import ModelMeta
        except ImportError as error:
            raise ImportError("MTEBModel needs mteb: pip install m3kernels[mteb]") from error
        if head not in HEADS:
            raise ValueError(f"head is {head!r}; accepted: {', '.join(HEADS)}")
        check_weights(weights)
        self.model, self.head, self.weights = model, head, weights
        self.max_length, self.query_max_length, self.batch_tokens = max_length, query_max_length, batch_tokens
        self._index: ExactIndex | None = None
        config = model.config
        self.mteb_model_meta: Any = ModelMeta(
            loader=None,
            name=name,
            revision=revision,
            release_date=None,
            languages=None,
            n_parameters=sum(parameter.numel() for parameter in model.parameters()),
            memory_usage_mb=None,
            max_tokens=model.max_length,
            embed_dim=config.hidden_size,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name=None,
            use_instructions=bool(config.query_prefix),
            training_datasets=None,
        )

    def index(self, corpus: Iterable[Mapping[str, Any]], **_: Any) -> None:
        """Encode the corpus: rows with id, text and perhaps title."""
        index = ExactIndex()
        block: list[Passage] = []
        for row in corpus:
            block.append(Passage(str(row["id"]), row["text"], row.get("title") or ""))
            if len(block) == _BLOCK:
                self._add(index, block)
                block = []
        self._add(index, block)
        self._index = index

    def search(
        self,
        queries: Iterable[Mapping[str, Any]],
        *,
        top_k: int,
        top_ranked: Mapping[str, list[str]] | None = None,
        **_: Any,
    ) -> dict[str, dict[str, float]]:
        """{query id: {document id: score}}; with `top_ranked` only those documents, all of them.

        Raises:
            RuntimeError: `index` was not called before.
        """
        if self._index is None:
            raise RuntimeError("search was called before index")
        rows = list(queries)
        texts = [str(row["text"]) for row in rows]
        embeddings = self.model.encode(
            texts, **self._wanted(), role="query", max_length=self.query_max_length, batch_tokens=self.batch_tokens
        )
        # Reranking tasks name few documents of the corpus: every document is ranked and theirs are picked out.
        every = len(self._index)
        depth = top_k if top_ranked is None else every
        rankings = self._index.search(
            embeddings,
            depth,
            head=self.head,
            weights=self.weights,
            candidates=max(CANDIDATES, depth),
            rerank=max(RERANK, top_k) if top_ranked is None else None,
        )
        found = {}
        for row, ranking in zip(rows, rankings):
            scores = dict(zip(ranking.ids, ranking.score.tolist()))
            if top_ranked is not None:
                scores = {document: scores.get(document, 0.0) for document in top_ranked[str(row["id"])]}
            found[str(row["id"])] = scores
        return found

    def _add(self, index: ExactIndex, block: list[Passage]) -> None:
        if not block:
            return
        embeddings = self.model.encode(
            [passage.contents for passage in block],
            **self._wanted(),
            max_length=self.max_length,
            batch_tokens=self.batch_tokens,
            multi_vector_dtype=torch.float16,
        )
        index.add([passage.id for passage in block], embeddings)

    def _wanted(self) -> dict[str, Any]:
        if self.head in ("multi_vector", "all"):
            return {"dense": True, "sparse": True, "multi_vector": True}
        return {part: part in self.head.split("+") for part in ("dense", "sparse", "multi_vector")}
