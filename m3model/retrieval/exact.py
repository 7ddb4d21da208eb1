"""ExactIndex: every document is compared, nothing is approximated.

    dense         blocked matrix product                      N·E multiplications a query
    sparse        inverted index (m3kernels.SparseIndex)      blocks of documents that can reach the k best
    multi_vector  maxsim_pairs over the candidates            Lq·Ld·E a pair; on codes where those are kept

Equal scores rank by the order in which documents were added; one that was replaced counts as added then. The index
holds its documents in segments: additions gather in memory and become one when it is searched or saved, and small
segments are merged (each merge at least doubles one, so a document is copied O(log N) times). Deleted documents are
marked and go when their segment is merged, or written anew because more than half of it was deleted. Saved segments are
mapped into memory (m3model.retrieval.storage).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from m3kernels import SparseBatch, SparseIndex, sparse_scores
from m3kernels.sparse.ops import check_batch_values
from m3model.embeddings import EncodedTexts, MultiVectors
from m3model.retrieval.coded_vectors import CodedVectors, RowBits
from m3model.retrieval.fingerprint import document_digest, same_model
from m3model.retrieval.indexed_segment import IndexedSegment
from m3model.retrieval.interface import CANDIDATES, RERANK, Head, Ranking, Scores
from m3model.retrieval.reranking import Encode, listed_scores, scores_of_encoded
from m3model.retrieval.segment import Segment
from m3model.retrieval.storage import is_index, read_index, write_index
from m3model.scoring import DEFAULT_WEIGHTS, check_weights

__all__ = ["ExactIndex"]

_PARTS = ("dense", "sparse", "multi_vector")
_QUERY_BLOCK = 64
_SCORE_BLOCK = 1 << 22
"""Scores of one block of queries and documents held at a time."""
_MERGE_LIMIT = 1 << 30
"""Bytes above which segments are not merged any more."""

_PLACE_BITS = 32
"""A document's place is the serial number of its segment, shifted by these bits, and its number in the segment."""

Numbers = NDArray[np.int64]


