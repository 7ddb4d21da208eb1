"""Lexical vectors of real text for the sparse benchmarks: XLM-R tokens of ../shared/data with BM25 weights 1 to 255.

The weights are whole numbers, and the largest of a question is 32, so that every peer can give exactly the same scores
(bmp stores eight bits and scales query weights to 32 steps).
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from m3kernels import SparseBatch

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("M3_DATA", ROOT.parent / "shared" / "data"))
CACHE = ROOT / ".cache" / "benchmarks"
VOCABULARY = 250_002
PASSAGE_TOKENS = 48
K1, B = 0.9, 0.4


def available() -> bool:
    return (DATA / "train" / "qa.jsonl.gz").exists()


def tokens() -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
    """Packed token ids and offsets of passages (windows of PASSAGE_TOKENS of all training texts) and of questions."""
    cache = CACHE / "sparse_texts.npz"
    if not cache.exists():
        texts, questions = _texts()
        encode = tokenizer()
        passages = [
            ids[begin : begin + PASSAGE_TOKENS]
            for ids in encode(texts)
            for begin in range(0, len(ids), PASSAGE_TOKENS)
            if len(ids) - begin >= PASSAGE_TOKENS // 4
        ]
        CACHE.mkdir(parents=True, exist_ok=True)
        arrays = [*_packed(passages), *_packed(encode(questions))]
        np.savez(cache, *arrays)
    with np.load(cache) as arrays:
        passage_ids, passage_offsets, question_ids, question_offsets = (arrays[f"arr_{i}"] for i in range(4))
    return passage_ids, passage_offsets, question_ids, question_offsets


def collection(questions: int) -> tuple[SparseBatch, SparseBatch]:
    """All passages with BM25 weights in 1..255, and `questions` questions with inverse frequencies in 1..32."""
    passage_ids, passage_offsets, question_ids, question_offsets = tokens()
    picked = np.linspace(0, len(question_offsets) - 2, questions).astype(int)
    rows = [question_ids[question_offsets[i] : question_offsets[i + 1]] for i in picked]
    passages, counts = _counted(passage_ids, passage_offsets)
    total = len(passage_offsets) - 1
    holders = np.bincount(passages.token_ids.numpy(), minlength=VOCABULARY)
    rarity = np.log1p((total - holders + 0.5) / (holders + 0.5))
    lengths = np.diff(passage_offsets)
    owner_length = np.repeat(lengths, np.diff(passages.offsets.numpy()))
    impact = rarity[passages.token_ids.numpy()] * counts * (K1 + 1)
    impact /= counts + K1 * (1 - B + B * owner_length / lengths.mean())
    weights = np.clip(np.rint(impact * (255 / impact.max())), 1, 255).astype(np.float32)
    queries, query_counts = _counted(*_packed(rows))
    importance = rarity[queries.token_ids.numpy()] * query_counts
    largest = np.maximum.reduceat(importance, queries.offsets.numpy()[:-1])
    importance /= np.repeat(largest, queries.offsets.diff().numpy())
    query_weights = np.clip(np.rint(32 * importance), 1, 32).astype(np.float32)
    return passages._replace(weights=torch.from_numpy(weights)), queries._replace(
        weights=torch.from_numpy(query_weights)
    )


def _texts() -> tuple[list[str], list[str]]:
    texts: dict[str, None] = {}
    questions = []
    for name in ("qa", "manpages", "parallel"):
        with gzip.open(DATA / "train" / f"{name}.jsonl.gz", "rt") as lines:
            for line in lines:
                row = json.loads(line)
                texts.update(dict.fromkeys(row["pos"]))
                if name == "qa":
                    questions.append(row["query"])
    return list(texts), questions


def tokenizer():
    from tokenizers import Tokenizer

    from m3model.embedded import make_embedded_backbone

    folder = Path(os.environ.get("M3_EMBEDDED") or make_embedded_backbone(CACHE / "embedded"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    return lambda texts: [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _packed(rows) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]), offsets


def _counted(ids: NDArray[np.int32], offsets: NDArray[np.int64]) -> tuple[SparseBatch, NDArray[np.float32]]:
    """Distinct ids of each text and how often each occurs."""
    owner = np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets))
    keys, counts = np.unique(owner << 32 | ids, return_counts=True)
    bounds = np.searchsorted(keys >> 32, np.arange(len(offsets))).astype(np.int32)
    token_ids = torch.from_numpy((keys & 0xFFFFFFFF).astype(np.int32))
    return SparseBatch(token_ids, torch.ones(len(keys)), torch.from_numpy(bounds)), counts.astype(np.float32)
