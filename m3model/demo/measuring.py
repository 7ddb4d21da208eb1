"""What each head finds in the demo: every held-out summary looks for its body among all held-out bodies.

nDCG@10   mean over the summaries of 1 / log2(1 + place of the body), 0 beyond the tenth: there is one right body
MRR@10    of 1 / place likewise
lead      a measure of the hybrid less that of a head, with the standard error of the mean of the paired differences
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from m3model.cli.output import document_bar, message, print_table, stdout
from m3model.demo.collection import Collection, digest
from m3model.demo.docstrings import Pair
from m3model.demo.fine_tuning import Weights
from m3model.embeddings import EncodedTexts
from m3model.files import write_whole
from m3model.model import M3Model
from m3model.retrieval import ExactIndex, fingerprint, same_model
from m3model.retrieval.storage import is_index
from m3model.retrieval.streaming import ingest_stream

__all__ = [
    "MEASURED_HEADS",
    "MEASURES",
    "Lead",
    "Measured",
    "Places",
    "Values",
    "index_of",
    "lead",
    "measure",
    "measure_before",
    "place_of",
    "show",
]

MEASURED_HEADS = ("dense", "sparse", "multi_vector", "all")
_BLOCK = 32

Places = dict[str, list[int]]
Values = NDArray[np.float64]


class Measured(NamedTuple):
    """Weights of dense, sparse and multi-vector in the hybrid, and by head the place of every pair's body: 1 for the
    first, 0 beyond the tenth."""

    weights: Weights
    places: Places


class Lead(NamedTuple):
    mean: float
    error: float


def index_of(path: Path, place: Path, model: M3Model, collection: Collection) -> ExactIndex:
    """The index of all held-out bodies, encoded by `model` of folder `place`; what an earlier run has encoded is kept
    if model and collection are the same."""
    mark, index = fingerprint(model), None
    # Two seeds' models differ by less than fingerprints allow for.
    made_of = {name: model.config.others.get(name) for name in ("token_weights", "fine_tuned")}
    facts = {"model": os.path.abspath(place), "documents": digest(collection.held_out), "made_of": made_of}
    if is_index(path):
        index = ExactIndex.load(path)
        same = index.fingerprint is not None and same_model(index.fingerprint, mark)
        if not same or index.metadata != facts:
            shutil.rmtree(path)
            index = None
    if index is None:
        index = ExactIndex(mark, facts)
    known, begin = len(index), time.monotonic()

    def embed(contents: Sequence[Mapping[str, Any]]) -> EncodedTexts:
        return model.encode([content["text"] for content in contents], multi_vector_dtype=torch.float16)

    stream = ((pair.name, {"text": pair.body, "summary": pair.summary}) for pair in collection.held_out)
    with document_bar("encode", len(collection.held_out)) as advance:
        for stored in ingest_stream(index, stream, embed, folder=str(path), block=_BLOCK):
            advance(len(stored))
    if known:
        message(f"  {known} of {len(collection.held_out)} documents were there")
    else:
        message(f"  {collection.tokens / (time.monotonic() - begin):.0f} tokens/s")
    return index


def measure(index: ExactIndex, model: M3Model, pairs: Sequence[Pair], weights: Weights) -> Measured:
    """The place of the right body of every pair under each head, among all bodies, whose scores one search gives."""
    queries = model.encode([pair.summary for pair in pairs], role="query")
    places: Places = {head: [] for head in MEASURED_HEADS}
    for pair, found in zip(pairs, index.search(queries, len(index), weights=weights, rerank=None)):
        right = found.ids.index(pair.name)
        for head, scores in zip(MEASURED_HEADS, (found.dense, found.sparse, found.multi_vector, found.score)):
            assert scores is not None
            places[head].append(place_of(scores, right))
    return Measured(weights, places)


def place_of(scores: NDArray[np.float32], right: int) -> int:
    """The place of number `right` among `scores`, behind all that score as much; 0 beyond the tenth."""
    place = int((scores >= scores[right]).sum())
    return place if place <= 10 else 0


def measure_before(folder: Path, model: M3Model, collection: Collection, weights: Weights) -> Measured:
    """What the untrained model finds, kept in a file for the next run; its index is not kept."""
    path, index = folder / "before.json", folder / "before"
    made_of = {"model": fingerprint(model), "pairs": digest(collection.held_out), "weights": list(weights)}
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if stored.get("made_of") != made_of:
        searched = index_of(index, folder / "model", model, collection)
        stored = {"made_of": made_of, "places": measure(searched, model, collection.held_out, weights).places}
        write_whole(path, json.dumps(stored))
    if index.is_dir():
        shutil.rmtree(index)
    return Measured(weights, dict(stored["places"]))


def show(measured: Sequence[Measured], pairs: int) -> None:
    """What each head measures, before the training and after it, and the lead of the hybrid."""
    moments = ["before", "after"] if len(measured) > 1 else ["now"]
    rows = []
    for head in MEASURED_HEADS:
        values = [f"{of_place(one.places[head]).mean():.3f}" for of_place in MEASURES.values() for one in measured]
        rows.append([_shown(head), *values])
    columns = ["head", *(f"{name}_{moment}" for name in MEASURES for moment in moments)]
    title = f"{pairs} summaries, each looking for its body among {pairs}"
    print_table(columns, rows, title=title, right=" ".join(columns[1:]))
    mixes = [" : ".join(f"{weight:g}" for weight in one.weights) for one in measured]
    stdout().print(f"hybrid = dense, sparse and multi-vector in proportions of {', then '.join(mixes)}.")
    for name in MEASURES:
        leads = [
            f"{found.mean:+.3f} ± {found.error:.3f} on {_shown(head)}"
            for head in MEASURED_HEADS[:-1]
            for found in [lead(name, measured[-1].places, head)]
        ]
        stdout().print(f"The lead of its {name}: {', '.join(leads)}.")
    stdout().print("± is one standard error over the summaries, of this one training.\n")


def lead(measure: str, places: Mapping[str, Sequence[int]], head: str) -> Lead:
    """How far the hybrid is ahead of `head` by one of MEASURES."""
    of_place = MEASURES[measure]
    gains = of_place(places["all"]) - of_place(places[head])
    return Lead(float(gains.mean()), float(gains.std(ddof=1) / np.sqrt(len(gains))))


def _discounted(places: Sequence[int]) -> Values:
    return np.array([1.0 / np.log2(1 + place) if place else 0.0 for place in places])


def _reciprocal(places: Sequence[int]) -> Values:
    return np.array([1.0 / place if place else 0.0 for place in places])


MEASURES = {"nDCG@10": _discounted, "MRR@10": _reciprocal}
"""By name, the value of every summary from its body's places: 1 for the first, 0 for place 0."""


def _shown(head: str) -> str:
    return "hybrid" if head == "all" else head.replace("_", "-")
