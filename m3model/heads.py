"""The three heads of M3 over packed hidden states [T, E] (paper section 3.2, arXiv 2402.03216).

dense         normalize(h[first row])  or  normalize(mean of the rows)             [N, E]
token weight  max over equal ids of relu(w · h + b)                                SparseBatch
multi-vector  normalize(W h + b) of every row but the first                        [T - N, C]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from m3kernels.packing import sequence_of_row
from m3model.config import Pooling
from m3model.embeddings import MultiVectors

__all__ = ["dense_vectors", "multi_vectors"]


def dense_vectors(hidden: Tensor, offsets: Tensor, pooling: Pooling, *, normalize: bool = True) -> Tensor:
    """[N, E] of unit length in the dtype of `hidden`; every sequence must have at least one row."""
    if pooling == "cls":
        pooled = _wide(hidden[offsets[:-1].long()])
    else:
        rows = _wide(hidden)
        sums = rows.new_zeros((offsets.shape[0] - 1, rows.shape[1]))
        pooled = sums.index_add(0, sequence_of_row(offsets, rows.shape[0]), rows) / offsets.diff()[:, None]
    return (F.normalize(pooled, dim=1) if normalize else pooled).to(hidden.dtype)


def multi_vectors(
    hidden: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, *, normalize: bool = True
) -> MultiVectors:
    """Rows [T - N, C] of unit length; every sequence must have at least one row, whose first is left out.

    The rows kept are found by arithmetic on offsets, so that no count crosses from a GPU to the host.
    """
    sequences = offsets.shape[0] - 1
    kept_offsets = offsets - torch.arange(sequences + 1, dtype=torch.int32, device=offsets.device)
    kept = hidden.shape[0] - sequences
    rows = torch.arange(kept, device=offsets.device) + sequence_of_row(kept_offsets, kept) + 1
    projected = _wide(F.linear(hidden[rows], weight, bias))
    return MultiVectors((F.normalize(projected, dim=1) if normalize else projected).to(hidden.dtype), kept_offsets)


def _wide(x: Tensor) -> Tensor:
    """Sums and lengths are taken in float32 at least: 1e-12, the floor of the length, is 0 in float16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
