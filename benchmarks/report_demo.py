"""The demo over several seeds of its training: benchmarks/results/demo_seeds.json.

    python -m benchmarks.report_demo choose SEED...     # hybrid weights on the development pairs
    python -m benchmarks.report_demo measure SEED...    # every head on the held-out pairs

Three sets of pairs (m3model/demo/docstrings.py): trained on, development, held out. Choices belong on development
pairs; `measure` looks at the held-out ones with what is committed, as `m3 demo --seed SEED` does. A seed draws the
batches.

Of the recipe (m3model/demo/fine_tuning.py), frozen layers, length of the bodies, steps and the sparse head's loss
weight were chosen on the development pairs of this draw, with seed 1, among five recipes that differed in these and
in the learning rates, mostly several at a time, in a script of its own that trained the last layers on stored hidden
states. The rates are those of before: lower ones (5e-5, heads 1e-3) gave dense as much and multi-vector more, but the
hybrid a smaller lead. Batches are full because there, with seeds 1 and 2, dense had 0.695 and 0.705 with the rests of
modules as batches of their own, 0.707 and 0.710 without them (untrained 0.697). The hybrid's weights are what `choose
1 2` gave. The held-out pairs had been looked at once before all this, with the recipe of then, under which dense
lost; no choice was made on them. Batches of one module were chosen on the draw before, with one seed, the absence of
distillation on older splits, whose pairs may be held out now. That nothing is dropped out was not compared with
anything.

A seed's trained model stays in .cache/benchmarks/demo/seed-SEED, so `measure` after `choose` trains nothing again.

    lead       MRR@10 of the hybrid less that of a head
    of a seed  its standard error is that of the mean over queries of the paired differences
    pooled     of each query the mean over the seeds first; error² = error² of the mean over queries of these means
               + variance between the seeds' leads / seeds. Two things are taken to be random: queries and seeds
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import describe
from benchmarks.report_encode import RESULTS
from benchmarks.sparse_texts import CACHE
from m3model import M3Model
from m3model.cli.demo import STEPS, TOKENS
from m3model.demo.collection import Collection, make_collection, with_token_weights
from m3model.demo.docstrings import Pair
from m3model.demo.fine_tuning import HYBRID_WEIGHTS, UNTRAINED_WEIGHTS, fine_tuned
from m3model.demo.measuring import MEASURED_HEADS, Measured, index_of, measure, measure_before, reciprocal
from m3model.embedded import make_embedded_backbone
from m3model.scoring import HEADS, head_scores

TABLE = RESULTS / "demo_seeds.json"
FOLDER = CACHE / "demo"
DENSE = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
SPARSE = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
Values = NDArray[np.float64]


def choose(seeds: Sequence[int]) -> dict[str, Any]:
    """MRR@10 on the development pairs by weights of dense and sparse (multi-vector has 1), mean over the seeds."""
    found: dict[str, Any] = {}
    collection, start = untrained()
    for moment, models in (("before", [0]), ("after", seeds)):
        values: dict[tuple[float, float], list[float]] = {}
        heads: dict[str, list[float]] = {head: [] for head in HEADS}
        for seed in models:
            scores = development_scores(trained(seed, collection)[0] if seed else start, collection.development)
            for head, score in zip(HEADS, scores):
                heads[head].append(float(reciprocal_ranks(score).mean()))
            for weights in product(DENSE, SPARSE):
                mixed = weights[0] * scores[0] + weights[1] * scores[1] + scores[2]
                values.setdefault(weights, []).append(float(reciprocal_ranks(mixed).mean()))
        best = max(values, key=lambda weights: float(np.mean(values[weights])))
        found[moment] = {
            "heads": {head: rounded(numbers) for head, numbers in heads.items()},
            "hybrids": {f"{w[0]:g}:{w[1]:g}:1": rounded(numbers) for w, numbers in values.items()},
            "best": [*best, 1.0],
        }
        print(moment, found[moment]["heads"], "best", found[moment]["best"], rounded(values[best]))
    return {"seeds": list(seeds), "pairs": len(collection.development), **found}


def measured(seeds: Sequence[int]) -> dict[str, Any]:
    """What every head finds on the held-out pairs, of each seed and pooled."""
    collection, start = untrained()
    before = measure_before(FOLDER, start, collection, UNTRAINED_WEIGHTS)
    after: dict[int, Measured] = {}
    for seed in seeds:
        model, place = trained(seed, collection)
        index = index_of(place.parent / "index", place, model, collection)
        after[seed] = measure(index, model, collection.held_out, HYBRID_WEIGHTS)
    ranks = {head: np.stack([reciprocal(after[seed].places[head]) for seed in seeds]) for head in MEASURED_HEADS}
    earlier = {head: reciprocal(before.places[head]) for head in MEASURED_HEADS}
    return {
        "pairs": {"held out": len(collection.held_out), "training": len(collection.training)},
        "tokens": collection.tokens,
        "steps": STEPS,
        "weights": {"before": UNTRAINED_WEIGHTS, "after": HYBRID_WEIGHTS},
        "mrr@10_before": {head: round(float(values.mean()), 4) for head, values in earlier.items()},
        "mrr@10_after": {str(seed): means(ranks, place) for place, seed in enumerate(seeds)},
        "lead": {head: differences(ranks["all"] - ranks[head], seeds) for head in HEADS},
        "gain": {head: differences(ranks[head] - earlier[head], seeds) for head in MEASURED_HEADS},
        "machine": describe(),
        "places_before": before.places,
        "places_after": {str(seed): after[seed].places for seed in seeds},
    }


def untrained() -> tuple[Collection, M3Model]:
    """The sets, and the model that training starts from."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    model = M3Model.from_pretrained(make_embedded_backbone(FOLDER / "model"))
    collection = make_collection(FOLDER, model, TOKENS)
    return collection, with_token_weights(FOLDER, model, collection)


