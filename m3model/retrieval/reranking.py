"""Reranking by multi-vectors that no index holds: those of the candidates alone are made, when they are needed.

An index without multi-vectors is some hundred times smaller (bge-m3: 2 KB a token in float16); a query then costs a
forward pass over its candidates. One batch of queries encodes each candidate once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from m3kernels import maxsim_pairs
from m3model.embeddings import EncodedTexts, MultiVectors
from m3model.retrieval.coded_vectors import CodedVectors

__all__ = ["Encode", "listed_scores", "scores_of_encoded"]

Encode = Callable[[Sequence[Mapping[str, Any]]], EncodedTexts]
"""From the JSON objects of documents to their embeddings, multi-vectors among them."""


def scores_of_encoded(
    queries: MultiVectors,
    documents: Sequence[Mapping[str, Any]],
    candidates: Sequence[NDArray[np.int64]],
    encode: Encode,
) -> list[NDArray[np.float32]]:
    """MaxSim of each query with its candidates.

    Args:
        queries: rows of N queries.
        documents: JSON objects of all candidates.
        candidates: N arrays of numbers into `documents`.
        encode: called once with all documents, if there are any.

    Raises:
        ValueError: encode gives no multi-vectors, or not one for each document, or of another width.
    """
    if not documents:
        return [np.zeros(0, dtype=np.float32) for _ in candidates]
    width = queries.rows.shape[1]
    made = encode(documents).multi_vector
    if made is None or made.offsets.shape[0] != len(documents) + 1 or made.rows.shape[1] != width:
        raise ValueError(
            f"encode was given {len(documents)} documents and must give as many multi-vectors of width {width};"
            f" it gave {'none' if made is None else (made.offsets.shape[0] - 1, made.rows.shape[1])}"
        )
    return listed_scores(queries, made, candidates)


def listed_scores(
    queries: MultiVectors, passages: MultiVectors | CodedVectors, listed: Sequence[NDArray[np.int64]]
) -> list[NDArray[np.float32]]:
    """MaxSim of each of N queries with the passages of its list of numbers, in the dtype of the passages' rows, or in
    float32 with their codes."""
    numbers = [np.stack([np.full(len(own), query), own], axis=1) for query, own in enumerate(listed)]
    pairs = torch.from_numpy(np.concatenate(numbers).astype(np.int32))
    rows = queries.rows.to(passages.rows.dtype if isinstance(passages.rows, torch.Tensor) else torch.float32)
    scores = maxsim_pairs(rows, passages.rows, queries.offsets, passages.offsets, pairs).float().numpy()
    return np.split(scores, np.cumsum([len(own) for own in listed])[:-1])
