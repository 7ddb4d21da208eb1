"""BGEM3FlagModel: the inference interface of FlagEmbedding 1.4.2 for M3, with its names and results.

    from m3model.compat.flag_embedding import BGEM3FlagModel
    model = BGEM3FlagModel("BAAI/bge-m3")
    model.encode(["..."], return_sparse=True, return_colbert_vecs=True)
    # {"dense_vecs": [n, E], "lexical_weights": [{"token id": weight}], "colbert_vecs": [[tokens - 1, E], ...]}

What is different, on purpose: a folder without heads is an error, not a model with random heads; texts that are cut are
reported by a warning; weights are not rounded to float16 on a CPU; `lexical_weights` hold Python floats (JSON writes
them); scores do not depend on which other texts share a batch, unless `padding_as_zero=True` asks for it; an empty list
of texts is encoded to empty results; several devices are served by threads, so there are no process pools to manage.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from m3kernels import SparseBatch, maxsim, maxsim_pairs, sparse_scores
from m3model.config import Pooling
from m3model.embeddings import EncodedTexts, M3Embeddings
from m3model.encoding import DEFAULT_BATCH_TOKENS
from m3model.model import M3Model, Role
from m3model.scoring import check_weights, combine, score_embeddings
from m3model.tokenizer import TextTokenizer, check_texts

__all__ = ["BGEM3FlagModel"]

Weights = Mapping[str, float]
Pair = tuple[str, str]
_SCORE_NAMES = {
    "colbert": "multi_vector",
    "sparse": "sparse",
    "dense": "dense",
    "sparse+dense": "dense+sparse",
    "colbert+sparse+dense": "all",
}


class Encoded(TypedDict):
    """Result of `encode`; what was not asked for is None, and a single text gives the unlisted forms."""

    dense_vecs: NDArray[Any] | None
    lexical_weights: Any
    colbert_vecs: Any


class BGEM3FlagModel:
    """M3 with FlagEmbedding's interface; arguments as there, except as said above.

    Args:
        model_name_or_path: folder or hub id.
        use_fp16, use_bf16: dtype of model and results on a GPU (bfloat16 results are float32 arrays); on a CPU float32.
        devices: one device, or several that share the texts; default every GPU, otherwise the CPU.
        pooling_method: "cls" or "mean"; default what the folder says, which is "cls" where it says nothing.
        colbert_dim: width of the multi-vectors, checked against the folder if above 0.
        batch_size: together with the length of the texts bounds the tokens of one forward pass.
        trust_remote_code: accepted; no remote code is ever executed.

    Raises:
        FileNotFoundError, ValueError: as M3Model.from_pretrained; also another pooling method or colbert_dim.
        TypeError: an argument that FlagEmbedding does not have.
    """

    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str],
        normalize_embeddings: bool = True,
        use_fp16: bool = True,
        use_bf16: bool = False,
        query_instruction_for_retrieval: str | None = None,
        query_instruction_format: str = "{}{}",
        devices: str | int | Sequence[str] | Sequence[int] | None = None,
        pooling_method: Pooling | None = None,
        trust_remote_code: bool = False,
        cache_dir: str | None = None,
        colbert_dim: int = -1,
        batch_size: int = 256,
        query_max_length: int = 512,
        passage_max_length: int = 512,
        return_dense: bool = True,
        return_sparse: bool = False,
        return_colbert_vecs: bool = False,
        truncate_dim: int | None = None,
        *,
        passage_instruction_for_retrieval: str | None = None,
        passage_instruction_format: str = "{}{}",
    ) -> None:
        self.target_devices = _devices(devices)
        half = torch.bfloat16 if use_bf16 else torch.float16 if use_fp16 else torch.float32
        self.models = [
            M3Model.from_pretrained(
                model_name_or_path,
                dtype=torch.float32 if device == "cpu" else half,
                device=device,
                cache_dir=cache_dir,
            )
            for device in self.target_devices
        ]
        config = self.models[0].config
        if pooling_method not in (None, "cls", "mean"):
            raise ValueError(f"pooling_method is {pooling_method!r}; accepted: cls, mean")
        if colbert_dim > 0 and colbert_dim != config.multi_vector_dim:
            raise ValueError(f"colbert_dim is {colbert_dim}, but the folder's head makes {config.multi_vector_dim}")
        if truncate_dim is not None and not 1 <= truncate_dim <= min(config.hidden_size, config.multi_vector_dim):
            raise ValueError(f"truncate_dim is {truncate_dim}; accepted: 1 to {config.hidden_size}")
        for model in self.models:
            model.normalize = normalize_embeddings
            if pooling_method is not None:
                model.config = replace(model.config, pooling=pooling_method)
        self.normalize_embeddings = normalize_embeddings
        self.truncate_dim = truncate_dim
        self.query_instruction = (query_instruction_for_retrieval, query_instruction_format)
        self.passage_instruction = (passage_instruction_for_retrieval, passage_instruction_format)
        self.batch_size = batch_size
        self.query_max_length = query_max_length
        self.passage_max_length = passage_max_length
        self.wanted = (return_dense, return_sparse, return_colbert_vecs)

    def encode_queries(
        self,
        queries: str | Sequence[str],
        batch_size: int | None = None,
        max_length: int | None = None,
        return_dense: bool | None = None,
        return_sparse: bool | None = None,
        return_colbert_vecs: bool | None = None,
    ) -> Encoded:
        """As `encode`, with the query instruction and query_max_length."""
        wanted = self._wanted(return_dense, return_sparse, return_colbert_vecs)
        limit = self.query_max_length if max_length is None else max_length
        return self._encode(queries, "query", self.query_instruction, batch_size, limit, wanted)

    def encode_corpus(
        self,
        corpus: str | Sequence[str],
        batch_size: int | None = None,
        max_length: int | None = None,
        return_dense: bool | None = None,
        return_sparse: bool | None = None,
        return_colbert_vecs: bool | None = None,
    ) -> Encoded:
        """As `encode`, with the passage instruction."""
        wanted = self._wanted(return_dense, return_sparse, return_colbert_vecs)
        limit = self.passage_max_length if max_length is None else max_length
        return self._encode(corpus, "passage", self.passage_instruction, batch_size, limit, wanted)

    def encode(
        self,
        sentences: str | Sequence[str],
        batch_size: int | None = None,
        max_length: int | None = None,
        return_dense: bool | None = None,
        return_sparse: bool | None = None,
        return_colbert_vecs: bool | None = None,
        *,
        instruction: str | None = None,
        instruction_format: str = "{}{}",
    ) -> Encoded:
        """Dense vectors, token weights and multi-vectors of texts, in their order.

        Returns:
            "dense_vecs" array [n, E], "lexical_weights" list of {str(token id): weight}, "colbert_vecs" list of arrays
            [tokens - 1, C]; None where not asked for. For a single text: [E], the dictionary, the array.

        Raises:
            TypeError, ValueError: as M3Model.encode.
        """
        wanted = self._wanted(return_dense, return_sparse, return_colbert_vecs)
        limit = self.passage_max_length if max_length is None else max_length
        return self._encode(sentences, "passage", (instruction, instruction_format), batch_size, limit, wanted)

    def compute_score(
        self,
        sentence_pairs: Pair | Sequence[Pair],
        batch_size: int | None = None,
        max_query_length: int | None = None,
        max_passage_length: int | None = None,
        weights_for_different_modes: Sequence[float] | None = None,
        *,
        padding_as_zero: bool = False,
    ) -> dict[str, list[float]] | dict[str, float]:
        """Scores of (query, passage) pairs; each text is encoded once, however many pairs it is in.

        Args:
            sentence_pairs: one pair or a list of pairs; no instruction is added.
            weights_for_different_modes: of dense, sparse and colbert in the sums; default 1 each.
            padding_as_zero: FlagEmbedding pads the passages of batch_size pairs to equal length and lets the padding
                score 0; with True the colbert score is the same, and depends on the batch as there.

        Returns:
            Under "colbert", "sparse", "dense", "sparse+dense" and "colbert+sparse+dense" a list of floats, or one float
            for a single pair.

        Raises:
            TypeError, ValueError: pairs that are none, weights that are not three numbers of at least 0.
        """
        single = len(sentence_pairs) == 2 and isinstance(sentence_pairs[0], str)
        pairs: list[Any] = [sentence_pairs] if single else list(sentence_pairs)
        for number, pair in enumerate(pairs):
            if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise TypeError(f"sentence_pairs[{number}] is {pair!r:.80}; accepted: a pair of two strings")
        weights = [1.0, 1.0, 1.0] if weights_for_different_modes is None else list(weights_for_different_modes)
        check_weights(weights)
        every = (True, True, True)
        texts = [list(dict.fromkeys(pair[side] for pair in pairs)) for side in (0, 1)]
        limit = self.query_max_length if max_query_length is None else max_query_length
        queries = self._embeddings(texts[0], "query", batch_size, limit, every)
        limit = self.passage_max_length if max_passage_length is None else max_passage_length
        passages = self._embeddings(texts[1], "passage", batch_size, limit, every)
        places = [{text: place for place, text in enumerate(side)} for side in texts]
        rows = [[places[0][pair[0]], places[1][pair[1]]] for pair in pairs]
        listed = torch.tensor(rows, dtype=torch.int32).reshape(-1, 2)
        scores = score_embeddings(queries, passages, weights=weights, pairs=listed)
        if padding_as_zero:
            size = self.batch_size if batch_size is None else batch_size
            scores = combine(scores | {"multi_vector": _padded_maxsim(queries, passages, listed, size)}, weights)
        named = {name: scores[ours].tolist() for name, ours in _SCORE_NAMES.items()}
        return {name: values[0] for name, values in named.items()} if single else named

    def compute_lexical_matching_score(
        self, lexical_weights_1: Weights | Sequence[Weights], lexical_weights_2: Weights | Sequence[Weights]
    ) -> float | NDArray[np.float32]:
        """Sum over shared tokens of the products of their weights: a float, or an array [n1, n2] for two lists.

        Raises:
            ValueError: one is a dictionary and the other a list.
        """
        single = isinstance(lexical_weights_1, Mapping)
        if single != isinstance(lexical_weights_2, Mapping):
            raise ValueError("lexical_weights_1 and lexical_weights_2 must both be dictionaries or both be lists")
        sides: list[Any] = [[side] if single else side for side in (lexical_weights_1, lexical_weights_2)]
        number_of: dict[str, int] = {}
        batches = []
        for side in sides:
            numbered = [
                {number_of.setdefault(token, len(number_of)): float(weight) for token, weight in entries.items()}
                for entries in side
            ]
            batches.append(SparseBatch.from_dicts(numbered))
        scores: NDArray[np.float32] = sparse_scores(*batches).numpy()
        return float(scores[0, 0]) if single else scores

    def colbert_score(self, q_reps: NDArray[Any], p_reps: NDArray[Any]) -> torch.Tensor:
        """Late-interaction score of a query's and a passage's multi-vectors [n, C], as a tensor without dimensions."""
        sides = [torch.from_numpy(np.ascontiguousarray(rows)) for rows in (q_reps, p_reps)]
        offsets = [torch.tensor([0, len(rows)], dtype=torch.int32) for rows in sides]
        return maxsim(sides[0], sides[1], offsets[0], offsets[1])[0, 0]

    def convert_id_to_token(
        self, lexical_weights: Weights | Sequence[Weights]
    ) -> dict[str, float] | list[dict[str, float]]:
        """The dictionaries of `encode` with decoded tokens for ids; one dictionary if there is only one.

        Where two tokens decode to the same text ("▁the" and "the"), both stand as pieces of the vocabulary.
        """
        listed: Sequence[Weights] = [lexical_weights] if isinstance(lexical_weights, Mapping) else lexical_weights
        converted = []
        for entries in listed:
            texts = {token: self._tokenizer.decode(int(token)) for token in entries}
            seen = Counter(texts.values())
            converted.append(
                {
                    texts[token] if seen[texts[token]] == 1 else self._tokenizer.token(int(token)): float(weight)
                    for token, weight in entries.items()
                }
            )
        return converted[0] if len(converted) == 1 else converted

    @property
    def _tokenizer(self) -> TextTokenizer:
        tokenizer = self.models[0].tokenizer
        assert tokenizer is not None
        return tokenizer

    def _wanted(self, *given: bool | None) -> tuple[bool, bool, bool]:
        dense, sparse, multi_vector = (
            bool(default if value is None else value) for value, default in zip(given, self.wanted)
        )
        return dense, sparse, multi_vector

    def _encode(
        self,
        texts: str | Sequence[str],
        role: Role,
        instruction: tuple[str | None, str],
        batch_size: int | None,
        max_length: int,
        wanted: tuple[bool, bool, bool],
    ) -> Encoded:
        single = isinstance(texts, str)
        listed: Sequence[str] = [texts] if isinstance(texts, str) else texts
        check_texts(listed)
        words, pattern = instruction
        if words is not None:
            pattern = pattern.replace("\\n", "\n")
            listed = [pattern.format(words, text) for text in listed]
        if not any(wanted):
            return {"dense_vecs": None, "lexical_weights": None, "colbert_vecs": None}
        out = self._embeddings(listed, role, batch_size, max_length, wanted)
        dense, lexical, colbert = _dense(self, out), _lexical(out), _colbert(self, out)
        if single:
            return {
                "dense_vecs": None if dense is None else dense[0],
                "lexical_weights": None if lexical is None else lexical[0],
                "colbert_vecs": None if colbert is None else colbert[0],
            }
        return {"dense_vecs": dense, "lexical_weights": lexical, "colbert_vecs": colbert}

    def _embeddings(
        self,
        texts: Sequence[str],
        role: Role,
        batch_size: int | None,
        max_length: int,
        wanted: tuple[bool, bool, bool],
    ) -> EncodedTexts:
        """Embeddings of all texts; with several devices each takes every n-th of the texts sorted by length."""
        size = self.batch_size if batch_size is None else batch_size
        if size < 1:
            raise ValueError(f"batch_size is {size}; accepted: at least 1")

        def on(model: M3Model, share: Sequence[str]) -> EncodedTexts:
            usual = DEFAULT_BATCH_TOKENS[model.device.type]
            return model.encode(
                share,
                dense=wanted[0],
                sparse=wanted[1],
                multi_vector=wanted[2],
                max_length=max_length,
                batch_tokens=min(usual, size * max_length),
                role=role,
                multi_vector_dtype=torch.float16 if model.dtype == torch.float16 else torch.float32,
            )

        if len(self.models) == 1 or len(texts) < len(self.models):
            return on(self.models[0], texts)
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        shares = [order[first :: len(self.models)] for first in range(len(self.models))]
        with ThreadPoolExecutor(len(self.models)) as threads:
            parts = list(threads.map(on, self.models, [[texts[number] for number in share] for share in shares]))
        dealt = [number for share in shares for number in share]
        return M3Embeddings.concatenate(parts).select(np.argsort(dealt).tolist())


def _devices(devices: str | int | Sequence[str] | Sequence[int] | None) -> list[str]:
    if devices is None:
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]
    listed: list[str | int] = [devices] if isinstance(devices, (str, int)) else list(devices)
    if not listed:
        raise ValueError("devices is empty; accepted: a device such as 'cpu', 'cuda:0' or 0, or a list of them")
    return [f"cuda:{device}" if isinstance(device, int) else device for device in listed]


def _dense(model: BGEM3FlagModel, out: EncodedTexts) -> NDArray[Any] | None:
    if out.dense is None:
        return None
    cut = _truncated(out.dense, model)
    return cut.astype(np.float16) if model.models[0].dtype == torch.float16 else cut


def _lexical(out: EncodedTexts) -> list[dict[str, float]] | None:
    if out.sparse is None:
        return None
    return [{str(token): weight for token, weight in entries.items()} for entries in out.sparse.to_dicts()]


def _colbert(model: BGEM3FlagModel, out: EncodedTexts) -> list[NDArray[Any]] | None:
    """An array of its own for each text, so that keeping one keeps no other alive."""
    if out.multi_vector is None:
        return None
    bounds = out.multi_vector.offsets.tolist()
    rows = out.multi_vector.rows.numpy()
    return [_truncated(rows[begin:end], model).copy() for begin, end in zip(bounds, bounds[1:])]


def _truncated(rows: NDArray[Any], model: BGEM3FlagModel) -> NDArray[Any]:
    """The first truncate_dim numbers of each row, of unit length again."""
    if model.truncate_dim is None:
        return rows
    cut = rows[:, : model.truncate_dim]
    if not model.normalize_embeddings:
        return cut
    lengths = np.linalg.norm(cut.astype(np.float32), axis=1, keepdims=True)
    unit: NDArray[Any] = (cut / np.maximum(lengths, 1e-12)).astype(rows.dtype)
    return unit


def _padded_maxsim(queries: EncodedTexts, passages: EncodedTexts, pairs: torch.Tensor, size: int) -> torch.Tensor:
    """Multi-vector scores with a zero vector in every passage that is shorter than the longest of its `size` pairs."""
    assert queries.multi_vector is not None and passages.multi_vector is not None
    rows = (queries.multi_vector.rows, passages.multi_vector.rows)
    offsets = (queries.multi_vector.offsets, passages.multi_vector.offsets)
    lengths = offsets[1].diff()
    scores = []
    for chunk in pairs.split(size):
        longest = lengths[chunk[:, 1].long()].max()
        scores.append(maxsim_pairs(*rows, *offsets, chunk, zero_floor=lengths < longest))
    return torch.cat(scores) if scores else torch.zeros(0)
