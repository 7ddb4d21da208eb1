"""Random embeddings of documents, with ties, empty sparse vectors and texts of one token."""

from __future__ import annotations

import numpy as np
import torch

from m3kernels import SparseBatch
from m3model import EncodedTexts, M3Embeddings, MultiVectors


def random_embeddings(
    count: int, seed: int, *, width: int = 32, row_width: int | None = 16, vocabulary: int = 60
) -> EncodedTexts:
    generator = np.random.default_rng(seed)
    dense = generator.standard_normal((count, width)).astype(np.float32)
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    lexical = [
        {
            int(token): float(generator.random()) + 0.01
            for token in generator.choice(vocabulary, int(size), replace=False)
        }
        for size in generator.integers(0, 12, count)
    ]
    rows = None
    if row_width is not None:
        lengths = generator.integers(1, 9, count)
        values = generator.standard_normal((int(lengths.sum()), row_width)).astype(np.float32)
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        offsets = torch.zeros(count + 1, dtype=torch.int32)
        offsets[1:] = torch.from_numpy(lengths.cumsum())
        rows = MultiVectors(torch.from_numpy(values).half(), offsets)
    return M3Embeddings(dense, SparseBatch.from_dicts(lexical), rows)
