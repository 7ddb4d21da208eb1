"""Batches of the attention benchmarks, about 16 384 random rows each: equally long, log-uniform or real lengths."""

from __future__ import annotations

import functools
import gzip
import json
import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import sparse_texts

TOKENS = 16_384
LONGEST = 8192
HEADS = 4
"""Few, so that a round of the slowest peer stays short; all times are proportional to the number of heads."""
UNIFORM = (128, 256, 512, 1024, 2048, 4096, 8192)
LOG_UNIFORM, REAL = "log-uniform 16-8192", "lengths of real texts"


@dataclass(frozen=True)
class Case:
    """One batch: `batch` is LOG_UNIFORM, REAL or "count x length"."""

    batch: str
    heads: int
    width: int
    training: bool
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.batch}, {self.heads} heads of {self.width}, {self.direction}"

    @property
    def direction(self) -> str:
        return "forward+backward" if self.training else "forward"

    @property
    def lengths(self) -> tuple[int, ...]:
        if self.batch == LOG_UNIFORM:
            return log_uniform_lengths()
        if self.batch == REAL:
            return real_lengths()
        count, length = map(int, self.batch.split(" x "))
        return (length,) * count

    @property
    def flops(self) -> float:
        """Of the products that have to be computed: two forward; five backward, scores again among them. No padding."""
        products = 7 if self.training else 2
        return products * 2.0 * sum(n * n for n in self.lengths) * self.heads * self.width

    @property
    def available(self) -> bool:
        return self.batch != REAL or sparse_texts.available()

    def rows(self) -> list[Tensor]:
        """q, k, v and the gradient of the output, packed [T, H, D]."""
        generator = torch.Generator().manual_seed(0)
        shape = (sum(self.lengths), self.heads, self.width)
        return [torch.randn(shape, generator=generator).to(self.device) for _ in range(4)]

    def small(self) -> Case:
        """The same kind of call on two short sequences."""
        return replace(self, batch="2 x 64")


def log_uniform_lengths() -> tuple[int, ...]:
    """Drawn until they add up to TOKENS; the last one is cut."""
    draw = random.Random(1)
    lengths: list[int] = []
    while sum(lengths) < TOKENS:
        length = round(math.exp(draw.uniform(math.log(16), math.log(LONGEST))))
        lengths.append(min(length, TOKENS - sum(lengths)))
    return tuple(lengths)


@functools.cache
def real_lengths() -> tuple[int, ...]:
    """Quantiles of the token counts, special tokens included and cut at 8192, of passages to train on in M3_DATA.

    As many, evenly spaced and shuffled, as fill about TOKENS rows.
    """
    cache = sparse_texts.CACHE / "attention_lengths.json"
    if not cache.exists():
        passages = []
        for name in ("qa", "manpages", "parallel"):
            with gzip.open(sparse_texts.DATA / "train" / f"{name}.jsonl.gz", "rt") as lines:
                passages += [json.loads(line)["pos"][0] for line in lines]
        drawn = random.Random(1).sample(passages, 1000)
        counts = sorted(min(len(ids) + 2, LONGEST) for ids in sparse_texts.tokenizer()(drawn))
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps(counts))
    counts = json.loads(cache.read_text())
    batch = round(TOKENS * len(counts) / sum(counts))
    lengths = [counts[(2 * i + 1) * len(counts) // (2 * batch)] for i in range(batch)]
    random.Random(1).shuffle(lengths)
    return tuple(lengths)


CASES = [
    *(
        Case(f"{TOKENS // length} x {length}", HEADS, width, training)
        for width in (32, 64)
        for training in (False, True)
        for length in UNIFORM
    ),
    *(Case("1 x 8192", 12, 64, training) for training in (False, True)),
    *(
        Case(batch, HEADS, width, training)
        for batch in (LOG_UNIFORM, REAL)
        for width in (32, 64)
        for training in (False, True)
    ),
]
