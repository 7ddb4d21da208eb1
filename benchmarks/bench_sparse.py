"""Sparse head, lexical scores and retrieval against their peers.

    python -m pytest benchmarks/bench_sparse.py [--device cuda]

benchmarks/results/sparse.csv comes from `python -m benchmarks.report_sparse`, which interleaves the peers.
"""

from __future__ import annotations

import pytest

from benchmarks import sparse_calls, sparse_texts
from benchmarks.conftest import Timer

SHAPES = [(1, 512), (8, 512), (64, 512), (1, 8192)]


@pytest.mark.parametrize("peer", ["m3kernels", "FlagEmbedding inference"])
@pytest.mark.parametrize(("batch", "length"), SHAPES)
def test_head_forward(timer: Timer, device: str, batch: int, length: int, peer: str) -> None:
    timer(sparse_calls.head_forward(batch, length, device)[peer])


@pytest.mark.parametrize(("batch", "length"), SHAPES)
def test_head_forward_and_backward(timer: Timer, device: str, batch: int, length: int) -> None:
    timer(sparse_calls.head_training(batch, length, with_official=False, device=device)["m3kernels"])


def test_head_forward_and_backward_as_flag_embedding_trains(timer: Timer, device: str) -> None:
    timer(sparse_calls.head_training(1, 512, with_official=True, device=device)["FlagEmbedding training"])


@pytest.mark.parametrize("peer", ["m3kernels", "dense product", "scipy CSR", "dictionaries"])
def test_scores_of_64_by_512(timer: Timer, device: str, peer: str) -> None:
    if device != "cpu" and peer in ("scipy CSR", "dictionaries"):
        pytest.skip(f"{peer} runs on the CPU")
    timer(sparse_calls.pair_scores(64, 512, device)[peer])


@pytest.mark.skipif(not sparse_texts.available(), reason="no ../shared/data: retrieval is measured on real text only")
@pytest.mark.parametrize("peer", ["m3kernels", "scipy CSR", "bm25s-style arrays", "bmp", "pyseismic-lsr"])
def test_top_100_of_100_000_passages(timer: Timer, device: str, peer: str) -> None:
    if device != "cpu":
        pytest.skip("retrieval runs on the CPU")
    pytest.importorskip("bmp")
    pytest.importorskip("seismic")
    passages, queries = sparse_texts.collection(20)
    search = sparse_calls.retrieval(queries, passages, 100)[peer]
    timer(lambda: [search(i) for i in range(20)])
