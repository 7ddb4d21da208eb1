"""Encoding of many texts: groups of equal length in batches of a bounded number of rows, results in the order given.

Texts are taken in blocks of BLOCK. While one block is computed, a thread tokenizes the next; within a block the longest
texts come first. Batches hold no padding, so grouping changes the work of the attention kernel only. On a GPU results
are copied to pinned memory while the following batch is computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from m3kernels import SparseBatch
from m3model.embeddings import EncodedTexts, M3Embeddings, MultiVectors
from m3model.tokenizer import Ids, Role, Tokenized, check_texts, warn_of_cuts

if TYPE_CHECKING:
    from m3model.model import M3Model

__all__ = ["BLOCK", "DEFAULT_BATCH_TOKENS", "encode_texts", "pack_ids", "plan_batches"]

BLOCK = 16384
DEFAULT_BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Rows of one forward pass by device type."""
_ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pack_ids(ids: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Packed int32 ids [T] and offsets [N + 1] of one array for each text."""
    offsets = np.zeros(len(ids) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in ids], out=offsets[1:])
    packed = np.concatenate(ids) if ids else np.zeros(0, dtype=np.int32)
    return torch.from_numpy(packed), torch.from_numpy(offsets)


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Numbers of the texts of each batch, longest first, at most batch_tokens rows unless one text alone has more."""
    batches: list[list[int]] = []
    room = 0
    for number in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        if lengths[number] > room:
            batches.append([])
            room = batch_tokens
        batches[-1].append(number)
        room -= lengths[number]
    return batches


def encode_texts(
    model: M3Model,
    texts: Sequence[str],
    *,
    wanted: tuple[bool, bool, bool],
    max_length: int,
    batch_tokens: int | None,
    progress: bool,
    role: Role,
    multi_vector_dtype: torch.dtype,
) -> EncodedTexts:
    """See M3Model.encode."""
    check_texts(texts)
    if not any(wanted):
        raise ValueError("dense, sparse and multi_vector are all False; accepted: at least one True")
    if multi_vector_dtype not in _ROW_DTYPES:
        raise ValueError(f"multi_vector_dtype is {multi_vector_dtype}; accepted: float32, bfloat16, float16")
    if batch_tokens is None:
        batch_tokens = DEFAULT_BATCH_TOKENS[model.device.type]
    if not isinstance(batch_tokens, int) or batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens!r}; accepted: a whole number of at least 1")
    tokenizer, limit, prefix = model.tokenization(max_length, role)
    blocks = [texts[begin : begin + BLOCK] for begin in range(0, len(texts), BLOCK)] or [texts]
    parts: list[EncodedTexts] = []
    cuts: list[Tokenized] = []
    with _evaluating(model), ThreadPoolExecutor(1) as ahead, _token_bar(len(texts), progress) as advance:
        following = ahead.submit(tokenizer.encode, blocks[0], limit, prefix)
        for number in range(len(blocks)):
            tokenized = following.result()
            if number + 1 < len(blocks):
                following = ahead.submit(tokenizer.encode, blocks[number + 1], limit, prefix)
            block = _Block(model, tokenized.ids, wanted, multi_vector_dtype)
            for batch in plan_batches([len(ids) for ids in tokenized.ids], batch_tokens):
                advance(len(batch), block.compute(batch))
            parts.append(block.finish())
            cuts.append(tokenized._replace(ids=[]))
    warn_of_cuts(cuts, limit, stacklevel=4)
    return parts[0] if len(parts) == 1 else M3Embeddings.concatenate(parts)


