"""The demo's two sets of pairs in a folder, and a sparse head that knows how rare words are in the training set.

FOLDER/documents.jsonl         the held-out pairs, which are searched
FOLDER/training.jsonl          the training pairs
FOLDER/documents.facts.json    what they were made of: a second run takes them as they are if that is the same
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
import torch

from m3model.cli.output import message
from m3model.demo.docstrings import Pair, apart, choose, collect, is_searched
from m3model.demo.questions import QUESTIONS
from m3model.demo.token_weights import fit_token_weights
from m3model.files import write_whole
from m3model.model import M3Model

__all__ = ["Collection", "digest", "make_collection", "with_token_weights"]

_HELD_OUT = "documents.jsonl"
_TRAINING = "training.jsonl"
_RECIPE = 5
_SAMPLE_TOKENS = 24_000
_SAMPLE_LENGTH = 96
"""Tokens of a text in the sample: many beginnings tell more than a few whole texts."""


class Collection(NamedTuple):
    """The sets of pairs (docstrings.py), and the tokens of the bodies of the first."""

    held_out: list[Pair]
    training: list[Pair]
    tokens: int


def make_collection(folder: Path, model: M3Model, tokens: int) -> Collection:
    """The sets of this installation, about `tokens` tokens of bodies held out."""
    versions = {package.__name__: package.__version__ for package in (torch, np, scipy)}
    facts = {"recipe": _RECIPE, **versions, "budget": tokens}
    paths, facts_path = [folder / _HELD_OUT, folder / _TRAINING], folder / "documents.facts.json"
    if all(path.is_file() for path in (*paths, facts_path)):
        stored = json.loads(facts_path.read_text(encoding="utf-8"))
        if stored["made_of"] == facts and stored["sha256"] == [_sha256(path.read_bytes()) for path in paths]:
            held_out, training = map(_read, paths)
            return Collection(held_out, training, stored["tokens"])
    pairs = collect()
    tokenizer, limit, prefix = model.tokenization(model.max_length, "passage")
    searched = [pair for pair in pairs if is_searched(pair)]
    lengths = [len(ids) for ids in tokenizer.encode([pair.body for pair in searched], limit, prefix).ids]
    length_of = {pair.name: length for pair, length in zip(searched, lengths)}
    chosen = choose(searched, lengths, tokens, {name for question in QUESTIONS for name in question.answers})
    training = apart(pairs, chosen)
    used = sum(length_of[pair.name] for pair in chosen)
    sums = [_write(path, some) for path, some in zip(paths, (chosen, training))]
    write_whole(facts_path, json.dumps({"made_of": facts, "sha256": sums, "tokens": used}))
    longest = max(length_of[pair.name] for pair in chosen)
    message(f"  {len(chosen)} of {len(pairs)} pairs, {used} tokens, the longest body {longest} tokens")
    return Collection(chosen, training, used)


def _write(path: Path, pairs: Sequence[Pair]) -> str:
    """Write the pairs as JSON lines; the digest of the file."""
    lines = [json.dumps({"id": p.name, "summary": p.summary, "text": p.body}, ensure_ascii=False) for p in pairs]
    content = ("\n".join(lines) + "\n").encode("utf-8")
    write_whole(path, content)
    return _sha256(content)


def _read(path: Path) -> list[Pair]:
    rows = map(json.loads, path.read_bytes().splitlines())
    return [Pair(row["id"], row["summary"], row["text"]) for row in rows]


def with_token_weights(folder: Path, model: M3Model, pairs: Sequence[Pair]) -> M3Model:
    """The model with a sparse head fitted to `pairs`, saved in FOLDER/model; as it is if that was done before."""
    made_of = {"recipe": _RECIPE, "pairs": digest(pairs)}
    if model.config.others.get("token_weights") == made_of:
        return model
    tokenizer, limit, prefix = model.tokenization(512, "passage")
    bodies = tokenizer.encode([pair.body for pair in pairs], limit, prefix).ids
    summaries = tokenizer.encode([pair.summary for pair in pairs], limit, model.config.query_prefix).ids
    shuffled = sorted(zip(bodies, summaries), key=lambda texts: _sha256(texts[0].tobytes()))
    sample, used = [], 0
    for ids in itertools.chain.from_iterable(shuffled):
        sample.append(ids[:_SAMPLE_LENGTH])
        used += len(sample[-1])
        if used >= _SAMPLE_TOKENS:
            break
    fit_token_weights(model, bodies, sample)
    model.config = replace(model.config, others={**model.config.others, "token_weights": made_of})
    model.save_pretrained(folder / "model")
    return model


def digest(pairs: Sequence[Pair]) -> str:
    """Of the pairs' texts."""
    return _sha256(json.dumps(pairs).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
