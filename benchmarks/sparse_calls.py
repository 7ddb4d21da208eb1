"""The inputs of the sparse benchmarks and the calls compared on them, one dictionary {peer: call} for each case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import sparse_texts
from benchmarks.peers import sparse as peers
from m3kernels import SparseBatch, SparseIndex, offsets_from_lengths, sparse_embed, sparse_scores

WIDTH = 1024
VOCABULARY = sparse_texts.VOCABULARY
Calls = dict[str, Callable[[], Any]]


def head_inputs(batch: int, length: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [B, L, E], weight [E], bias [1] as leaves; token ids int64 [B, L], of text if there is any."""
    generator = torch.Generator().manual_seed(batch * length)
    if sparse_texts.available():
        ids = torch.from_numpy(sparse_texts.tokens()[0])[: batch * length]
    else:
        ids = torch.randint(4, VOCABULARY, (batch * length,), generator=generator)
    hidden = torch.randn(batch, length, WIDTH, generator=generator).to(device).requires_grad_()
    weight = (torch.randn(WIDTH, generator=generator) / 32).to(device).requires_grad_()
    return (
        hidden,
        weight,
        torch.zeros(1, device=device, requires_grad=True),
        ids.reshape(batch, length).long().to(device),
    )


def _forward_backward(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(forward().sum(), leaves)


def head_forward(batch: int, length: int, device: str = "cpu") -> Calls:
    hidden, weight, bias, ids = head_inputs(batch, length, device)
    hidden, weight, bias = (x.detach() for x in (hidden, weight, bias))
    offsets, flat = offsets_from_lengths(torch.full((batch,), length, device=device)), ids.flatten().int()
    return {
        "m3kernels": lambda: sparse_embed(hidden.flatten(0, 1), weight, bias, flat, offsets, peers.UNUSED_IDS),
        "FlagEmbedding inference": lambda: peers.flag_inference_head(hidden, weight, bias, ids, VOCABULARY),
    }


def head_training(batch: int, length: int, *, with_official: bool, device: str = "cpu") -> Calls:
    hidden, weight, bias, ids = head_inputs(batch, length, device)
    leaves = [hidden, weight, bias]
    offsets, flat = offsets_from_lengths(torch.full((batch,), length, device=device)), ids.flatten().int()

    def ours() -> Tensor:
        return sparse_embed(hidden.flatten(0, 1), weight, bias, flat, offsets, peers.UNUSED_IDS).weights

    calls: Calls = {"m3kernels": _forward_backward(ours, leaves)}
    if with_official:
        official = lambda: peers.flag_training_head(hidden, weight, bias, ids, VOCABULARY)  # noqa: E731
        calls["FlagEmbedding training"] = _forward_backward(official, leaves)
    return calls


def text_batches(queries: int, passages: int) -> tuple[SparseBatch, SparseBatch]:
    """Two batches of real text, or of random ids that grow rare like words where there is no text."""
    if not sparse_texts.available():
        generator = torch.Generator().manual_seed(1)
        dicts = [
            {int(250_000 * x**4) + 4: float(w) for x, w in zip(*torch.rand(2, 48, generator=generator).tolist())}
            for _ in range(queries + passages)
        ]
        return SparseBatch.from_dicts(dicts[:queries]), SparseBatch.from_dicts(dicts[queries:])
    all_passages, all_queries = sparse_texts.collection(queries)
    end = int(all_passages.offsets[passages])
    return all_queries, SparseBatch(
        all_passages.token_ids[:end], all_passages.weights[:end], all_passages.offsets[: passages + 1]
    )


def pair_scores(queries: int, passages: int, device: str = "cpu") -> Calls:
    left, right = text_batches(queries, passages)
    dense_left, dense_right = (torch.from_numpy(side.to_scipy(VOCABULARY).toarray()) for side in (left, right))
    csr_left, csr_right = left.to_scipy(VOCABULARY), right.to_scipy(VOCABULARY).T.tocsr()
    dict_left, dict_right = left.to_flag_embedding(), right.to_flag_embedding()
    left, right = (SparseBatch(*(x.to(device) for x in side)) for side in (left, right))
    dense_left, dense_right = dense_left.to(device), dense_right.to(device)
    return {
        "m3kernels": lambda: sparse_scores(left, right),
        "dense product": lambda: dense_left @ dense_right.T,
        "scipy CSR": lambda: (csr_left @ csr_right).toarray(),
        "dictionaries": lambda: peers.dictionary_scores(dict_left, dict_right),
    }


def pair_scores_training(queries: int, passages: int) -> Calls:
    left, right = text_batches(queries, passages)
    for side in (left, right):
        side.weights.requires_grad_()
    dense = [torch.from_numpy(side.to_scipy(VOCABULARY).toarray()).requires_grad_() for side in (left, right)]
    return {
        "m3kernels": _forward_backward(lambda: sparse_scores(left, right), [left.weights, right.weights]),
        "dense product": _forward_backward(lambda: dense[0] @ dense[1].T, dense),
    }


def retrieval(queries: SparseBatch, passages: SparseBatch, k: int) -> dict[str, peers.Search]:
    """Single-threaded searches, one query a call; needs bmp and pyseismic-lsr."""
    index = SparseIndex.build(passages)
    bounds = queries.offsets.tolist()

    def ours(i: int) -> Any:
        part = slice(bounds[i], bounds[i + 1])
        offsets = torch.tensor([0, bounds[i + 1] - bounds[i]], dtype=torch.int32)
        one = SparseBatch(queries.token_ids[part], queries.weights[part], offsets)
        return index.search(one, k).scores[0].numpy()

    return {
        "m3kernels": ours,
        "scipy CSR": peers.scipy_search(passages, queries, VOCABULARY, k),
        "bm25s-style arrays": peers.arrays_search(passages, queries, VOCABULARY, k),
        "bmp": peers.bmp_search(passages, queries, k),
        "pyseismic-lsr": peers.seismic_search(passages, queries, k),
    }