class ExactIndex:
    """In-memory or memory-mapped index of dense, sparse and multi-vector embeddings; a `SearchIndex`.

    Attributes:
        fingerprint: of the model that made the embeddings (m3model.retrieval.fingerprint), or None.
        metadata: JSON values saved with the index.
        row_bits: 8 or 1, bits of an element of the multi-vectors that are added; None keeps them in their dtype. An
            index that holds some keeps to what they are.
    """

    def __init__(
        self,
        fingerprint: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        row_bits: RowBits | None = None,
    ) -> None:
        """Raises ValueError for other row_bits."""
        if row_bits not in (None, *get_args(RowBits)):
            raise ValueError(f"row_bits is {row_bits!r}; accepted: None, 8, 1")
        self.fingerprint = fingerprint
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.row_bits = row_bits
        self._segments: list[IndexedSegment] = []
        self._pending: list[IndexedSegment] = []
        self._by_serial: dict[int, IndexedSegment] = {}
        self._next_serial = 0
        self._place_of: dict[str, int] = {}
        self._widths: dict[str, int] | None = None
        self._row_format: str | None = None
        self._stored_in: tuple[Path, str] | None = None

    def __len__(self) -> int:
        return len(self._place_of)

    def __contains__(self, document: object) -> bool:
        return document in self._place_of

    @property
    def parts(self) -> tuple[str, ...]:
        """Which of dense, sparse and multi_vector the index holds; none while it is empty."""
        return tuple(self._widths or ())

    @property
    def nbytes(self) -> int:
        """Bytes of all embeddings, inverted indexes, ids and documents."""
        return sum(held.nbytes for held in (*self._segments, *self._pending))

    def add(
        self,
        ids: Sequence[str],
        embeddings: EncodedTexts,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Add documents.

        Args:
            ids: one string for each document, new to the index.
            embeddings: as `M3Model.encode` gives them; the same representations, widths and row dtype for every add.
            documents: a JSON object for each, given back by `document`; default empty ones.

        Raises:
            TypeError: an id is no string, or a document no mapping of JSON values.
            ValueError: numbers of ids, documents and embeddings differ, an id is already there or twice in `ids`, other
                representations or widths than before, values that are not finite, negative token weights.
        """
        self._extend(ids, embeddings, documents, replace=False)

    def upsert(
        self,
        ids: Sequence[str],
        embeddings: EncodedTexts,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Add documents or replace those of the same ids; otherwise as `add`."""
        self._extend(ids, embeddings, documents, replace=True)

    def delete(self, ids: Sequence[str]) -> int:
        """Remove documents; ids that are not there are passed over. Returns how many were removed.

        Raises:
            TypeError: `ids` is one string.
        """
        if isinstance(ids, str):
            raise TypeError("ids must be a list of strings")
        numbers: dict[int, list[int]] = {}
        for document in ids:
            place = self._place_of.pop(document, None)
            if place is not None:
                numbers.setdefault(place >> _PLACE_BITS, []).append(place & (1 << _PLACE_BITS) - 1)
        for serial, own in numbers.items():
            self._by_serial[serial].delete(own)
        return sum(map(len, numbers.values()))

    def _extend(
        self,
        ids: Sequence[str],
        embeddings: EncodedTexts,
        documents: Sequence[Mapping[str, Any]] | None,
        *,
        replace: bool,
    ) -> None:
        if isinstance(ids, str) or not all(isinstance(document, str) for document in ids):
            raise TypeError("ids must be a list of strings")
        documents = [{}] * len(ids) if documents is None else documents
        if not len(ids) == len(embeddings) == len(documents):
            raise ValueError(
                f"{len(ids)} ids, {len(embeddings)} embeddings and {len(documents)} documents; must be equal"
            )
        seen: set[str] = set()
        for document in ids:
            if document in seen or (document in self._place_of and not replace):
                raise ValueError(f"the id {document!r} is {'twice in ids' if document in seen else 'in the index'}")
            seen.add(document)
        if not ids:
            return
        widths = _widths(embeddings)
        _check_values("embeddings", embeddings)
        if embeddings.sparse is not None:
            check_batch_values("embeddings.sparse", embeddings.sparse.token_ids, embeddings.sparse.offsets)
        row_format = _row_format(embeddings.multi_vector, self.row_bits)
        if self._widths is not None and (widths, row_format) != (self._widths, self._row_format):
            raise ValueError(
                f"embeddings have {_describe(widths, row_format)}; the index has"
                f" {_describe(self._widths, self._row_format)}"
            )
        segment = Segment.of(ids, documents, embeddings, self.row_bits)
        self._widths, self._row_format = widths, row_format
        self.delete(ids)
        self._pending.append(self._placed(IndexedSegment(segment), enumerate(ids)))

    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        """For those of `ids` that the index holds, the digest of what was stored (fingerprint.document_digest)."""
        return {name: document_digest(self.document(name)) for name in ids if name in self}

    def document(self, document: str) -> dict[str, Any]:
        """What was stored with the document of this id.

        Raises:
            KeyError: there is no such id.
        """
        place = self._place_of.get(document)
        if place is None:
            raise KeyError(f"there is no document {document!r} in the index")
        return self._by_serial[place >> _PLACE_BITS].segment.document(place & (1 << _PLACE_BITS) - 1)

    def documents(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """`document` of each id."""
        return [self.document(name) for name in ids]

    def search(
        self,
        queries: EncodedTexts,
        k: int = 10,
        *,
        head: Head = "all",
        weights: tuple[float, float, float] = DEFAULT_WEIGHTS,
        candidates: int = CANDIDATES,
        rerank: int | None = RERANK,
        encode: Encode | None = None,
    ) -> list[Ranking]:
        """The best k documents for every query (see m3model.retrieval.interface for what each head does).

        Args:
            queries: with every representation that the index holds.
            k: documents for each query; fewer come back from a smaller index, and from the sparse head where fewer
                documents share a token with the query.
            weights: of dense, sparse and multi-vector.
            candidates: documents that the dense and the sparse head each contribute; at least k count.
            rerank: how many of them the multi-vector head scores, at least k; None: every document of the index.
            encode: for an index without multi-vectors: makes those of the documents to be reranked, out of the JSON
                objects that were stored with them (`model.encode([object["text"] for object in objects])`).

        Raises:
            ValueError: k, candidates or rerank below 1, an unknown head or one whose representations the index lacks,
                weights as in m3model.scoring.combine, queries without a representation or of other widths.
        """
        for name, value in (("k", k), ("candidates", candidates), ("rerank", 1 if rerank is None else rerank)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; accepted: a whole number of at least 1")
        if head not in get_args(Head):
            raise ValueError(f"head is {head!r}; accepted: {', '.join(get_args(Head))}")
        check_weights(weights)
        self._settle()
        if self._widths is None or not self._segments:
            return [_empty_ranking() for _ in range(len(queries))]
        needed = {"dense+sparse": ("dense", "sparse"), "all": _PARTS}.get(head, (head,))
        made = () if encode is None else ("multi_vector",)
        if absent := [part for part in needed if part not in (*self._widths, *made)]:
            raise ValueError(
                f"head is {head!r}, but the index has no {', '.join(absent)}; it has {', '.join(self.parts)}"
            )
        if "multi_vector" in self._widths or "multi_vector" not in needed:
            encode = None
        self._check_queries(queries, made if encode is not None else ())
        rankings: list[Ranking] = []
        for begin in range(0, len(queries), _QUERY_BLOCK):
            block = queries.select(slice(begin, begin + _QUERY_BLOCK))
            rankings += self._search_block(block, k, head, weights, max(candidates, k), rerank, encode)
        return rankings

    def check_model(self, fingerprint: str) -> None:
        """Raise ValueError unless the index was made by the model of this fingerprint."""
        if self.fingerprint is not None and not same_model(self.fingerprint, fingerprint):
            made_by = f" (it was made by {self.metadata['model']})" if "model" in self.metadata else ""
            raise ValueError(f"the model is not the one that made the index{made_by}; their vectors do not fit")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index folder, or bring it up to date; atomic (see m3model.retrieval.storage).

        An index that was loaded from `path` or saved there before adds to it what is new; any other replaces it.

        Raises:
            FileExistsError: `path` is a file, or a folder with other things in it.
            RuntimeError: another process writes it, or changed it since this index was loaded.
        """
        folder = Path(os.path.abspath(path))
        self._settle()
        here = self._stored_in is not None and self._stored_in[0] == folder and is_index(folder)
        generation = self._stored_in[1] if here and self._stored_in else None
        stored = write_index(folder, self._segments, self.fingerprint, self.metadata, generation)
        self._stored_in = (folder, stored)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = True) -> ExactIndex:
        """Open an index folder; its arrays are mapped into memory.

        Args:
            verify: compare all files with their checksums, which reads them once; sizes and shapes are always compared.

        Raises:
            FileNotFoundError: no index there, or a file of it is missing.
            ValueError: damaged, truncated, foreign or of another version; the message says which file.
        """
        folder = Path(os.path.abspath(path))
        manifest, segments = read_index(folder, verify=verify)
        index = cls(manifest.fingerprint, manifest.metadata)
        for held in segments:
            facts = (_held_widths(held.segment), _row_format(held.segment.multi_vector))
            if index._widths is not None and facts != (index._widths, index._row_format):
                raise ValueError(f"{folder}: {held.name} has {_describe(*facts)}, the segments before it have others")
            index._widths, index._row_format = facts
            if held.segment.codes is not None:
                index.row_bits = 8 if held.segment.codes.rows.bits == 8 else 1
            index._segments.append(index._placed(held, held.living_ids()))
        if len(index) != sum(held.living for held in segments):
            raise ValueError(f"{folder} is damaged: a document id occurs twice")
        index._stored_in = (folder, manifest.generation)
        return index

    @classmethod
    def union(cls, indexes: Sequence[ExactIndex], *, parts: Sequence[str] | None = None) -> ExactIndex:
        """An index over the documents of all `indexes`, which shares their arrays.

        Args:
            indexes: with different ids, made by one model.
            parts: which representations it searches; default all that they hold.

        Raises:
            ValueError: an id occurs twice, the models or widths differ, or a representation is not there.
        """
        union = cls(indexes[0].fingerprint if indexes else None)
        for index in indexes:
            if union.fingerprint is not None and index.fingerprint is not None:
                union.check_model(index.fingerprint)
            for held in (*index._segments, *index._pending):
                segment = held.segment if parts is None else held.segment.only(parts)
                facts = (_held_widths(segment), _row_format(segment.multi_vector))
                if union._widths is not None and facts != (union._widths, union._row_format):
                    before_it = _describe(union._widths, union._row_format)
                    raise ValueError(f"an index has {_describe(*facts)}, the ones before it {before_it}")
                union._widths, union._row_format = facts
                before = len(union)
                shared = held.share(segment)
                union._segments.append(union._placed(shared, shared.living_ids()))
                if len(union) != before + held.living:
                    raise ValueError("a document id occurs in two of the indexes")
        return union

    def _placed(self, held: IndexedSegment, living: Iterable[tuple[int, str]]) -> IndexedSegment:
        """Note where the documents of a segment are, given the number and id of each that is not deleted."""
        first = self._next_serial << _PLACE_BITS
        self._by_serial[self._next_serial] = held
        self._next_serial += 1
        self._place_of.update((document, first + number) for number, document in living)
        return held

    def _settle(self) -> None:
        """Make a segment of what was added, merged with those before it that are not much larger."""
        parts, self._pending = self._pending, []
        size = sum(part.nbytes for part in parts)
        while parts and self._segments and self._segments[-1].segment.nbytes <= min(2 * size, _MERGE_LIMIT - size):
            held = self._segments.pop()
            size += held.segment.nbytes
            parts.insert(0, held)
        kept = [[held] for held in self._segments] + ([parts] if parts else [])
        if len(kept) == len(self._segments) and all(2 * held.living >= len(held) for held in self._segments):
            return
        self._segments = []
        for group in kept:
            living = sum(held.living for held in group)
            if len(group) == 1 and 2 * living >= len(group[0]) and living:
                self._segments.append(group[0])
            elif living:
                merged = Segment.concatenate([held.compacted() for held in group if held.living])
                self._segments.append(self._placed(IndexedSegment(merged), enumerate(merged.ids.strings())))
        present = {id(held) for held in self._segments}
        self._by_serial = {serial: held for serial, held in self._by_serial.items() if id(held) in present}

    def _numbered(self) -> Iterator[tuple[int, IndexedSegment]]:
        """Number of the first document of each segment, those deleted counted, and the segment."""
        begin = 0
        for held in self._segments:
            yield begin, held
            begin += len(held)

    def _deleted(self) -> NDArray[np.bool_] | None:
        """For every number whether its document was deleted; None if none was."""
        if all(held.deleted is None for held in self._segments):
            return None
        marks = [np.zeros(len(held), np.bool_) if held.deleted is None else held.deleted for held in self._segments]
        return np.concatenate(marks)

    def _check_queries(self, queries: EncodedTexts, made: Sequence[str]) -> None:
        """Raise ValueError unless they have what the index holds and what will be made of its documents."""
        assert self._widths is not None
        widths = _widths(queries)
        if absent := [part for part in made if part not in widths]:
            raise ValueError(f"queries have no {', '.join(absent)}, which the documents are reranked by")
        for part, width in self._widths.items():
            if part not in widths:
                raise ValueError(f"queries have no {part}, which the index holds")
            if widths[part] != width:
                raise ValueError(f"{part} of queries has width {widths[part]}; the index has {width}")
        _check_values("queries", queries)

    def _search_block(
        self,
        queries: EncodedTexts,
        k: int,
        head: Head,
        weights: tuple[float, float, float],
        candidates: int,
        rerank: int | None,
        encode: Encode | None,
    ) -> list[Ranking]:
        reranking = head in ("multi_vector", "all")
        firsts = [part for part in ("dense", "sparse") if part in self.parts and (reranking or part in head.split("+"))]
        if reranking and (rerank is None or not firsts):
            found = [self._living_numbers()] * len(queries)
            scores = [self._first_scores(queries, query, numbers) for query, numbers in enumerate(found)]
        else:
            depth = k if head in ("dense", "sparse") else candidates
            best = {"dense": self._best_dense, "sparse": self._best_sparse}
            lists = [best[part](queries, depth) for part in firsts]
            found = [np.unique(np.concatenate(numbers)) for numbers in zip(*lists)]
            scores = [self._first_scores(queries, query, numbers) for query, numbers in enumerate(found)]
            depth = max(rerank, k) if reranking and rerank is not None else k
            for query, numbers in enumerate(found):
                kept = np.sort(_order(_first_stage(scores[query], firsts, weights), numbers)[:depth])
                found[query] = numbers[kept]
                scores[query] = {part: values[kept] for part, values in scores[query].items()}
        if "multi_vector" in self.parts or encode is not None:
            columns = (
                self._multi_vector_scores(queries, found) if encode is None else self._made(queries, found, encode)
            )
            for query, values in enumerate(columns):
                scores[query]["multi_vector"] = values
        rankings = []
        for numbers, own in zip(found, scores):
            if reranking:
                score = own["multi_vector"] if head == "multi_vector" else _weighted(own, weights)
            else:
                score = _first_stage(own, firsts, weights)
            order = _order(score, numbers)[:k]
            ids = [self._id(number) for number in numbers[order].tolist()]
            rankings.append(Ranking(ids, score[order], *(own[p][order] if p in own else None for p in _PARTS)))
        return rankings

    def _living_numbers(self) -> Numbers:
        deleted = self._deleted()
        return np.arange(len(self), dtype=np.int64) if deleted is None else np.flatnonzero(~deleted)

    def _id(self, number: int) -> str:
        held, local = self._at(number)
        return held.segment.ids[local]

    def _at(self, number: int) -> tuple[IndexedSegment, int]:
        """Segment of a document and its number there."""
        for begin, held in self._numbered():
            if number < begin + len(held):
                return held, number - begin
        raise AssertionError("every number lies in a segment")

    def _best_dense(self, queries: EncodedTexts, depth: int) -> list[Numbers]:
        """Numbers of the `depth` documents of the largest dense score, of each query, in ascending order."""
        count = len(queries)
        assert queries.dense is not None
        scores = np.zeros((count, 0), dtype=np.float32)
        numbers = np.zeros((count, 0), dtype=np.int64)
        for begin, held in self._numbered():
            dense = held.segment.embeddings.dense
            assert dense is not None
            step = max(_SCORE_BLOCK // count, 1)
            for first in range(0, len(held), step):
                last = min(first + step, len(held))
                block = queries.dense @ dense[first:last].T
                if held.deleted is not None:
                    block[:, held.deleted[first:last]] = -np.inf
                fresh = np.broadcast_to(np.arange(begin + first, begin + last), block.shape)
                scores = np.concatenate([scores, block], axis=1)
                numbers = np.concatenate([numbers, fresh], axis=1)
                scores, numbers = _keep_best(scores, numbers, depth)
        return [row[score > -np.inf] for row, score in zip(numbers, scores)]

    def _best_sparse(self, queries: EncodedTexts, depth: int) -> list[Numbers]:
        """As `_best_dense`, of the largest sparse score; only documents that share a token with the query."""
        assert queries.sparse is not None
        index = SparseIndex.of_segments([part for held in self._segments for part in held.inverted.segments()])
        deleted = self._deleted()
        wanted = min(depth, len(index))
        while True:
            listed = index.search(_plain(queries.sparse), wanted).passages.numpy()
            found = [row[row >= 0] for row in listed]
            if deleted is None:
                break
            # Of the `wanted` best the living ones are the best among the living.
            full = [len(row) == wanted for row in found]
            found = [row[~deleted[row]] for row in found]
            if wanted == len(index) or all(len(row) >= depth for row, more in zip(found, full) if more):
                break
            wanted = min(2 * wanted, len(index))
        return [np.sort(row[:depth]) for row in found]

    def _first_scores(self, queries: EncodedTexts, query: int, numbers: Numbers) -> dict[str, Scores]:
        """Dense and sparse scores of one query with the documents of these ascending numbers."""
        scores: dict[str, list[Scores]] = {part: [] for part in ("dense", "sparse") if part in self.parts}
        one = queries.select([query])
        for begin, held in self._numbered():
            local = _within(numbers, begin, len(held))
            stored = held.segment.embeddings
            if "dense" in scores:
                assert one.dense is not None and stored.dense is not None
                scores["dense"].append(stored.dense[local] @ one.dense[0])
            if "sparse" in scores:
                chosen = type(stored)(sparse=stored.sparse).select(local.tolist()).sparse
                assert one.sparse is not None and chosen is not None
                scores["sparse"].append(sparse_scores(_plain(one.sparse), chosen)[0].numpy())
        return {part: np.concatenate(values) for part, values in scores.items()}

    def _multi_vector_scores(self, queries: EncodedTexts, found: Sequence[Numbers]) -> list[Scores]:
        """MaxSim of each query with the documents of its numbers, which need not be in order."""
        assert queries.multi_vector is not None
        results: list[Scores] = [np.zeros(len(numbers), dtype=np.float32) for numbers in found]
        for begin, held in self._numbered():
            stored = held.segment.multi_vector
            assert stored is not None
            places = [np.flatnonzero((begin <= numbers) & (numbers < begin + len(held))) for numbers in found]
            listed = [numbers[place] - begin for numbers, place in zip(found, places)]
            for result, place, values in zip(results, places, listed_scores(queries.multi_vector, stored, listed)):
                result[place] = values
        return results

    def _made(self, queries: EncodedTexts, found: Sequence[Numbers], encode: Encode) -> list[Scores]:
        """As `_multi_vector_scores`, with multi-vectors made of the documents' JSON objects, each once."""
        assert queries.multi_vector is not None
        chosen = np.unique(np.concatenate(found))
        contents = [held.segment.document(local) for held, local in map(self._at, chosen.tolist())]
        places = [np.searchsorted(chosen, numbers) for numbers in found]
        return scores_of_encoded(queries.multi_vector, contents, places, encode)


def _plain(batch: SparseBatch) -> SparseBatch:
    return SparseBatch(batch.token_ids, batch.weights.float(), batch.offsets)


def _keep_best(scores: Scores, numbers: Numbers, count: int) -> tuple[Scores, Numbers]:
    """The `count` largest of each row, the first of equal ones, in the order of the columns."""
    width = scores.shape[1]
    if width <= count:
        return scores, numbers
    least = np.partition(scores, width - count, axis=1)[:, width - count, None]
    above, equal = scores > least, scores == least
    kept = above | (equal & (equal.cumsum(axis=1) <= count - above.sum(axis=1, keepdims=True)))
    return scores[kept].reshape(len(scores), count), numbers[kept].reshape(len(scores), count)


def _order(scores: Scores, numbers: Numbers) -> Numbers:
    """Positions by falling score; equal scores by rising number."""
    return np.lexsort((numbers, -scores))


def _weighted(scores: Mapping[str, Scores], weights: tuple[float, float, float]) -> Scores:
    """Weighted mean of the scores that are there, as m3model.scoring.combine."""
    used = [(weight, scores[part]) for part, weight in zip(_PARTS, weights) if part in scores]
    total = sum(weight for weight, _ in used)
    mean: Scores = np.sum([np.float32(weight / total) * values for weight, values in used], axis=0)
    return mean


def _first_stage(scores: Mapping[str, Scores], parts: Sequence[str], weights: tuple[float, float, float]) -> Scores:
    """Score by which candidates are chosen: of the one head, or the weighted mean of dense and sparse."""
    return scores[parts[0]] if len(parts) == 1 else _weighted({part: scores[part] for part in parts}, weights)


def _within(numbers: Numbers, begin: int, count: int) -> Numbers:
    """Those of the ascending numbers that lie in a segment, counted from its begin."""
    first, last = np.searchsorted(numbers, (begin, begin + count))
    return numbers[first:last] - begin


def _widths(embeddings: EncodedTexts) -> dict[str, int]:
    """Width of each representation that is there; the sparse one has none and counts 0."""
    widths = {}
    if embeddings.dense is not None:
        if embeddings.dense.ndim != 2 or embeddings.dense.dtype != np.float32:
            raise ValueError(f"dense must be float32 [N, E], got {embeddings.dense.dtype} {embeddings.dense.shape}")
        widths["dense"] = int(embeddings.dense.shape[1])
    if embeddings.sparse is not None:
        widths["sparse"] = 0
    if embeddings.multi_vector is not None:
        widths["multi_vector"] = int(embeddings.multi_vector.rows.shape[1])
    if not widths:
        raise ValueError("the embeddings have neither dense nor sparse nor multi_vector")
    return widths


def _held_widths(segment: Segment) -> dict[str, int]:
    """As `_widths`, of a segment, whose multi-vectors may be codes."""
    if segment.codes is None:
        return _widths(segment.embeddings)
    others = segment.embeddings
    widths = {} if others.dense is None and others.sparse is None else _widths(others)
    return {**widths, "multi_vector": segment.codes.rows.width}


def _row_format(vectors: MultiVectors | CodedVectors | None, bits: RowBits | None = None) -> str | None:
    """What multi-vectors are kept as; bits: of the codes that will be made of them."""
    if vectors is None:
        return None
    if isinstance(vectors, CodedVectors):
        return f"{vectors.rows.bits} bits"
    return str(vectors.rows.dtype) if bits is None else f"{bits} bits"


def _check_values(name: str, embeddings: EncodedTexts) -> None:
    """Raise ValueError for NaN or infinity, which no ranking can order."""
    if embeddings.dense is not None and not np.isfinite(embeddings.dense).all():
        raise ValueError(f"{name} have dense values that are not finite")
    if embeddings.sparse is not None:
        weights = embeddings.sparse.weights
        if not torch.isfinite(weights).all() or (weights < 0).any():
            raise ValueError(f"{name} have token weights that are negative or not finite")
    if embeddings.multi_vector is not None and not torch.isfinite(embeddings.multi_vector.rows).all():
        raise ValueError(f"{name} have multi-vector values that are not finite")


def _describe(widths: Mapping[str, int], row_format: str | None) -> str:
    parts = [f"{part} of width {width}" if width else part for part, width in widths.items()]
    return ", ".join(parts) + (f" ({row_format})" if row_format else "")


def _empty_ranking() -> Ranking:
    nothing = np.zeros(0, dtype=np.float32)
    return Ranking([], nothing, nothing, nothing, nothing)
