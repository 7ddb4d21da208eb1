"""Encoding of many texts: windows of texts, batches of equal token counts, results in the order given.

    texts -> windows of consecutive texts -> token ids (a thread, one window ahead) -> batches, longest texts first

Batches hold no padding, so grouping by length changes the work of the attention kernel only. Nothing outlives its
window but what the caller keeps: a stream of any length needs the memory of about two windows. On a GPU results are
copied to pinned memory while the following batch is computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from m3kernels import SparseBatch
from m3model.embeddings import EncodedTexts, M3Embeddings, MultiVectors
from m3model.tokenizer import Ids, Role, TextTokenizer, Tokenized, check_texts, warn_of_cuts

if TYPE_CHECKING:
    from m3model.model import M3Model

__all__ = [
    "BLOCK",
    "DEFAULT_BATCH_TOKENS",
    "DEFAULT_WINDOW_CHARACTERS",
    "EncodingOptions",
    "encode_texts",
    "encode_windows",
    "evaluating",
    "filled_batches",
    "pack_ids",
    "plan_batches",
    "windows",
]

BLOCK = 16384
"""Most texts of one window."""
DEFAULT_BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Rows of one forward pass by device type."""
DEFAULT_WINDOW_CHARACTERS = {"cpu": 1 << 18, "cuda": 1 << 21}
"""Characters of one window of a stream by device type: some tens of batches."""
_ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Item = TypeVar("Item")


class EncodingOptions(NamedTuple):
    """What is computed of every text, and how; see M3Model.encode."""

    dense: bool = True
    sparse: bool = True
    multi_vector: bool = True
    max_length: int = 8192
    batch_tokens: int | None = None
    role: Role = "passage"
    multi_vector_dtype: torch.dtype = torch.float32

    @property
    def wanted(self) -> tuple[bool, bool, bool]:
        return self.dense, self.sparse, self.multi_vector


def pack_ids(ids: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Packed int32 ids [T] and offsets [N + 1] of one array for each text."""
    offsets = np.zeros(len(ids) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in ids], out=offsets[1:])
    packed = np.concatenate(ids) if ids else np.zeros(0, dtype=np.int32)
    return torch.from_numpy(packed), torch.from_numpy(offsets)


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Numbers of the texts of each batch, longest first: as few batches as possible, of rows as equal as possible.

    A batch has at most batch_tokens rows unless one text alone has more. Of all limits that need no more batches than
    batch_tokens does, the smallest is taken, so that the last batch is no small rest.
    """
    order = sorted(range(len(lengths)), key=lambda text: -lengths[text])
    batches = filled_batches(order, lengths, batch_tokens)
    too_small, enough = 0, batch_tokens
    while enough - too_small > 1:
        limit = (too_small + enough) // 2
        candidate = filled_batches(order, lengths, limit)
        if len(candidate) > len(batches):
            too_small = limit
        else:
            batches, enough = candidate, limit
    return batches


def filled_batches(order: Iterable[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Numbers of the texts of each batch, in this order: at most `limit` rows, or one text that has more."""
    batches: list[list[int]] = []
    room = 0
    for number in order:
        if lengths[number] > room:
            batches.append([])
            room = limit
        batches[-1].append(number)
        room -= lengths[number]
    return batches


def windows(items: Iterable[Item], characters: int, text_of: Callable[[Item], str]) -> Iterator[list[Item]]:
    """Consecutive items: a window ends with the text that fills `characters`, or with BLOCK texts."""
    window: list[Item] = []
    room = characters
    for item in items:
        window.append(item)
        room -= len(text_of(item))
        if room <= 0 or len(window) >= BLOCK:
            yield window
            window, room = [], characters
    if window:
        yield window


def encode_texts(model: M3Model, texts: Sequence[str], options: EncodingOptions, *, progress: bool) -> EncodedTexts:
    """See M3Model.encode."""
    check_texts(texts)
    blocks = [texts[begin : begin + BLOCK] for begin in range(0, len(texts), BLOCK)] or [texts]
    parts = list(encode_windows(model, blocks, options, progress=progress, total=len(texts), stacklevel=5))
    return parts[0] if len(parts) == 1 else M3Embeddings.concatenate(parts)


def encode_windows(
    model: M3Model,
    texts: Iterable[Sequence[str]],
    options: EncodingOptions,
    *,
    progress: bool = False,
    total: int | None = None,
    stacklevel: int = 3,
) -> Iterator[EncodedTexts]:
    """The representations of each window of texts, computed when they are asked for.

    Args:
        texts: windows, read one ahead, in the thread of the caller.
        total: texts of all windows, for the progress bar.

    Raises:
        TypeError, ValueError: at once, as M3Model.encode; while iterating, a window holds something else than strings.
    """
    if not any(options.wanted):
        raise ValueError("dense, sparse and multi_vector are all False; accepted: at least one True")
    if options.multi_vector_dtype not in _ROW_DTYPES:
        raise ValueError(f"multi_vector_dtype is {options.multi_vector_dtype}; accepted: float32, bfloat16, float16")
    batch_tokens = options.batch_tokens
    if batch_tokens is None:
        batch_tokens = DEFAULT_BATCH_TOKENS[model.device.type]
    if not isinstance(batch_tokens, int) or isinstance(batch_tokens, bool) or batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens!r}; accepted: a whole number of at least 1")
    tokenization = model.tokenization(options.max_length, options.role)
    return _encoded(model, texts, options, batch_tokens, tokenization, progress, total, stacklevel)


def _encoded(
    model: M3Model,
    texts: Iterable[Sequence[str]],
    options: EncodingOptions,
    batch_tokens: int,
    tokenization: tuple[TextTokenizer, int, str],
    progress: bool,
    total: int | None,
    stacklevel: int,
) -> Iterator[EncodedTexts]:
    tokenizer, limit, prefix = tokenization
    cuts = Tokenized([], 0, 0)
    with ThreadPoolExecutor(1) as ahead, _token_bar(total, progress) as advance:
        source = iter(texts)
        window = next(source, None)
        following = None if window is None else ahead.submit(tokenizer.encode, window, limit, prefix)
        while following is not None:
            tokenized = following.result()
            window = next(source, None)
            following = None if window is None else ahead.submit(tokenizer.encode, window, limit, prefix)
            block = _Block(model, tokenized.ids, options.wanted, options.multi_vector_dtype)
            with evaluating(model):
                for batch in plan_batches([len(ids) for ids in tokenized.ids], batch_tokens):
                    advance(len(batch), block.compute(batch))
                encoded = block.finish()
            cuts = Tokenized([], cuts.cut + tokenized.cut, max(cuts.longest, tokenized.longest))
            yield encoded
    warn_of_cuts([cuts], limit, stacklevel=stacklevel)


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
def evaluating(model: M3Model) -> Iterator[None]:
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
def _token_bar(texts: int | None, shown: bool) -> Iterator[Callable[[int, int], None]]:
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
    # Texts of one window come longest first, so the time that remains is judged by the last ten minutes, not seconds.
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=600) as bar:
        task = bar.add_task("encode", total=texts, rate=0.0)
        begin = time.perf_counter()
        tokens = 0

        def advance(more_texts: int, more_tokens: int) -> None:
            nonlocal tokens
            tokens += more_tokens
            bar.update(task, advance=more_texts, rate=tokens / max(time.perf_counter() - begin, 1e-9))

        yield advance