def trained(seed: int, collection: Collection) -> tuple[M3Model, Path]:
    """The model of a seed, and its folder."""
    folder = FOLDER / f"seed-{seed}"
    folder.mkdir(exist_ok=True)
    model = M3Model.from_pretrained(FOLDER / "model")
    return fine_tuned(model, collection.training, folder, STEPS, seed), folder / "trained"


def development_scores(model: M3Model, pairs: Sequence[Pair]) -> list[torch.Tensor]:
    """Of each head [N, N], every summary with every body."""
    bodies = model.encode([pair.body for pair in pairs])
    queries = model.encode([pair.summary for pair in pairs], role="query")
    return [head_scores(head, queries, bodies) for head in HEADS]


def reciprocal_ranks(scores: torch.Tensor) -> Values:
    """1 / place of column i in row i of `scores` [N, N], behind all that score as much; 0 beyond the tenth place."""
    places = (scores >= scores.diagonal()[:, None]).sum(1).double()
    ranks: Values = torch.where(places <= 10, 1 / places, 0.0).numpy()
    return ranks


def differences(gains: Values, seeds: Sequence[int]) -> dict[str, Any]:
    """Mean and standard error of paired differences [seeds, queries]: of each seed and pooled, see above."""
    count, queries = gains.shape
    errors = gains.std(1, ddof=1) / np.sqrt(queries)
    of_seeds = {str(seed): rounded([gains[place].mean(), errors[place]]) for place, seed in enumerate(seeds)}
    squared = gains.mean(0).var(ddof=1) / queries
    if count > 1:
        squared += gains.mean(1).var(ddof=1) / count
    return {"pooled": rounded([gains.mean(), np.sqrt(squared)]), **of_seeds}


def means(ranks: dict[str, Values], place: int) -> dict[str, float]:
    return {head: round(float(values[place].mean()), 4) for head, values in ranks.items()}


def rounded(numbers: Sequence[Any]) -> list[float]:
    return [round(float(number), 4) for number in numbers]


def main(what: str, seeds: list[int]) -> None:
    stored: dict[str, Any] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    part = {"choose": ("development", choose), "measure": ("held out", measured)}[what]
    stored[part[0]] = part[1](seeds)
    TABLE.write_text(json.dumps(stored, indent=1) + "\n")
    if what == "measure":
        for key in ("mrr@10_before", "mrr@10_after", "lead", "gain"):
            print(key, json.dumps(stored["held out"][key], indent=1))


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("choose", "measure"):
        sys.exit(__doc__)
    main(sys.argv[1], [int(word) for word in sys.argv[2:]])
