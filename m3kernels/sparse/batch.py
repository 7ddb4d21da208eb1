"""SparseBatch: the token weights of several texts, sorted by id within each text, in packed rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from m3kernels.packing import offsets_from_lengths

if TYPE_CHECKING:
    from scipy.sparse import csr_array, sparray, spmatrix

NO_ID = 2**31 - 1
"""Id of the unused entries past the last one of a SparseBatch."""


class SparseBatch(NamedTuple):
    """Sparse (lexical) vectors of N texts.

    token_ids: int32 [C], strictly increasing within a text; entries past offsets[N] hold the largest int32.
    weights: [C] floating, above 0; entries past offsets[N] are 0.
    offsets: int32 [N + 1]; text i owns entries offsets[i]:offsets[i + 1]. Capacity C may exceed offsets[N].
    """

    token_ids: Tensor
    weights: Tensor
    offsets: Tensor

    def compact(self) -> SparseBatch:
        """The same vectors with C = offsets[N] (reads that number, so the host waits for a GPU)."""
        count = int(self.offsets[-1])
        return SparseBatch(self.token_ids[:count], self.weights[:count], self.offsets)

    def to_dicts(self) -> list[dict[int, float]]:
        """One {token id: weight} for each text, the format of a Milvus sparse vector."""
        bounds = self.offsets.tolist()
        ids = self.token_ids[: bounds[-1]].tolist()
        weights = self.weights.detach()[: bounds[-1]].tolist()
        return [dict(zip(ids[begin:end], weights[begin:end])) for begin, end in zip(bounds, bounds[1:])]

    def to_scipy(self, vocabulary: int) -> csr_array:
        """A scipy CSR array [N, vocabulary] of float32 weights.

        Raises:
            ValueError: a token id is not below `vocabulary`.
        """
        from scipy.sparse import csr_array

        batch = self.compact()
        ids = batch.token_ids.cpu().numpy()
        if ids.size and int(ids.max()) >= vocabulary:
            raise ValueError(f"vocabulary is {vocabulary}, but token id {int(ids.max())} occurs")
        weights = batch.weights.detach().float().cpu().numpy()
        return csr_array((weights, ids, batch.offsets.cpu().numpy()), shape=(len(batch.offsets) - 1, vocabulary))

    @staticmethod
    def from_scipy(matrix: sparray | spmatrix) -> SparseBatch:
        """From a scipy sparse matrix [N, vocabulary], one row a text; entries that are not above 0 are left out.

        Weights become float32; repeated entries are added up, as scipy means them.

        Raises:
            ValueError: more columns than int32 ids can number.
        """
        if matrix.shape[1] > NO_ID:
            raise ValueError(f"matrix has {matrix.shape[1]} columns; accepted: at most {NO_ID}")
        rows = matrix.tocsr(copy=True)
        rows.sum_duplicates()
        kept = ~(rows.data <= 0)
        counts = np.concatenate([[0], np.cumsum(kept)])
        return SparseBatch(
            torch.from_numpy(rows.indices[kept].astype(np.int32)),
            torch.from_numpy(rows.data[kept].astype(np.float32)),
            torch.from_numpy(counts[rows.indptr].astype(np.int32)),
        )

    def to_flag_embedding(self) -> list[dict[str, float]]:
        """FlagEmbedding's `lexical_weights`: one {str(token id): weight} for each text, in plain floats."""
        return [{str(token): weight for token, weight in entries.items()} for entries in self.to_dicts()]

    @staticmethod
    def from_dicts(dicts: Sequence[Mapping[int, float] | Mapping[str, float]]) -> SparseBatch:
        """From {token id: weight} for each text: integer ids (Milvus) or strings (FlagEmbedding's `lexical_weights`).

        Weights become float32; entries that are not above 0 are left out.

        Raises:
            ValueError: an id is not a whole number from 0 to 2**31 - 2, or occurs twice (as 7 and as "7").
        """
        ids: list[int] = []
        weights: list[float] = []
        lengths = []
        for row, entries in enumerate(dicts):
            pairs = sorted((_token_id(key, row), float(weight)) for key, weight in entries.items() if not weight <= 0)
            for (token, _), (following, _) in zip(pairs, pairs[1:]):
                if token == following:
                    raise ValueError(f"dicts[{row}] has the token id {token} twice")
            ids += [token for token, _ in pairs]
            weights += [weight for _, weight in pairs]
            lengths.append(len(pairs))
        return SparseBatch(
            torch.tensor(ids, dtype=torch.int32),
            torch.tensor(weights, dtype=torch.float32),
            offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64)),
        )


def _token_id(key: int | str, row: int) -> int:
    try:
        token = int(key)
    except (TypeError, ValueError):
        token = -1
    if not 0 <= token < NO_ID or (not isinstance(key, str) and token != key):
        raise ValueError(f"dicts[{row}] has the token id {key!r}; accepted: whole numbers from 0 to {NO_ID - 1}")
    return token
