"""Late chunking: windows of a document are encoded in their context (Günther et al. 2024, arXiv 2409.04701).

    states h [n, E]   of all tokens of the document; beyond max_length it is read in stretches that share tokens, and a
                      token's state is taken from the stretch in whose middle it lies nearer (their algorithm 2)
    dense             normalize(mean of the window's states)
    token weights     max over equal ids of relu(w · h + b), of the window's tokens
    multi-vectors     normalize(W h + b) of the window's tokens

A word such as "it" or a heading far above then counts in every window. Special tokens and the passage prefix are read
but belong to no window. A document of one window is encoded as any text. The mean is not how a model that pools by its
first token (bge-m3) was trained: its token weights and multi-vectors gain context, but measure its dense vectors first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3kernels import SparseBatch, offsets_from_lengths
from m3model.embeddings import EncodedTexts, M3Embeddings, MultiVectors
from m3model.encoding import DEFAULT_BATCH_TOKENS, evaluating, filled_batches, pack_ids
from m3model.heads import dense_vectors

if TYPE_CHECKING:
    from m3model.model import M3Model

__all__ = ["encode_late"]

_SHARED = 8
"""Neighbouring stretches share one token in so many."""


def encode_late(
    model: M3Model,
    texts: Sequence[str],
    spans: Sequence[Sequence[tuple[int, int]]],
    *,
    dense: bool = True,
    sparse: bool = True,
    multi_vector: bool = True,
    max_length: int = 8192,
    batch_tokens: int | None = None,
    multi_vector_dtype: torch.dtype = torch.float32,
) -> EncodedTexts:
    """The representations of windows of documents, document by document.

    Args:
        texts: whole documents of any length.
        spans: begin and end in characters of the windows of each document, such as those of `chunks`.
        max_length: tokens that the encoder reads at a time, never more than the model's own.
        Others as M3Model.encode.

    Raises:
        ValueError: numbers of texts and spans differ, a document has no window, a window lies outside its document;
            otherwise as M3Model.encode.
    """
    if len(texts) != len(spans) or not all(spans):
        raise ValueError(f"{len(texts)} texts and {len(spans)} lists of spans; accepted: at least one span for each")
    for text, own in zip(texts, spans):
        if outside := [span for span in own if not 0 <= span[0] <= span[1] <= len(text)]:
            raise ValueError(f"the window {outside[0]} lies outside its document of {len(text)} characters")
    options: dict[str, Any] = {
        "dense": dense,
        "sparse": sparse,
        "multi_vector": multi_vector,
        "multi_vector_dtype": multi_vector_dtype,
    }
    limit = DEFAULT_BATCH_TOKENS[model.device.type] if batch_tokens is None else batch_tokens
    whole = [number for number, text in enumerate(texts) if list(spans[number]) == [(0, len(text))]]
    alone = model.encode([texts[number] for number in whole], max_length=max_length, batch_tokens=limit, **options)
    place = {number: row for row, number in enumerate(whole)}
    parts = []
    for number, (text, own) in enumerate(zip(texts, spans)):
        if number in place:
            parts.append(alone.select([place[number]]))
        else:
            with evaluating(model), torch.no_grad():
                states = _states(model, text, max_length, limit)
                parts.append(_windows(model, states, own, len(text), **options))
    return M3Embeddings.concatenate(parts) if parts else alone


class _States(NamedTuple):
    """Of the cls token and then all tokens of a document: states [1 + n, E], ids int32 [1 + n]; and where the tokens
    begin, int64 [n]."""

    hidden: Tensor
    ids: Tensor
    begins: NDArray[np.int64]


def _states(model: M3Model, text: str, max_length: int, batch_tokens: int) -> _States:
    tokenizer, limit, prefix = model.tokenization(max_length, "passage")
    pieces = tokenizer.pieces(prefix + text)
    lead = int((pieces.ends <= len(prefix)).sum()) if prefix else 0
    ids, begins = pieces.ids[lead:], np.maximum(pieces.begins[lead:] - len(prefix), 0)
    room = limit - tokenizer.overhead - lead
    if room < 2:
        raise ValueError(f"max_length is {max_length}; accepted: room for two tokens beside special ones and prefix")
    starts, stops, owned = _stretches(len(ids), room)
    rows = [tokenizer.enclosed([*pieces.ids[:lead], *ids[start:stop]]) for start, stop in zip(starts, stops)]
    first = tokenizer.leading + lead
    kept: list[Tensor] = []
    for group in filled_batches(range(len(rows)), [len(row) for row in rows], batch_tokens):
        packed, offsets = pack_ids([rows[number] for number in group])
        longest = max(len(rows[number]) for number in group)
        hidden = model.backbone(packed.to(model.device), offsets.to(model.device), longest)
        for number, begin in zip(group, offsets.tolist()):
            if number == 0:
                kept.append(hidden[begin : begin + 1])
            shift = begin + first - starts[number]
            kept.append(hidden[shift + owned[number] : shift + owned[number + 1]])
    packed_ids = torch.from_numpy(np.concatenate([rows[0][:1], ids])).to(model.device)
    return _States(torch.cat(kept), packed_ids, begins)


def _stretches(count: int, room: int) -> tuple[list[int], list[int], list[int]]:
    """Where stretches of at most `room` of `count` tokens start and stop, and the tokens from which each is used.

    The last one is as long as the others; two neighbours are used up to the middle of what they share.
    """
    if count <= room:
        return [0], [count], [0, count]
    step = room - max(room // _SHARED, 1)
    starts = [*range(0, count - room, step), count - room]
    stops = [start + room for start in starts]
    middles = [(start + stop) // 2 for start, stop in zip(starts[1:], stops)]
    return starts, stops, [0, *middles, count]


def _windows(
    model: M3Model,
    states: _States,
    spans: Sequence[tuple[int, int]],
    characters: int,
    *,
    dense: bool,
    sparse: bool,
    multi_vector: bool,
    multi_vector_dtype: torch.dtype,
) -> EncodedTexts:
    """The representations of the windows of one document; one without a token has the state of the cls token."""
    rows = []
    for begin, end in spans:
        last = len(states.begins) if end == characters else int(np.searchsorted(states.begins, end))
        own = 1 + np.arange(int(np.searchsorted(states.begins, begin)), last)
        rows.append(own if len(own) else np.zeros(1, dtype=np.int64))
    device = states.hidden.device
    pooled = None
    if dense:
        chosen, offsets = _packed(rows, device)
        pooled = dense_vectors(states.hidden[chosen], offsets, "mean", normalize=model.normalize).float().cpu().numpy()
    # The multi-vector head leaves out a text's first row, so each window's first token stands there twice; its weight,
    # a maximum, does not change.
    chosen, offsets = _packed([np.concatenate([own[:1], own]) for own in rows], device)
    lexical = vectors = None
    if sparse or multi_vector:
        out = model.heads(
            states.hidden[chosen], states.ids[chosen], offsets, dense=False, sparse=sparse, multi_vector=multi_vector
        )
        if out.sparse is not None:
            trimmed = out.sparse.compact()
            lexical = SparseBatch(trimmed.token_ids.cpu(), trimmed.weights.float().cpu(), trimmed.offsets.cpu())
        if out.multi_vector is not None:
            own_rows = out.multi_vector.rows.to(multi_vector_dtype).cpu()
            vectors = MultiVectors(own_rows, out.multi_vector.offsets.cpu())
    return M3Embeddings(pooled, lexical, vectors)


def _packed(rows: Sequence[NDArray[np.int64]], device: torch.device) -> tuple[Tensor, Tensor]:
    offsets = offsets_from_lengths(torch.tensor([len(own) for own in rows]))
    return torch.from_numpy(np.concatenate(rows)).to(device), offsets.to(device)
