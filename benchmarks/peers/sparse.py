"""What the sparse kernels are compared with.

FlagEmbedding 1.4.2's formulas of the head; dense and scipy products, dictionaries; retrieval by scipy, by bm25s-style
arrays and by the packages bmp and pyseismic-lsr.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3kernels import SparseBatch

UNUSED_IDS = (0, 1, 2, 3)
Search = Callable[[int], NDArray[np.float32]]
"""Scores of the k best passages of query number i, best first."""


def flag_training_head(hidden: Tensor, weight: Tensor, bias: Tensor, input_ids: Tensor, vocabulary: int) -> Tensor:
    """[B, V] as FlagEmbedding trains: a scattered [B, L, V] tensor and its maximum (modeling.py, sparse_embedding)."""
    token_weights = torch.relu(hidden @ weight[:, None] + bias)
    scattered = torch.zeros(*input_ids.shape, vocabulary, dtype=token_weights.dtype, device=hidden.device)
    vectors = torch.scatter(scattered, dim=-1, index=input_ids.unsqueeze(-1), src=token_weights).max(dim=1).values
    return _without_unused(vectors)


def flag_inference_head(hidden: Tensor, weight: Tensor, bias: Tensor, input_ids: Tensor, vocabulary: int) -> Tensor:
    """[B, V] as FlagEmbedding infers: scatter_reduce with amax."""
    token_weights = torch.relu(hidden @ weight[:, None] + bias).squeeze(-1)
    vectors = torch.zeros(input_ids.shape[0], vocabulary, dtype=token_weights.dtype, device=hidden.device)
    return _without_unused(vectors.scatter_reduce(dim=-1, index=input_ids, src=token_weights, reduce="amax"))


def _without_unused(vectors: Tensor) -> Tensor:
    mask = torch.ones(vectors.shape[1], device=vectors.device)
    mask[list(UNUSED_IDS)] = 0
    return vectors * mask


def dictionary_scores(queries: Sequence[dict[str, float]], passages: Sequence[dict[str, float]]) -> NDArray[np.float64]:
    """compute_lexical_matching_score of two lists."""
    scores = np.zeros((len(queries), len(passages)))
    for row, query in enumerate(queries):
        for column, passage in enumerate(passages):
            scores[row, column] = sum(weight * passage[token] for token, weight in query.items() if token in passage)
    return scores


def _best(scores: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    return -np.sort(-np.partition(scores, len(scores) - k)[len(scores) - k :])


def scipy_search(passages: SparseBatch, queries: SparseBatch, vocabulary: int, k: int) -> Search:
    """CSR product of all passages with one query, then a partial sort."""
    matrix, columns = passages.to_scipy(vocabulary), queries.to_scipy(vocabulary).T.tocsc()
    return lambda i: _best((matrix @ columns[:, [i]]).toarray()[:, 0], k)


def arrays_search(passages: SparseBatch, queries: SparseBatch, vocabulary: int, k: int) -> Search:
    """bm25s-style: postings of each query token out of CSC arrays, added up into a score for every passage."""
    matrix = passages.to_scipy(vocabulary).tocsc()
    count = matrix.shape[0]
    data, rows, begin = matrix.data, matrix.indices, matrix.indptr
    bounds, ids, weights = queries.offsets.tolist(), queries.token_ids.numpy(), queries.weights.numpy()

    def search(i: int) -> NDArray[np.float32]:
        scores = np.zeros(count, dtype=np.float32)
        for token, weight in zip(ids[bounds[i] : bounds[i + 1]], weights[bounds[i] : bounds[i + 1]]):
            postings = slice(begin[token], begin[token + 1])
            scores[rows[postings]] += weight * data[postings]  # a passage occurs once in a token's postings
        return _best(scores, k)

    return search


def bmp_search(passages: SparseBatch, queries: SparseBatch, k: int, block: int = 32) -> Search:
    """bmp (PyPI), exact: alpha = beta = 1. Its index is a file of eight-bit weights."""
    import bmp

    folder = tempfile.mkdtemp(prefix="bmp")
    indexer = bmp.Indexer(str(Path(folder) / "index"), bsize=block, compress_range=False)
    for number, entries in enumerate(passages.to_dicts()):
        indexer.add_document(str(number), {str(token): int(weight) for token, weight in entries.items()})
    indexer.finish()
    searcher = bmp.Searcher(str(Path(folder) / "index"))
    asked = [{str(token): weight for token, weight in entries.items()} for entries in queries.to_dicts()]
    return lambda i: np.asarray(searcher.search(asked[i], k=k, alpha=1.0, beta=1.0)[1], dtype=np.float32)


def seismic_search(passages: SparseBatch, queries: SparseBatch, k: int) -> Search:
    """pyseismic-lsr (its index for more than 2^16 tokens), nothing pruned that the settings let one keep."""
    from seismic import SeismicDatasetLV, SeismicIndexLV, get_seismic_string

    text = get_seismic_string()

    def strings(entries: dict[int, float]) -> tuple[NDArray[np.str_], NDArray[np.float32]]:
        return np.array([str(token) for token in entries], dtype=text), np.array(
            list(entries.values()), dtype=np.float32
        )

    dataset = SeismicDatasetLV()
    for number, entries in enumerate(passages.to_dicts()):
        dataset.add_document(str(number), *strings(entries))
    index = SeismicIndexLV.build_from_dataset(
        dataset, n_postings=len(passages.offsets) - 1, centroid_fraction=0.1, min_cluster_size=2, summary_energy=1.0
    )
    asked = [strings(entries) for entries in queries.to_dicts()]

    def search(i: int) -> NDArray[np.float32]:
        hits = index.search(
            query_id=str(i),
            query_components=asked[i][0],
            query_values=asked[i][1],
            k=k,
            query_cut=len(asked[i][0]),
            heap_factor=1.0,
        )
        return np.asarray([score for _, score, _ in hits], dtype=np.float32)

    return search
