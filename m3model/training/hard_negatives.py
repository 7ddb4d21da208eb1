"""Hard negatives: passages that the model ranks high for a query and that do not answer it.

    corpus     passages given, or all positives and negatives of the rows; the rows' positives are always part of it
    search     the best `rank_range[1]` passages of the corpus for each query
    drop       ranks before rank_range[0]; every positive of the same query, in whatever row; the query itself;
               passages that score above  lowest positive - absolute_margin  or
               lowest positive - relative_margin · |lowest positive|: they may answer the query as well
    sample     `negatives` of the rest, evenly; where they are too few and `fill` is set, random passages of the corpus
               that are not among those found

Ranks count from 0 with the positives among them, as in FlagEmbedding's hn_mine.py, whose defaults these are but for the
margins. Texts are compared up to white space. What is drawn for a row depends on seed and row number alone.

A run leaves what it has done in the folder OUT.mining: the index of the corpus, a block of passages at a time, and the
rows mined so far. A killed run goes on from there when it is repeated, and ends in the same bytes. With an index in
Milvus the corpus lies there instead, and stays there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import compress, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from m3model.embeddings import EncodedTexts
from m3model.files import flush, locked, write_whole
from m3model.retrieval.exact import ExactIndex
from m3model.retrieval.fingerprint import fingerprint
from m3model.retrieval.interface import CANDIDATES, RERANK, Head, Ranking
from m3model.retrieval.milvus import MilvusIndex
from m3model.retrieval.storage import is_index
from m3model.retrieval.streaming import ingest_stream
from m3model.scoring import DEFAULT_WEIGHTS, check_weights
from m3model.tokenizer import Role
from m3model.training.data import (
    TrainingDataError,
    TrainingRow,
    open_training_file,
    parse_object,
    row_from_object,
    training_lines,
)
from m3model.training.inspection import text_digest

if TYPE_CHECKING:
    from m3model.model import M3Model

__all__ = ["MiningOptions", "MiningSummary", "choose_negatives", "mine_hard_negatives"]

Digests = NDArray[np.uint64]
Corpus = Callable[[], Iterable[str]]
Progress = Callable[[str, int, int], None]

_STATE = "state.json"
_PART = "rows.part"
_STREAM = 1 << 63
"""Second word of the key of draws, apart from those of training, where it is the epoch."""


@dataclass(frozen=True)
class MiningOptions:
    """What counts as a hard negative.

    Attributes:
        negatives: of each row.
        rank_range: (first, end): ranks first … end - 1 are sampled from, 0 is the best.
        absolute_margin, relative_margin: as in the first lines of the module; None: no such limit.
        fill: top up with random passages.
        head: what to rank by; weights: of dense, sparse and multi-vector where it mixes them.
        query_instruction: before queries whose row has no prompt; passage_instruction: before all passages.
        query_max_length, passage_max_length: tokens.
        seed: of the samples.
        block: passages and rows encoded and stored at a time.
    """

    negatives: int = 15
    rank_range: tuple[int, int] = (10, 210)
    absolute_margin: float | None = None
    relative_margin: float | None = None
    fill: bool = True
    head: Head = "dense"
    weights: tuple[float, float, float] = DEFAULT_WEIGHTS
    query_instruction: str = ""
    passage_instruction: str = ""
    query_max_length: int = 512
    passage_max_length: int = 512
    seed: int = 0
    block: int = 512

    def __post_init__(self) -> None:
        for name, least in (("negatives", 1), ("seed", 0), ("block", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}; accepted: a whole number of at least {least}")
        first, end = self.rank_range
        if not 0 <= first < end:
            raise ValueError(f"rank_range is {self.rank_range}; accepted: 0 ≤ first < end")
        for name in ("absolute_margin", "relative_margin"):
            margin = getattr(self, name)
            if margin is not None and not 0 <= margin < float("inf"):
                raise ValueError(f"{name} is {margin}; accepted: a number of at least 0, or None")
        if self.head not in get_args(Head):
            raise ValueError(f"head is {self.head!r}; accepted: {', '.join(get_args(Head))}")
        check_weights(self.weights)


@dataclass
class MiningSummary:
    """Counts of a run; those of rows mined before a kill are not in it.

    Attributes:
        rows: mined in this run; resumed_rows: mined before.
        corpus: different passages.
        negatives: written; random: how many of them were not found but drawn from the corpus.
        near_positives: passages within the rank range that a margin dropped.
        short_rows: rows with fewer negatives than asked for.
    """

    corpus: int
    rows: int = 0
    resumed_rows: int = 0
    negatives: int = 0
    random: int = 0
    near_positives: int = 0
    short_rows: int = 0


class _Scan(NamedTuple):
    """First pass over rows and corpus.

    Attributes:
        rows: how many.
        fresh: whether each corpus text is the first of its kind; digests: of those that are.
        queries: sorted digests, one for each positive of a row; positives: their digests.
        mark: checksum of all that was read.
    """

    rows: int
    fresh: NDArray[np.bool_]
    digests: Digests
    queries: Digests
    positives: Digests
    mark: str

    def positives_of(self, query: int) -> Digests:
        """Different positives of this query in all rows."""
        wanted = np.uint64(query)
        begin, end = np.searchsorted(self.queries, wanted, "left"), np.searchsorted(self.queries, wanted, "right")
        return np.unique(self.positives[begin:end])


def mine_hard_negatives(
    model: M3Model,
    rows: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    corpus: Corpus | None = None,
    options: MiningOptions | None = None,
    milvus: MilvusIndex | None = None,
    batch_tokens: int | None = None,
    restart: bool = False,
    progress: Progress = lambda _stage, _done, _total: None,
) -> MiningSummary:
    """Write the rows of a training file with new negatives.

    Keys of a row other than "neg" stay, except a teacher's scores: they belong to the old negatives.

    Args:
        model: that ranks.
        rows: JSON lines as `read_training_rows` reads them.
        out: JSON lines; appears when it is complete.
        corpus: gives the passages to choose from, the same ones whenever it is called; default all passages of rows.
        milvus: searched in place of an exact index on disk; empty, or that of the unfinished run. Heads that rank by
            multi-vectors need them in it.
        restart: forget what an unfinished run has done.
        progress: called with "corpus" or "rows", how many are done, and of how many.

    Raises:
        FileExistsError: out is there.
        TrainingDataError: a bad row.
        ValueError: an unfinished run had other rows, corpus, options, index or model; out is named like a packed file;
            milvus holds other documents.
        RuntimeError: another process mines into out.
    """
    options = options or MiningOptions()
    source, target = Path(rows), Path(os.path.abspath(out))
    if target.exists():
        raise FileExistsError(f"{out} is there already; remove it, or choose another name")
    if target.suffix.lower() in (".gz", ".bz2", ".xz", ".zst"):
        raise ValueError(f"out is {out}; accepted: a name for JSON lines that are not packed")
    scan = _scan(source, corpus)
    folder = target.with_name(f"{target.name}.mining")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", f"another process mines into {target}"):
        if milvus is not None and len(milvus) and (restart or not (folder / _STATE).exists()):
            raise ValueError(f"{milvus.place} holds documents; accepted: an empty index")
        place = None if milvus is None else milvus.place
        _check_state(folder, {"mark": scan.mark, "options": _plain(options), "index": place}, restart)
        encoder = _Encoder(model, options, batch_tokens, milvus)
        summary = MiningSummary(len(scan.digests))
        index = _index(folder, scan, _corpus_texts(source, corpus), encoder, options, milvus, progress)
        part = folder / _PART
        _mine(index, source, part, scan, encoder, options, summary, progress)
        os.replace(part, target)
        flush(target.parent)
        shutil.rmtree(folder)
    return summary


def choose_negatives(
    scores: NDArray[np.float32],
    positive: NDArray[np.bool_],
    barred: NDArray[np.bool_],
    all_found: bool,
    options: MiningOptions,
    random: np.random.Generator,
) -> tuple[list[int], int]:
    """Places in a ranking that are hard negatives.

    Args:
        scores: [k], descending; positive: [k], which are positives; barred: [k], which else may not be chosen.
        all_found: whether all positives are in the ranking; with a margin, none may be chosen where one is missing,
            since it scores no more than the last.

    Returns:
        At most options.negatives places in ascending order, and how many places of the range a margin dropped.
    """
    first, end = options.rank_range
    place = np.arange(len(scores))
    open_places = (place >= first) & (place < end) & ~positive & ~barred
    limit = np.inf
    lowest = float(scores[positive].min(initial=np.inf)) if all_found else -np.inf
    if options.absolute_margin is not None:
        limit = min(limit, lowest - options.absolute_margin)
    if options.relative_margin is not None:
        limit = min(limit, lowest - options.relative_margin * abs(lowest) if np.isfinite(lowest) else lowest)
    near = open_places & (scores > limit)
    candidates = np.flatnonzero(open_places & ~near)
    count = min(options.negatives, len(candidates))
    chosen = np.sort(random.choice(candidates, count, replace=False)) if count else candidates[:0]
    return chosen.tolist(), int(near.sum())


def _mine(
    index: ExactIndex | MilvusIndex,
    source: Path,
    part: Path,
    scan: _Scan,
    encoder: _Encoder,
    options: MiningOptions,
    summary: MiningSummary,
    progress: Progress,
) -> None:
    """Write all rows that `part` lacks, a block at a time."""
    with open(part, "ab+") as file:
        done = summary.resumed_rows = _keep_whole_blocks(file, options.block, scan.rows)
        progress("rows", done, scan.rows)
        stream = islice(_rows(source), done, None)
        while block := list(islice(stream, options.block)):
            prompts = [options.query_instruction if row.prompt is None else row.prompt for _, row in block]
            queries = encoder([prompt + row.query for prompt, (_, row) in zip(prompts, block)], "query")
            end = options.rank_range[1]
            rankings = index.search(
                queries,
                end,
                head=options.head,
                weights=options.weights,
                candidates=max(CANDIDATES, end),
                rerank=max(RERANK, end),
            )
            lines = [
                _mined_line(index, scan, values, row, ranking, options, summary)
                for (values, row), ranking in zip(block, rankings)
            ]
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
            done += len(block)
            progress("rows", done, scan.rows)


def _mined_line(
    index: ExactIndex | MilvusIndex,
    scan: _Scan,
    values: dict[str, Any],
    row: TrainingRow,
    ranking: Ranking,
    options: MiningOptions,
    summary: MiningSummary,
) -> bytes:
    """The JSON line of a row with its new negatives."""
    random = np.random.Generator(np.random.Philox(key=[options.seed, _STREAM], counter=[0, 0, 0, row.index]))
    found = np.array([int(document) for document in ranking.ids], dtype=np.int64)
    digests = scan.digests[found]
    query = text_digest(row.query)
    positives = scan.positives_of(query)
    positive, itself = np.isin(digests, positives), digests == np.uint64(query)
    places, near = choose_negatives(
        ranking.score, positive, itself, int(positive.sum()) == len(positives), options, random
    )
    chosen = found[places].tolist()
    missing = options.negatives - len(chosen)
    if options.fill and missing:
        # So many different numbers that enough are left when all found, all positives and the query are taken out.
        drawn = random.choice(
            len(scan.digests), min(len(found) + len(positives) + 1 + missing, len(scan.digests)), replace=False
        )
        barred = np.isin(drawn, found) | np.isin(scan.digests[drawn], [*positives, np.uint64(query)])
        drawn = drawn[~barred][:missing]
        chosen += drawn.tolist()
        summary.random += len(drawn)
    summary.rows += 1
    summary.negatives += len(chosen)
    summary.near_positives += near
    summary.short_rows += len(chosen) < options.negatives
    mined = {key: value for key, value in values.items() if key not in ("neg", "pos_scores", "neg_scores")}
    mined["neg"] = [document["text"] for document in index.documents([str(number) for number in chosen])]
    try:
        return (json.dumps(mined, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # lone surrogates, which only an escape can hold
        return (json.dumps(mined) + "\n").encode()


class _Encoder:
    """Embeddings of the representations that the head or the index in Milvus needs."""

    def __init__(
        self, model: M3Model, options: MiningOptions, batch_tokens: int | None, milvus: MilvusIndex | None
    ) -> None:
        self.model, self.options, self.batch_tokens = model, options, batch_tokens
        mixed = options.head in ("multi_vector", "all")
        both = mixed or milvus is not None
        self.parts = {
            "dense": both or "dense" in options.head,
            "sparse": both or "sparse" in options.head,
            "multi_vector": mixed or (milvus is not None and milvus.row_width is not None),
        }

    def __call__(self, texts: Sequence[str], role: Role) -> EncodedTexts:
        options = self.options
        return self.model.encode(
            texts,
            role=role,
            max_length=options.query_max_length if role == "query" else options.passage_max_length,
            batch_tokens=self.batch_tokens,
            multi_vector_dtype=torch.float16,
            **self.parts,
        )


def _index(
    folder: Path,
    scan: _Scan,
    texts: Iterator[str],
    encoder: _Encoder,
    options: MiningOptions,
    milvus: MilvusIndex | None,
    progress: Progress,
) -> ExactIndex | MilvusIndex:
    """The index of the corpus under the numbers of its texts; what it holds already is not made again."""
    mark, path = fingerprint(encoder.model), folder / "index"
    index = milvus if milvus is not None else ExactIndex.load(path) if is_index(path) else ExactIndex(mark)
    try:
        index.check_model(mark)
    except ValueError as error:
        raise ValueError(f"{folder} holds an unfinished run of another model; restart forgets it") from error

    def embed(contents: Sequence[Mapping[str, Any]]) -> EncodedTexts:
        return encoder([options.passage_instruction + content["text"] for content in contents], "passage")

    total, done = len(scan.digests), 0
    progress("corpus", done, total)
    documents = ((str(number), {"text": text}) for number, text in enumerate(compress(texts, scan.fresh)))
    place = None if milvus is not None else str(path)
    for stored in ingest_stream(index, documents, embed, folder=place, block=options.block):
        done += len(stored)
        progress("corpus", done, total)
    if milvus is not None:
        if len(milvus) != total:
            raise ValueError(f"{milvus.place} holds {len(milvus)} documents, the corpus {total}; accepted: no others")
        return milvus
    return ExactIndex.load(path, verify=False)  # mapped into memory, what was added in memory too


def _scan(source: Path, corpus: Corpus | None) -> _Scan:
    """Read everything once: which corpus texts are different, and the positives of every query."""
    checksum = hashlib.sha256()
    queries, positives = array("Q"), array("Q")
    count = 0
    for values, row in _rows(source):
        count += 1
        checksum.update(json.dumps(values, sort_keys=True).encode())
        queries.extend([text_digest(row.query)] * len(row.positives))
        positives.extend(map(text_digest, row.positives))
    if not count:
        raise TrainingDataError(f"{source}: the file has no rows")
    digests = np.array(array("Q", map(text_digest, _corpus_texts(source, corpus))), dtype=np.uint64)
    checksum.update(digests.tobytes())
    fresh = np.zeros(len(digests), dtype=bool)
    fresh[np.unique(digests, return_index=True)[1]] = True
    by_query = np.array(queries, dtype=np.uint64)
    order = np.argsort(by_query, kind="stable")
    answers = np.array(positives, dtype=np.uint64)[order]
    return _Scan(count, fresh, digests[fresh], by_query[order], answers, checksum.hexdigest())


def _corpus_texts(source: Path, corpus: Corpus | None) -> Iterator[str]:
    """All passages, equal ones as often as they come."""
    if corpus is not None:
        yield from (text for text in corpus() if text.strip())
    for _, row in _rows(source):
        yield from row.positives
        if corpus is None:
            yield from row.negatives


def _rows(source: Path) -> Iterator[tuple[dict[str, Any], TrainingRow]]:
    """JSON object and row of every line."""
    with open_training_file(source) as file:
        for index, line in enumerate(training_lines(file, source)):
            values = parse_object(line, source)
            yield values, row_from_object(values, f"{source}:{line.number}", index)


def _plain(options: MiningOptions) -> dict[str, Any]:
    """The options as JSON gives them back."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(options)))
    return values


def _check_state(folder: Path, state: dict[str, Any], restart: bool) -> None:
    """Compare with the unfinished run of this folder, if there is one; write what this run is."""
    path = folder / _STATE
    if restart:
        for entry in (folder / "index", folder / _PART, path):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
    if path.exists():
        before = json.loads(path.read_text())
        if before != state:
            other = [name for name, value in state["options"].items() if before["options"].get(name) != value]
            other += ["rows or corpus"] if before["mark"] != state["mark"] else []
            other += ["index"] if before.get("index") != state["index"] else []
            raise ValueError(f"{folder} holds an unfinished run with other {', '.join(other)}; restart forgets it")
        return
    write_whole(path, json.dumps(state))


def _keep_whole_blocks(file: BinaryIO, block: int, rows: int) -> int:
    """Cut the part file after its last whole block, so that what follows is computed in the same blocks as without a
    kill and comes out in the same bits; the number of rows that stay."""
    file.seek(0)
    kept = end = size = 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            break
        size += len(line)
        if number % block == 0 or number == rows:
            kept, end = number, size
    file.truncate(end)
    file.seek(end)
    return kept
