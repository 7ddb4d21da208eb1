"""Shapes of the late-interaction benchmarks and their random rows; imports nothing of this project, for any peer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Queries of equally many rows against passages of `passage_lengths`."""

    queries: int
    query_rows: int
    passage_lengths: tuple[int, ...]
    width: int
    training: bool = False
    device: str = "cpu"

    @property
    def flops(self) -> float:
        """Of the similarities; training is counted with them alone, whatever its backward does."""
        return 2.0 * self.queries * self.query_rows * sum(self.passage_lengths) * self.width

    def rows(self) -> tuple[Tensor, Tensor]:
        """Unit rows [Nq, Lq, E] and packed unit rows [Tp, E]."""
        generator = torch.Generator().manual_seed(0)
        queries = torch.randn(self.queries, self.query_rows, self.width, generator=generator)
        passages = torch.randn(sum(self.passage_lengths), self.width, generator=generator)
        queries, passages = (torch.nn.functional.normalize(x, dim=-1).to(self.device) for x in (queries, passages))
        return queries, passages

    def offsets(self) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([0, *self.passage_lengths])
        query_offsets = torch.arange(self.queries + 1, dtype=torch.int32) * self.query_rows
        return query_offsets.to(self.device), lengths.cumsum(0).to(torch.int32).to(self.device)


def _ragged(count: int, shortest: int, longest: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(1)
    spread = torch.rand(count, generator=generator).mul(torch.tensor(longest / shortest).log()).exp()
    return tuple(int(x) for x in spread * shortest)


CASES = {
    "32 x 1000 x 300, width 128": Case(1, 32, (300,) * 1000, 128),
    "32 x 200 x 300, width 1024": Case(1, 32, (300,) * 200, 1024),
    "32 x 32 x 2048, width 1024": Case(1, 32, (2048,) * 32, 1024),
    "32 x 64 ragged 16-2048, width 1024": Case(1, 32, _ragged(64, 16, 2048), 1024),
    "in-batch 32 queries of 32 x 256 x 128, width 1024": Case(32, 32, (128,) * 256, 1024),
    "training 32 queries of 32 x 256 x 128, width 1024": Case(32, 32, (128,) * 256, 1024, training=True),
}