class _Block:
    """Results of one block of texts, filled batch by batch.

    On a GPU a batch is fetched after the next one was launched: copies to pinned memory run beside the computation.
    """

    def __init__(self, model: M3Model, ids: list[Ids], wanted: tuple[bool, bool, bool], row_dtype: torch.dtype) -> None:
        self.model = model
        self.ids = ids
        self.wanted = wanted
        self.launched: tuple[list[int], M3Embeddings[Tensor], torch.cuda.Event | None] | None = None
        width = model.config.hidden_size
        self.dense = np.zeros((len(ids), width), dtype=np.float32) if wanted[0] else None
        self.lexical: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(ids) if wanted[1] else []
        self.rows: MultiVectors | None = None
        if wanted[2]:
            offsets = torch.zeros(len(ids) + 1, dtype=torch.int32)
            offsets[1:] = torch.tensor([len(row) - 1 for row in ids], dtype=torch.int64).cumsum(0)
            rows = torch.empty((int(offsets[-1]), model.config.multi_vector_dim), dtype=row_dtype)
            self.rows = MultiVectors(rows, offsets)

    def compute(self, batch: list[int]) -> int:
        """Launch a batch, then fetch the one before; returns the number of its tokens."""
        ids, offsets = pack_ids([self.ids[number] for number in batch])
        longest = len(self.ids[batch[0]])
        device = self.model.device
        with torch.no_grad():
            dense, sparse, multi_vector = self.wanted
            out = self.model(ids.to(device), offsets.to(device), dense, sparse, multi_vector, max_length=longest)
            on_host = M3Embeddings(
                None if out.dense is None else _to_host(out.dense.float()),
                None if out.sparse is None else SparseBatch(*map(_to_host, out.sparse)),
                None if out.multi_vector is None else MultiVectors(*map(_to_host, out.multi_vector)),
            )
        event = None
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        before, self.launched = self.launched, (batch, on_host, event)
        self._store(before)
        return int(offsets[-1])

    def finish(self) -> EncodedTexts:
        """Results of all texts of the block, in their order."""
        self._store(self.launched)
        self.launched = None
        sparse = None
        if self.wanted[1]:
            offsets = torch.zeros(len(self.ids) + 1, dtype=torch.int32)
            offsets[1:] = torch.tensor([len(ids) for ids, _ in self.lexical], dtype=torch.int64).cumsum(0)
            empty = (torch.zeros(0, dtype=torch.int32), torch.zeros(0))
            entries = [*self.lexical, empty]
            sparse = SparseBatch(torch.cat([ids for ids, _ in entries]), torch.cat([w for _, w in entries]), offsets)
        return M3Embeddings(self.dense, sparse, self.rows)

    def _store(self, launched: tuple[list[int], M3Embeddings[Tensor], torch.cuda.Event | None] | None) -> None:
        if launched is None:
            return
        batch, out, event = launched
        if event is not None:
            event.synchronize()
        if self.dense is not None and out.dense is not None:
            self.dense[batch] = out.dense.numpy()
        if out.sparse is not None:
            weights = out.sparse.weights.float()
            bounds = out.sparse.offsets.tolist()
            for number, begin, end in zip(batch, bounds, bounds[1:]):
                self.lexical[number] = (out.sparse.token_ids[begin:end].clone(), weights[begin:end].clone())
        if self.rows is not None and out.multi_vector is not None:
            target = self.rows.offsets
            bounds = out.multi_vector.offsets.tolist()
            for number, begin, end in zip(batch, bounds, bounds[1:]):
                self.rows.rows[target[number] : target[number + 1]] = out.multi_vector.rows[begin:end]


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return pinned.copy_(tensor, non_blocking=True)


@contextmanager
def _evaluating(model: M3Model) -> Iterator[None]:
    """Evaluation mode (no dropout) for the time of the block."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


@contextmanager
def _token_bar(texts: int, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over texts with tokens per second on stderr; yields advance(texts, tokens)."""
    if not shown:
        yield lambda _texts, _tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("encode"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("texts, {task.fields[rate]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("encode", total=texts, rate=0.0)
        begin = time.perf_counter()
        tokens = 0

        def advance(more_texts: int, more_tokens: int) -> None:
            nonlocal tokens
            tokens += more_tokens
            bar.update(task, advance=more_texts, rate=tokens / max(time.perf_counter() - begin, 1e-9))

        yield advance
