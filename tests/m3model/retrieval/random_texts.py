"""Random embeddings and their scores computed one pair at a time in float64."""

from __future__ import annotations

import numpy as np
import torch

from m3kernels import SparseBatch, offsets_from_lengths
from m3model import EncodedTexts, M3Embeddings, MultiVectors


def random_texts(
    count: int,
    seed: int,
    *,
    width: int = 8,
    vocabulary: int = 12,
    longest: int = 5,
    steps: int | None = None,
    row_dtype: torch.dtype = torch.float32,
    parts: tuple[str, ...] = ("dense", "sparse", "multi_vector"),
) -> EncodedTexts:
    """Embeddings of `count` texts.

    With `steps`, a power of 2, values are multiples of 1/steps; texts have 0, 1, 2 or 4 rows: every score is exact in
    float32, and many are equal.
    """
    generator = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        drawn = generator.standard_normal(shape)
        return (np.round(drawn * steps) / steps if steps else drawn).astype(np.float32)

    dicts = []
    for _ in range(count):
        ids = generator.choice(vocabulary, generator.integers(0, longest + 1), replace=False)
        dicts.append({int(token): float(weight) for token, weight in zip(ids, np.abs(values(len(ids))) + 0.25)})
    lengths = torch.from_numpy(generator.choice([0, 1, 2, 4], count))
    rows = torch.from_numpy(values(int(lengths.sum()), width)).to(row_dtype)
    everything = {
        "dense": values(count, width),
        "sparse": SparseBatch.from_dicts(dicts),
        "multi_vector": MultiVectors(rows, offsets_from_lengths(lengths)),
    }
    return M3Embeddings(**{part: everything[part] for part in parts})


def pair_scores(queries: EncodedTexts, documents: EncodedTexts) -> dict[str, np.ndarray]:
    """Dense, sparse and multi-vector scores [Nq, Nd], by the definitions."""
    scores = {}
    scores["dense"] = queries.dense.astype(np.float64) @ documents.dense.astype(np.float64).T
    left, right = queries.sparse.to_dicts(), documents.sparse.to_dicts()
    scores["sparse"] = np.array(
        [[sum(weight * d.get(token, 0.0) for token, weight in q.items()) for d in right] for q in left]
    ).reshape(len(left), len(right))
    multi = np.zeros((len(queries), len(documents)))
    for i in range(len(queries)):
        q = queries.select([i]).multi_vector.rows.double()
        for j in range(len(documents)):
            d = documents.select([j]).multi_vector.rows.double()
            if len(q) and len(d):
                multi[i, j] = (q @ d.T).max(1).values.mean()
    scores["multi_vector"] = multi
    return scores
