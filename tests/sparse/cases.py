"""Random ragged inputs for the sparse tests, and the sparse head written with dictionaries in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from m3kernels import SparseBatch, offsets_from_lengths
from m3kernels.sparse.batch import NO_ID

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EDGE_IDS = (0, 1, 5, 250_001, NO_ID - 1)


@dataclass(frozen=True)
class Texts:
    """Token ids of several texts; few distinct ids, so that they repeat."""

    token_ids: Tensor
    offsets: Tensor
    ignored_ids: tuple[int, ...]
    seed: int

    @property
    def rows(self) -> int:
        return self.token_ids.shape[0]

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers, whose products and sums are exact in every dtype here: results must be equal, not close."""
        return torch.randint(low, high + 1, shape, generator=self.generator()).double()


@st.composite
def texts(draw: st.DrawFn, longest: int = 40) -> Texts:
    lengths = draw(st.lists(st.integers(0, longest), min_size=0, max_size=5))
    seed = draw(st.integers(0, 2**31))
    alphabet = draw(st.lists(st.one_of(st.sampled_from(EDGE_IDS), st.integers(0, NO_ID - 1)), min_size=1, max_size=12))
    ignored = draw(st.lists(st.one_of(st.sampled_from(alphabet), st.just(77)), max_size=3))
    picks = torch.randint(0, len(alphabet), (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    ids = torch.tensor(alphabet, dtype=torch.int32)[picks]
    return Texts(ids, offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64)), tuple(ignored), seed)


def pooled(token_weights: Tensor, token_ids: Tensor, offsets: Tensor, ignored_ids: tuple[int, ...]) -> list[dict]:
    """{id: (weight, row)} of each text: the meaning of sparse_pool, in a loop."""
    result = []
    for begin, end in zip(offsets.tolist(), offsets.tolist()[1:]):
        best: dict[int, tuple[float, int]] = {}
        for row in range(begin, end):
            token, weight = int(token_ids[row]), float(token_weights[row])
            if token in ignored_ids or weight <= 0:
                continue
            held = best.get(token)
            if held is None or weight > held[0] or (math.isnan(weight) and not math.isnan(held[0])):
                best[token] = (weight, row)
        result.append(dict(sorted(best.items())))
    return result


def entries(batch: SparseBatch) -> list[list[tuple[int, float]]]:
    return [list(text.items()) for text in batch.to_dicts()]
