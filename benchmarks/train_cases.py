"""Model folder and batches of the training benchmarks: packed token ids of queries, and of passages in groups.

A batch has query_ids int32 [Tq], query_offsets int32 [B + 1], passage_ids int32 [Tp], passage_offsets int32 [B·G + 1].
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m3model import M3Model
from m3model.embedded import make_embedded_backbone

Batch = dict[str, NDArray[np.int32]]

GROUP = 8
"""Passages of a query: its own and 7 of other rows."""
DATA = (
    Path(os.environ.get("M3_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "train" / "qa.jsonl.gz"
)


def model_folder() -> Path:
    """The embedded backbone as FlagEmbedding trains it: the first token as dense vector, no prefixes, no dropout."""
    place = Path(tempfile.gettempdir()) / "m3_bench_backbone"
    target = place.with_name(place.name + "_plain")
    if not (target / "config.json").is_file():
        model = M3Model.from_pretrained(make_embedded_backbone(place))
        model.config = replace(
            model.config,
            pooling="cls",
            query_prefix="",
            passage_prefix="",
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model.save_pretrained(target)
    return target


def real_batch(queries: int, max_length: int = 512) -> Batch:
    """Rows at equal distances in DATA: every GROUP-th gives its query, each its passage, cut at max_length tokens."""
    model = M3Model.from_pretrained(model_folder())
    with gzip.open(DATA, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    count = queries * GROUP
    chosen = rows[:: len(rows) // count][:count]
    with warnings.catch_warnings(action="ignore"):  # that texts are cut
        query_ids, query_offsets = model.tokenize([row["query"] for row in chosen[::GROUP]], max_length)
        passage_ids, passage_offsets = model.tokenize([row["pos"][0] for row in chosen], max_length)
    return _batch(query_ids.numpy(), query_offsets.numpy(), passage_ids.numpy(), passage_offsets.numpy())


def uniform_batch(pairs: int, length: int) -> Batch:
    """Random texts of one length, one passage to a query."""
    ids = np.random.default_rng(length).integers(4, 250_002, (2, pairs * length), dtype=np.int32)
    offsets = np.arange(pairs + 1, dtype=np.int32) * length
    return _batch(ids[0], offsets, ids[1], offsets)


def lengths(batch: Batch) -> NDArray[np.int32]:
    return np.concatenate([np.diff(batch["query_offsets"]), np.diff(batch["passage_offsets"])])


def _batch(*parts: NDArray[np.int32]) -> Batch:
    return dict(zip(("query_ids", "query_offsets", "passage_ids", "passage_offsets"), parts))
