"""Ragged batches for the tests of late interaction, and the error that a dtype and the length of a sum allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


@dataclass(frozen=True)
class Batch:
    """Rows and offsets of both sides; `zero_floor` marks some passages."""

    queries: Tensor
    passages: Tensor
    query_offsets: Tensor
    passage_offsets: Tensor
    zero_floor: Tensor

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.queries, self.passages, self.query_offsets, self.passage_offsets

    @property
    def argmax_columns(self) -> int:
        return self.passage_offsets.shape[0] - 1

    def to(self, dtype: torch.dtype) -> Batch:
        return Batch(
            self.queries.to(dtype), self.passages.to(dtype), self.query_offsets, self.passage_offsets, self.zero_floor
        )


def ragged_batch(query_lengths: list[int], passage_lengths: list[int], width: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(sum(query_lengths), width, generator=generator)
    passages = torch.randn(sum(passage_lengths), width, generator=generator)
    floor = torch.rand(len(passage_lengths), generator=generator) < 0.5
    return Batch(queries, passages, offsets_of(query_lengths), offsets_of(passage_lengths), floor)


@st.composite
def ragged_batches(draw: Callable[..., object]) -> Batch:
    lengths = st.lists(st.integers(0, 45), min_size=0, max_size=5)
    width = 8 * draw(st.integers(1, 20))
    return ragged_batch(draw(lengths), draw(lengths), width, draw(st.integers(0, 2**16)))  # type: ignore[arg-type,operator]


def similarity_bound(batch: Batch) -> float:
    """Largest error of a float32 similarity: width roundings of partial sums of at most Σ |q_e p_e| (Higham, 3.1)."""
    if not batch.queries.numel() or not batch.passages.numel():
        return 0.0
    absolute = batch.queries.double().abs() @ batch.passages.double().abs().T
    return float((batch.queries.shape[1] + 2) * torch.finfo(torch.float32).eps / 2 * absolute.max())
