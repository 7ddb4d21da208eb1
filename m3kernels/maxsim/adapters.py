"""Late interaction under the names and on the padded tensors of PyLate and FlagEmbedding.

| here | there | result |
| --- | --- | --- |
| `colbert_scores` | pylate.scores.colbert_scores | Σ over query rows, every pair |
| `colbert_scores_pairwise` | pylate.scores.colbert_scores_pairwise | Σ over query rows, i with i |
| `colbert_kd_scores` | pylate.scores.colbert_kd_scores | Σ over query rows, each query with its own documents |
| `colbert_score` | BGEM3FlagModel.colbert_score | mean over query rows, one pair |

Masks are taken row by row: any pattern of kept rows is packed, nothing is guessed from their number. PyLate multiplies
similarities by the mask, so that a masked document row counts as similarity 0 in the maximum; that is the default here,
for the documents that have a masked row. `masked_as_zero=False` leaves masked rows out of the maximum instead, as they
would be without padding. The two differ where all similarities of a query row are negative. A masked query row adds
nothing in either. Scores are float32 for bfloat16 and float16 rows too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3kernels.maxsim import maxsim, maxsim_pairs
from m3kernels.packing import offsets_from_lengths

__all__ = ["colbert_kd_scores", "colbert_score", "colbert_scores", "colbert_scores_pairwise"]

Embeddings = Tensor | NDArray[np.floating] | Sequence[Tensor] | Sequence[NDArray[np.floating]]


def colbert_scores(
    queries_embeddings: Embeddings,
    documents_embeddings: Embeddings,
    queries_mask: Tensor | None = None,
    documents_mask: Tensor | None = None,
    backend: str | None = None,
    *,
    masked_as_zero: bool = True,
) -> Tensor:
    """ColBERT scores of every query with every document: [Nq, Nd], Σ_i max_j q_i · d_j.

    Args:
        queries_embeddings: [Nq, Lq, E] or a list of [Lq, E]. documents_embeddings: [Nd, Ld, E] or a list of [Ld, E].
        queries_mask: [Nq, Lq], documents_mask: [Nd, Ld]; 0 or False is masked, 1 or True is kept.
        backend: "auto", "torch" or None; accepted for compatibility, there is one implementation.
        masked_as_zero: see the module.

    Raises:
        TypeError, ValueError: shapes or masks are not as described, or a backend of PyLate's that is not this one.
    """
    _check_backend(backend)
    queries = _Packed("queries", _stack("queries_embeddings", queries_embeddings, 3), queries_mask)
    documents = _Packed("documents", _stack("documents_embeddings", documents_embeddings, 3), documents_mask)
    return maxsim(
        queries.rows,
        documents.rows,
        queries.offsets,
        documents.offsets,
        reduce="sum",
        zero_floor=documents.has_masked if masked_as_zero else False,
    )


def colbert_scores_pairwise(
    queries_embeddings: Embeddings, documents_embeddings: Embeddings, backend: str | None = None
) -> Tensor:
    """ColBERT score of query i with document i: [N]. Lists may hold texts of different lengths.

    Raises:
        TypeError, ValueError: as `colbert_scores`; also different numbers of queries and documents.
    """
    _check_backend(backend)
    queries, documents = _PackedTexts("queries", queries_embeddings), _PackedTexts("documents", documents_embeddings)
    if queries.count != documents.count:
        raise ValueError(f"documents_embeddings has {documents.count} texts, but there are {queries.count} queries")
    numbers = torch.arange(queries.count, dtype=torch.int32, device=queries.rows.device)
    pairs = torch.stack([numbers, numbers], 1)
    return maxsim_pairs(queries.rows, documents.rows, queries.offsets, documents.offsets, pairs, reduce="sum")


def colbert_kd_scores(
    queries_embeddings: Embeddings,
    documents_embeddings: Tensor | NDArray[np.floating],
    queries_mask: Tensor | None = None,
    documents_mask: Tensor | None = None,
    backend: str | None = None,
    *,
    masked_as_zero: bool = True,
) -> Tensor:
    """ColBERT scores of each query with its own candidates: [Nq, K].

    Args:
        queries_embeddings: [Nq, Lq, E]. documents_embeddings: [Nq, K, Ld, E].
        queries_mask: [Nq, Lq]. documents_mask: [Nq, K, Ld]. Otherwise as `colbert_scores`.

    Raises:
        TypeError, ValueError: as `colbert_scores`.
    """
    _check_backend(backend)
    queries = _Packed("queries", _stack("queries_embeddings", queries_embeddings, 3), queries_mask)
    padded = _stack("documents_embeddings", documents_embeddings, 4)
    count, candidates = padded.shape[:2]
    if count != queries.count:
        raise ValueError(f"documents_embeddings has candidates of {count} queries, but there are {queries.count}")
    if documents_mask is not None:
        if documents_mask.shape != padded.shape[:3]:
            raise ValueError(
                f"documents_mask has shape {tuple(documents_mask.shape)}; accepted: {tuple(padded.shape[:3])}"
            )
        documents_mask = documents_mask.flatten(0, 1)
    documents = _Packed("documents", padded.flatten(0, 1), documents_mask)
    numbers = torch.arange(count * candidates, dtype=torch.int32, device=padded.device)
    pairs = torch.stack([numbers.div(max(candidates, 1), rounding_mode="floor"), numbers], 1)
    scores = maxsim_pairs(
        queries.rows,
        documents.rows,
        queries.offsets,
        documents.offsets,
        pairs,
        reduce="sum",
        zero_floor=documents.has_masked if masked_as_zero else False,
    )
    return scores.reshape(count, candidates)


def colbert_score(q_reps: NDArray[np.floating] | Tensor, p_reps: NDArray[np.floating] | Tensor) -> Tensor:
    """FlagEmbedding's score of one query [Lq, E] with a passage [Lp, E]: a scalar, the mean over i of max_j q_i · p_j.

    Raises:
        TypeError, ValueError: no arrays of two dimensions and one width and dtype.
    """
    queries, passages = _PackedTexts("q_reps", [q_reps]), _PackedTexts("p_reps", [p_reps])
    return maxsim(queries.rows, passages.rows, queries.offsets, passages.offsets)[0, 0]


def _check_backend(backend: str | None) -> None:
    if backend not in (None, "auto", "torch"):
        raise ValueError(f"backend is {backend!r}; accepted: None, 'auto', 'torch'")


def _to_tensor(name: str, value: object) -> Tensor:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be tensors or arrays, got {type(value).__name__}")
    return value


def _stack(name: str, value: object, dims: int) -> Tensor:
    """One tensor of `dims` dimensions; a list of equally long texts is stacked."""
    if isinstance(value, list | tuple):
        value = torch.stack([_to_tensor(name, text) for text in value])
    tensor = _to_tensor(name, value)
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(tensor.shape)}")
    return _pad_width(tensor)


def _pad_width(rows: Tensor) -> Tensor:
    """The width made a multiple of 8 by zeros, which change no similarity."""
    missing = -rows.shape[-1] % 8
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows


class _Packed:
    """Kept rows of a padded tensor [N, L, E], with their offsets, and which texts have a masked row (bool [N])."""

    def __init__(self, name: str, padded: Tensor, mask: Tensor | None) -> None:
        self.count, length = padded.shape[:2]
        if mask is None:
            self.rows = padded.flatten(0, 1)
            self.offsets = torch.arange(self.count + 1, dtype=torch.int32, device=padded.device) * length
            self.has_masked = torch.zeros(self.count, dtype=torch.bool, device=padded.device)
            return
        mask = torch.as_tensor(mask, device=padded.device)
        if mask.shape != padded.shape[:2]:
            raise ValueError(f"{name}_mask has shape {tuple(mask.shape)}; accepted: {tuple(padded.shape[:2])}")
        kept = mask.bool()
        if not padded.is_cuda and not torch.equal(kept.to(mask.dtype), mask):
            raise ValueError(f"{name}_mask has values other than 0 and 1")
        # Selecting rows needs their number: the host waits for a GPU here, as it does wherever padding is removed.
        self.rows = padded[kept]
        self.offsets = offsets_from_lengths(kept.sum(1))
        self.has_masked = ~kept.all(1)


class _PackedTexts:
    """Rows of texts [L, E] that may differ in length, or of a tensor [N, L, E], with their offsets."""

    def __init__(self, name: str, texts: object) -> None:
        if not isinstance(texts, list | tuple):
            texts = list(_to_tensor(name, texts))
        tensors = [_to_tensor(name, text) for text in texts]
        if not tensors:
            raise ValueError(f"{name} holds no text")
        for tensor in tensors:
            if tensor.dim() != 2:
                raise ValueError(f"{name} must hold texts of 2 dimensions, got shape {tuple(tensor.shape)}")
        self.count = len(tensors)
        self.rows = _pad_width(torch.cat(tensors))
        lengths = torch.tensor([tensor.shape[0] for tensor in tensors], device=self.rows.device)
        self.offsets = offsets_from_lengths(lengths)
