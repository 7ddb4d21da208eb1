"""Sparse head, lexical scores and retrieval against their peers: `python -m pytest benchmarks/bench_sparse.py`.

benchmarks/results/sparse.csv comes from `python -m benchmarks.report_sparse`, which interleaves the peers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import sparse_calls, sparse_texts

SHAPES = [(1, 512), (8, 512), (64, 512), (1, 8192)]


@pytest.mark.parametrize("peer", ["m3kernels", "FlagEmbedding inference"])
@pytest.mark.parametrize(("batch", "length"), SHAPES)
def test_head_forward(benchmark: Callable[..., Any], batch: int, length: int, peer: str) -> None:
    benchmark(sparse_calls.head_forward(batch, length)[peer])


@pytest.mark.parametrize(("batch", "length"), SHAPES)
def test_head_forward_and_backward(benchmark: Callable[..., Any], batch: int, length: int) -> None:
    benchmark(sparse_calls.head_training(batch, length, with_official=False)["m3kernels"])


def test_head_forward_and_backward_as_flag_embedding_trains(benchmark: Callable[..., Any]) -> None:
    benchmark(sparse_calls.head_training(1, 512, with_official=True)["FlagEmbedding training"])


@pytest.mark.parametrize("peer", ["m3kernels", "dense product", "scipy CSR", "dictionaries"])
def test_scores_of_64_by_512(benchmark: Callable[..., Any], peer: str) -> None:
    benchmark(sparse_calls.pair_scores(64, 512)[peer])


@pytest.mark.skipif(not sparse_texts.available(), reason="no ../shared/data: retrieval is measured on real text only")
@pytest.mark.parametrize("peer", ["m3kernels", "scipy CSR", "bm25s-style arrays", "bmp", "pyseismic-lsr"])
def test_top_100_of_100_000_passages(benchmark: Callable[..., Any], peer: str) -> None:
    pytest.importorskip("bmp")
    pytest.importorskip("seismic")
    passages, queries = sparse_texts.collection(20)
    search = sparse_calls.retrieval(queries, passages, 100)[peer]
    benchmark(lambda: [search(i) for i in range(20)])
