"""MilvusIndex: the search of ExactIndex in Milvus, embedded (milvus-lite, a file path) or a cluster (a URI).

Two collections hold an index NAME:

    NAME          key, dense FLOAT_VECTOR [E], sparse SPARSE_FLOAT_VECTOR, scalars JSON (for filters), digest, and how
                  many pieces the document's JSON and its multi-vectors have
    NAME_pieces   key/kind/number, content VARCHAR: base64 of 45 KiB of the JSON text or of float16 rows [L, C]; Milvus
                  has no field as large as the rows of one document

The entry in NAME is written after its pieces, in one upsert for each batch: a document is there completely or not at
all, and writing it again changes nothing. Searching and reranking:

    dense, sparse   Milvus's search on the field (inner product)
    dense+sparse    the union of both lists; what one list lacks is fetched and scored here, so that scores are those
                    of ExactIndex; fusion="rrf" asks Milvus's own hybrid search for reciprocal rank fusion instead
    multi_vector    pieces of the best `rerank` documents are fetched and compared by MaxSim; where the index
                    holds no multi-vectors, the documents' JSON is fetched and `encode` makes them

Milvus refuses empty sparse vectors: a text without tokens gets one token id that no tokenizer has, of weight 1e-30.
Strings in keys and filters are percent-encoded, since pymilvus puts them between quotes as they are.
"""

from __future__ import annotations

import base64
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args
from urllib.parse import quote, unquote

import numpy as np
import torch
from numpy.typing import NDArray

from m3kernels import SparseBatch, offsets_from_lengths
from m3kernels.sparse.batch import NO_ID
from m3model.embeddings import EncodedTexts, MultiVectors
from m3model.retrieval.fingerprint import document_digest, same_model
from m3model.retrieval.interface import CANDIDATES, RERANK, Head, Ranking
from m3model.retrieval.reranking import Encode, listed_scores, scores_of_encoded
from m3model.scoring import DEFAULT_WEIGHTS, check_weights

__all__ = ["MilvusIndex"]

_PARTS = ("dense", "sparse", "multi_vector")
_QUERY_BLOCK = 16
_KEY_BYTES = 4096
_PIECE_BYTES = 45 * 1024
_MESSAGE_BYTES = 16 << 20
_FETCH = 256
_SCALAR_CHARACTERS = 1024
_FORMAT = {"format": "m3model.retrieval.milvus", "version": 1}
_RRF_CONSTANT = 60
_EMPTY_SPARSE = {NO_ID: 1e-30}
_open_files: Counter[str] = Counter()
"""How many indexes of this process have a milvus-lite file open: they share one server, which holds the file's lock."""

Scores = NDArray[np.float32]
Filter = Mapping[str, "str | int | float | bool | Sequence[str | int | float | bool]"]


class MilvusIndex:
    """An index in Milvus; a `SearchIndex` with upsert, delete and filters.

    Attributes:
        place: URI and name.
        fingerprint: of the model that made the embeddings, or None.
        width: of dense vectors; row_width: of multi-vector rows, or None if the index holds none.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str],
        name: str = "m3",
        *,
        width: int | None = None,
        row_width: int | None = None,
        fingerprint: str | None = None,
        token: str = "",
        timeout: float = 10.0,
        dense_index: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the index, or make it if it is not there and `width` is given.

        Args:
            uri: a file path ending in .db for milvus-lite, otherwise such as "http://host:19530".
            name: of the collection: letters, digits and underscores.
            width, row_width: of dense vectors and multi-vector rows of a new index; checked against an existing one.
            fingerprint: of the model (m3model.retrieval.fingerprint); checked against that of an existing index.
            token: "user:password" or an API key of a cluster.
            timeout: seconds after which a silent Milvus is given up, for every request.
            dense_index: index type and parameters of the dense field of a new index; default FLAT, which is exact.

        Raises:
            ImportError: pymilvus is not installed.
            ConnectionError: no Milvus answers within `timeout`.
            FileNotFoundError: there is no such index and width is not given.
            ValueError: other widths, another model, or a collection that is no index of ours.
        """
        try:
            import pymilvus
        except ImportError as error:
            raise ImportError("MilvusIndex needs pymilvus and milvus-lite: pip install m3kernels[milvus]") from error
        if not name.isidentifier() or not name.isascii():
            raise ValueError(f"name is {name!r}; accepted: letters, digits and underscores, no digit first")
        self._milvus = pymilvus
        self._uri, self._name, self._timeout = os.fspath(uri), name, timeout
        self.place = f"{self._uri} {name}"
        try:
            self._client = pymilvus.MilvusClient(uri=self._uri, token=token, timeout=timeout)
            exists = self._client.has_collection(name, timeout=timeout)
        except Exception as error:
            raise ConnectionError(f"no Milvus answers at {self._uri} within {timeout:g} s: {_reason(error)}") from error
        self._closed = False
        self._file = os.path.abspath(self._uri) if self._uri.endswith(".db") else None
        if self._file is not None:
            _open_files[self._file] += 1
        try:
            if exists:
                self._open(width, row_width, fingerprint)
            elif width is None:
                raise FileNotFoundError(f"there is no index {name!r} at {self._uri}; give width to make one")
            else:
                self.width, self.row_width, self.fingerprint = width, row_width, fingerprint
                self._create(dict(dense_index or {"index_type": "FLAT"}))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leave the server; the last index of a file closes the file, so that another process can open it."""
        self._client.close()
        if self._file is None or self._closed:
            return
        self._closed = True
        _open_files[self._file] -= 1
        if not _open_files[self._file]:
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(self._uri)

    def __enter__(self) -> MilvusIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        counted = self._client.query(self._name, filter="", output_fields=["count(*)"], timeout=self._timeout)
        return int(counted[0]["count(*)"])

    def __contains__(self, document: object) -> bool:
        return isinstance(document, str) and bool(self.digests([document]))

    @property
    def parts(self) -> tuple[str, ...]:
        """The representations that the index holds."""
        return ("dense", "sparse") if self.row_width is None else ("dense", "sparse", "multi_vector")

    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        """For those of `ids` that the index holds, the digest of what was stored (fingerprint.document_digest)."""
        found = self._entries(ids, ["digest"])
        return {document: str(entry["digest"]) for document, entry in found.items()}

    def add(
        self,
        ids: Sequence[str],
        embeddings: EncodedTexts,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Add documents under new ids.

        Raises:
            ValueError: an id is in the index already; otherwise as `upsert`.
        """
        held = self.digests(ids)
        if held:
            raise ValueError(f"the id {next(iter(held))!r} is in the index")
        self.upsert(ids, embeddings, documents)

    def upsert(
        self,
        ids: Sequence[str],
        embeddings: EncodedTexts,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Add documents or replace those of the same ids. When it returns, all of them are stored.

        Args:
            ids: different strings.
            embeddings: dense and sparse, and multi-vectors if the index was made for them.
            documents: a JSON object for each. Its top-level strings (to 1024 characters), numbers and booleans can be
                filtered by.

        Raises:
            TypeError: an id is no string.
            ValueError: numbers differ, an id is there twice or too long, representations or widths do not fit the
                index, values are not finite.
        """
        documents = [{}] * len(ids) if documents is None else documents
        self._check(ids, embeddings, documents)
        batch: list[dict[str, Any]] = []
        pieces: list[dict[str, Any]] = []
        size = 0
        for entry, own in self._prepared(ids, embeddings, documents):
            batch.append(entry)
            pieces += own
            size += 4 * self.width + sum(len(piece["content"]) for piece in own)
            if size > _MESSAGE_BYTES or len(batch) == _FETCH:
                self._write(batch, pieces)
                batch, pieces, size = [], [], 0
        self._write(batch, pieces)

    def delete(self, ids: Sequence[str]) -> int:
        """Remove documents; ids that are not there are passed over. Returns how many were removed."""
        counts = self._entries(ids, ["document_pieces", "row_pieces"])
        for begin in range(0, len(counts), _FETCH):
            block = list(counts)[begin : begin + _FETCH]
            self._client.delete(self._name, ids=[_key(document) for document in block], timeout=self._timeout)
            leftover = [key for document in block for key in _piece_keys(document, counts[document])]
            self._client.delete(f"{self._name}_pieces", ids=leftover, timeout=self._timeout)
        return len(counts)

    def document(self, document: str) -> dict[str, Any]:
        """What was stored with the document of this id.

        Raises:
            KeyError: there is no such id.
        """
        return self.documents([document])[0]

    def documents(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """`document` of each id, asked for together.

        Raises:
            KeyError: an id is not there.
        """
        stored = self._stored(ids, "document")
        for document in ids:
            if document not in stored:
                raise KeyError(f"there is no document {document!r} in the index")
        return [json.loads(stored[document]) for document in ids]

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
        filter: Filter | None = None,
        fusion: Literal["weighted", "rrf"] = "weighted",
    ) -> list[Ranking]:
        """The best k documents for every query (see m3model.retrieval.interface for what each head does).

        Args:
            queries: with every representation that the head needs.
            k, weights, candidates, rerank, encode: as in ExactIndex.search; rerank None reranks all candidates.
            filter: {field: value or list of values}: only documents whose JSON has one of the values in each field.
            fusion: "rrf" for head "dense+sparse": scores are Σ 1 / (60 + rank) over the two lists, made by Milvus.

        Raises:
            ValueError: as ExactIndex.search; fusion "rrf" with another head.
        """
        for argument, value in (("k", k), ("candidates", candidates), ("rerank", 1 if rerank is None else rerank)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{argument} is {value!r}; accepted: a whole number of at least 1")
        if head not in get_args(Head):
            raise ValueError(f"head is {head!r}; accepted: {', '.join(get_args(Head))}")
        if fusion not in ("weighted", "rrf") or (fusion == "rrf" and head != "dense+sparse"):
            raise ValueError(f"fusion is {fusion!r} for head {head!r}; accepted: weighted, or rrf for dense+sparse")
        check_weights(weights)
        reranking = head in ("multi_vector", "all")
        if reranking and self.row_width is None and encode is None:
            raise ValueError(f"head is {head!r}, but the index has no multi_vector; it has dense, sparse")
        self._check_queries(queries, reranking)
        expression = _expression(filter)
        rankings: list[Ranking] = []
        for begin in range(0, len(queries), _QUERY_BLOCK):
            block = [_Query(queries, number) for number in range(begin, min(begin + _QUERY_BLOCK, len(queries)))]
            if fusion == "rrf":
                rankings += self._fused(block, k, max(candidates, k), expression)
                continue
            parts: tuple[str, ...] = ("dense", "sparse") if reranking or head == "dense+sparse" else (head,)
            depth = k if len(parts) == 1 else max(candidates, k)
            hits = {part: self._hits(block, part, depth, expression) for part in parts}
            found = [list(dict.fromkeys(d for part in parts for d in hits[part][place])) for place in range(len(block))]
            columns = self._first_scores(block, found, hits)
            if reranking:
                kept = None if rerank is None else max(rerank, k)
                found, columns = _best(found, columns, [_weighted(one, weights, parts) for one in columns], kept)
                self._add_row_scores(block, found, columns, encode)
                parts = ("multi_vector",) if head == "multi_vector" else ("dense", "sparse", "multi_vector")
            scores = [_weighted(one, weights, parts) for one in columns]
            found, columns = _best(found, [{**one, "score": score} for one, score in zip(columns, scores)], scores, k)
            rankings += self._complete(block, found, columns, reranking)
        return rankings

    def _complete(
        self, block: Sequence[_Query], found: list[list[str]], columns: list[dict[str, Scores]], reranked: bool
    ) -> list[Ranking]:
        """Rankings with the scores of every representation that index and queries have."""
        if not reranked and self.row_width is not None and all(query.rows is not None for query in block):
            self._add_row_scores(block, found, columns, None)
        return [
            Ranking(ids, one["score"], one.get("dense"), one.get("sparse"), one.get("multi_vector"))
            for ids, one in zip(found, columns)
        ]

    def _create(self, dense_index: dict[str, Any]) -> None:
        types = self._milvus.DataType
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("key", types.VARCHAR, is_primary=True, max_length=_KEY_BYTES)
        schema.add_field("dense", types.FLOAT_VECTOR, dim=self.width)
        schema.add_field("sparse", types.SPARSE_FLOAT_VECTOR)
        schema.add_field("scalars", types.JSON)
        schema.add_field("digest", types.VARCHAR, max_length=64)
        schema.add_field("document_pieces", types.INT64)
        schema.add_field("row_pieces", types.INT64)
        indexes = self._client.prepare_index_params()
        indexes.add_index("dense", metric_type="IP", **dense_index)
        indexes.add_index("sparse", metric_type="IP", index_type="SPARSE_INVERTED_INDEX")
        pieces = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        pieces.add_field("key", types.VARCHAR, is_primary=True, max_length=_KEY_BYTES + 32)
        pieces.add_field("content", types.VARCHAR, max_length=65535)
        # Milvus wants a vector in every collection.
        pieces.add_field("unused", types.FLOAT_VECTOR, dim=2)
        unused = self._client.prepare_index_params()
        unused.add_index("unused", metric_type="IP", index_type="FLAT")
        # The collection of entries appears last: an index that was cut off while it was made is not taken for one.
        made = f"{self._name}_pieces"
        if self._client.has_collection(made, timeout=self._timeout):
            self._client.drop_collection(made, timeout=self._timeout)
        for name, fields, index in ((made, pieces, unused), (self._name, schema, indexes)):
            self._client.create_collection(
                name, schema=fields, index_params=index, consistency_level="Strong", timeout=self._timeout
            )
            if name == made:
                facts = {**_FORMAT, "width": self.width, "row_width": self.row_width, "fingerprint": self.fingerprint}
                self._put_pieces([_piece("", "facts", 0, json.dumps(facts))])

    def _open(self, width: int | None, row_width: int | None, fingerprint: str | None) -> None:
        where = f"the collection {self._name!r} at {self._uri}"
        stored = []
        if self._client.has_collection(f"{self._name}_pieces", timeout=self._timeout):
            self._client.load_collection(f"{self._name}_pieces", timeout=self._timeout)
            stored = self._get(f"{self._name}_pieces", ["/facts/0"], ["content"])
        facts = json.loads(stored[0]["content"]) if stored else {}
        if any(facts.get(field) != value for field, value in _FORMAT.items()):
            raise ValueError(f"{where} is no index of m3model (version {_FORMAT['version']})")
        self.width, self.row_width = int(facts["width"]), facts["row_width"]
        self.fingerprint = facts["fingerprint"]
        for what, given, held in (("width", width, self.width), ("row_width", row_width, self.row_width)):
            if given is not None and given != held:
                raise ValueError(f"{what} is {given}, but {where} has {held}")
        if fingerprint is not None:
            self.check_model(fingerprint)
        self._client.load_collection(self._name, timeout=self._timeout)

    def check_model(self, fingerprint: str) -> None:
        """Raise ValueError unless the index was made by the model of this fingerprint."""
        if self.fingerprint is not None and not same_model(self.fingerprint, fingerprint):
            raise ValueError("the model is not the one that made the index; their vectors do not fit")

    def _check(self, ids: Sequence[str], embeddings: EncodedTexts, documents: Sequence[Mapping[str, Any]]) -> None:
        if isinstance(ids, str) or not all(isinstance(document, str) for document in ids):
            raise TypeError("ids must be a list of strings")
        if not len(ids) == len(embeddings) == len(documents):
            raise ValueError(
                f"{len(ids)} ids, {len(embeddings)} embeddings and {len(documents)} documents; must be equal"
            )
        seen: set[str] = set()
        for document in ids:
            if document in seen:
                raise ValueError(f"the id {document!r} is twice in ids")
            if not document or len(_key(document)) > _KEY_BYTES:
                raise ValueError(
                    f"the id {document[:80]!r} is empty or longer than {_KEY_BYTES} bytes, percent-encoded"
                )
            seen.add(document)
        self._check_widths("embeddings", embeddings, self.row_width is not None)

    def _check_queries(self, queries: EncodedTexts, reranking: bool) -> None:
        self._check_widths("queries", queries, reranking)

    def _check_widths(self, name: str, embeddings: EncodedTexts, rows_needed: bool) -> None:
        dense, sparse, rows = embeddings.dense, embeddings.sparse, embeddings.multi_vector
        absent = [
            part
            for part, value, needed in (
                ("dense", dense, True),
                ("sparse", sparse, True),
                ("multi_vector", rows, rows_needed),
            )
            if needed and value is None
        ]
        if absent:
            raise ValueError(f"{name} have no {', '.join(absent)}, which the index holds")
        assert dense is not None and sparse is not None
        if dense.ndim != 2 or dense.shape[1] != self.width:
            raise ValueError(f"dense of {name} is {dense.shape}; the index has width {self.width}")
        if not np.isfinite(dense).all() or not torch.isfinite(sparse.weights).all():
            raise ValueError(f"{name} have values that are not finite")
        if rows is not None and self.row_width is not None:
            if rows.rows.shape[1] != self.row_width:
                raise ValueError(
                    f"multi_vector of {name} has width {rows.rows.shape[1]}; the index has {self.row_width}"
                )
            if not torch.isfinite(rows.rows.half()).all():
                raise ValueError(f"{name} have multi-vector values that are not finite in float16")

    def _prepared(
        self, ids: Sequence[str], embeddings: EncodedTexts, documents: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Entry and pieces of each document."""
        assert embeddings.dense is not None and embeddings.sparse is not None
        lexical = embeddings.sparse.to_dicts()
        vectors = embeddings.multi_vector
        bounds = vectors.offsets.tolist() if vectors is not None else []
        for number, (document, content) in enumerate(zip(ids, documents)):
            text = json.dumps(content, ensure_ascii=False)
            own = _pieces(document, "document", text.encode("utf-8", "surrogatepass"))
            counts = {"document_pieces": len(own), "row_pieces": 0}
            if self.row_width is not None and vectors is not None:
                rows = vectors.rows[bounds[number] : bounds[number + 1]]
                stored = _pieces(document, "rows", rows.to(torch.float16).contiguous().numpy().tobytes())
                counts["row_pieces"] = len(stored)
                own += stored
            entry = {
                "key": _key(document),
                "dense": embeddings.dense[number],
                "sparse": lexical[number] or _EMPTY_SPARSE,
                "scalars": _scalars(content),
                "digest": document_digest(content),
                **counts,
            }
            yield entry, own

    def _write(self, batch: list[dict[str, Any]], pieces: list[dict[str, Any]]) -> None:
        if not batch:
            return
        before = self._entries([_document(entry["key"]) for entry in batch], ["document_pieces", "row_pieces"])
        self._put_pieces(pieces)
        self._client.upsert(self._name, batch, timeout=self._timeout)
        written = {piece["key"] for piece in pieces}
        stale = {key for document, counts in before.items() for key in _piece_keys(document, counts)} - written
        if stale:
            self._client.delete(f"{self._name}_pieces", ids=sorted(stale), timeout=self._timeout)

    def _put_pieces(self, pieces: list[dict[str, Any]]) -> None:
        step = max(_MESSAGE_BYTES // 65536, 1)
        for begin in range(0, len(pieces), step):
            self._client.upsert(f"{self._name}_pieces", pieces[begin : begin + step], timeout=self._timeout)

    def _get(self, collection: str, keys: Sequence[str], fields: Sequence[str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for begin in range(0, len(keys), _FETCH):
            block = list(keys[begin : begin + _FETCH])
            found += self._client.get(collection, ids=block, output_fields=["key", *fields], timeout=self._timeout)
        return found

    def _entries(self, ids: Sequence[str], fields: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Fields of the documents that are there, by id."""
        found = self._get(self._name, [_key(document) for document in ids], fields)
        return {_document(entry["key"]): entry for entry in found}

    def _contents(self, counts: Mapping[str, int], kind: str) -> dict[str, bytes]:
        """The bytes that were stored in pieces, of each document."""
        keys = [_piece_key(document, kind, number) for document, count in counts.items() for number in range(count)]
        texts = {piece["key"]: piece["content"] for piece in self._get(f"{self._name}_pieces", keys, ["content"])}
        if len(texts) < len(keys):
            raise ValueError(f"the index {self._name!r} is damaged: {len(keys) - len(texts)} pieces are missing")
        return {
            document: b"".join(base64.b64decode(texts[_piece_key(document, kind, number)]) for number in range(count))
            for document, count in counts.items()
        }

    def _hits(self, block: Sequence[_Query], part: str, depth: int, expression: str) -> list[dict[str, float]]:
        """Scores of the best documents of one field, for each query."""
        asked = [place for place, query in enumerate(block) if part == "dense" or query.sparse]
        hits: list[dict[str, float]] = [{} for _ in block]
        if not asked:
            return hits
        answers = self._client.search(
            self._name,
            data=[block[place].dense if part == "dense" else block[place].sparse for place in asked],
            anns_field=part,
            limit=depth,
            filter=expression,
            output_fields=["key"],
            search_params={"metric_type": "IP"},
            timeout=self._timeout,
        )
        for place, answer in zip(asked, answers):
            scores = {_document(hit["entity"]["key"]): float(hit["distance"]) for hit in answer}
            hits[place] = {name: score for name, score in scores.items() if part == "dense" or score > 0}
        return hits

    def _first_scores(
        self, block: Sequence[_Query], found: list[list[str]], hits: Mapping[str, list[dict[str, float]]]
    ) -> list[dict[str, Scores]]:
        """Dense and sparse scores of all documents found; those that no search gave are computed from their vectors."""
        columns: list[dict[str, Scores]] = [{} for _ in block]
        for part in ("dense", "sparse"):
            known = hits.get(part, [{}] * len(block))
            missing = {document for own, scores in zip(found, known) for document in own if document not in scores}
            stored = self._entries(sorted(missing), [part])
            for query, own, scores, one in zip(block, found, known, columns):
                values = [
                    scores[document] if document in scores else query.score(part, stored[document][part])
                    for document in own
                ]
                one[part] = np.array(values, dtype=np.float32)
        return columns

    def _add_row_scores(
        self, block: Sequence[_Query], found: list[list[str]], columns: list[dict[str, Scores]], encode: Encode | None
    ) -> None:
        """Put MaxSim of each query with its documents into columns["multi_vector"]; `encode` as in `search`."""
        if self.row_width is None:
            assert encode is not None
            self._add_encoded_scores(block, found, columns, encode)
            return
        for query, own, one in zip(block, found, columns):
            assert query.rows is not None
            stored = self._stored(own, "row")
            rows = [np.frombuffer(stored[document], dtype=np.float16).reshape(-1, self.row_width) for document in own]
            offsets = offsets_from_lengths(torch.tensor([len(part) for part in rows], dtype=torch.int32))
            passages = np.concatenate([np.zeros((0, self.row_width), dtype=np.float16), *rows])
            bounds = torch.tensor([0, len(query.rows)], dtype=torch.int32)
            stored_rows = MultiVectors(torch.from_numpy(passages), offsets)
            (one["multi_vector"],) = listed_scores(MultiVectors(query.rows, bounds), stored_rows, [np.arange(len(own))])

    def _add_encoded_scores(
        self, block: Sequence[_Query], found: list[list[str]], columns: list[dict[str, Scores]], encode: Encode
    ) -> None:
        chosen = sorted({document for own in found for document in own})
        stored = self._stored(chosen, "document")
        place = {document: number for number, document in enumerate(chosen)}
        rows = [query.rows for query in block if query.rows is not None]
        offsets = offsets_from_lengths(torch.tensor([len(part) for part in rows], dtype=torch.int32))
        candidates = [np.array([place[document] for document in own], dtype=np.int64) for own in found]
        contents = [json.loads(stored[document]) for document in chosen]
        for one, scores in zip(
            columns, scores_of_encoded(MultiVectors(torch.cat(rows), offsets), contents, candidates, encode)
        ):
            one["multi_vector"] = scores

    def _stored(self, ids: Sequence[str], what: Literal["document", "row"]) -> dict[str, bytes]:
        """JSON or rows of documents that the index holds, as they were stored."""
        entries = self._entries(ids, [f"{what}_pieces"])
        counts = {document: int(entry[f"{what}_pieces"]) for document, entry in entries.items()}
        return self._contents(counts, "rows" if what == "row" else what)

    def _fused(self, block: Sequence[_Query], k: int, depth: int, expression: str) -> list[Ranking]:
        """Milvus's own reciprocal rank fusion of both fields."""
        found: list[list[str]] = []
        fused: list[Scores] = []
        for query in block:
            vectors: dict[str, Any] = {"dense": query.dense} | ({"sparse": query.sparse} if query.sparse else {})
            requests = [
                self._milvus.AnnSearchRequest([vector], part, {"metric_type": "IP"}, depth, expression or None)
                for part, vector in vectors.items()
            ]
            ranker = self._milvus.RRFRanker(_RRF_CONSTANT)
            answer = self._client.hybrid_search(
                self._name, requests, ranker, limit=k, output_fields=["key"], timeout=self._timeout
            )[0]
            found.append([_document(hit["entity"]["key"]) for hit in answer])
            fused.append(np.array([hit["distance"] for hit in answer], dtype=np.float32))
        columns = self._first_scores(block, found, {})
        for one, score in zip(columns, fused):
            one["score"] = score
        return self._complete(block, found, columns, reranked=False)


class _Query:
    """The representations of one query."""

    def __init__(self, queries: EncodedTexts, number: int) -> None:
        one = queries.select([number])
        assert one.dense is not None and one.sparse is not None
        self.dense: Scores = one.dense[0].astype(np.float32)
        self.sparse = SparseBatch(one.sparse.token_ids, one.sparse.weights.float(), one.sparse.offsets).to_dicts()[0]
        self.rows = one.multi_vector.rows if one.multi_vector is not None else None

    def score(self, part: str, stored: Any) -> float:
        if part == "dense":
            return float(np.asarray(stored, dtype=np.float32) @ self.dense)
        return float(sum(weight * self.sparse.get(int(token), 0.0) for token, weight in stored.items()))


def _key(document: str) -> str:
    return quote(document, safe=" #:,;=+@()", errors="surrogatepass")


def _document(key: str) -> str:
    return unquote(key, errors="surrogatepass")


def _piece_key(document: str, kind: str, number: int) -> str:
    return f"{_key(document)}/{kind}/{number}"


def _piece_keys(document: str, counts: Mapping[str, Any]) -> Iterator[str]:
    for kind, field in (("document", "document_pieces"), ("rows", "row_pieces")):
        for number in range(int(counts[field])):
            yield _piece_key(document, kind, number)


def _piece(document: str, kind: str, number: int, content: str) -> dict[str, Any]:
    return {"key": _piece_key(document, kind, number), "content": content, "unused": [0.0, 0.0]}


def _pieces(document: str, kind: str, content: bytes) -> list[dict[str, Any]]:
    parts = [content[begin : begin + _PIECE_BYTES] for begin in range(0, len(content), _PIECE_BYTES)]
    return [_piece(document, kind, number, base64.b64encode(part).decode("ascii")) for number, part in enumerate(parts)]


def _scalars(document: Mapping[str, Any]) -> dict[str, Any]:
    """The top-level values that can be filtered by; strings percent-encoded."""
    kept: dict[str, Any] = {}
    for field, value in document.items():
        if isinstance(value, str) and len(value) <= _SCALAR_CHARACTERS:
            kept[_key(field)] = _key(value)
        elif isinstance(value, (bool, int, float)):
            kept[_key(field)] = value
    return kept


def _expression(chosen: Filter | None) -> str:
    """Milvus's boolean expression of a filter."""
    conditions = []
    for field, values in (chosen or {}).items():
        listed = list(values) if isinstance(values, (list, tuple, set)) else [values]
        if not listed or not all(isinstance(value, (str, bool, int, float)) for value in listed):
            raise ValueError(
                f"filter[{field!r}] is {values!r}; accepted: a string, number or boolean, or a list of them"
            )
        tests = [f'scalars["{_key(field)}"] == {json.dumps(_key(v) if isinstance(v, str) else v)}' for v in listed]
        conditions.append("(" + " or ".join(tests) + ")")
    return " and ".join(conditions)


def _best(
    found: list[list[str]], columns: list[dict[str, Scores]], scores: list[Scores], depth: int | None
) -> tuple[list[list[str]], list[dict[str, Scores]]]:
    """Documents and columns in the order of falling score, cut to `depth`; equal scores keep their order."""
    orders = [np.argsort(-score, kind="stable")[:depth] for score in scores]
    ids = [[own[place] for place in order] for own, order in zip(found, orders)]
    return ids, [{part: values[order] for part, values in one.items()} for one, order in zip(columns, orders)]


def _weighted(columns: Mapping[str, Scores], weights: tuple[float, float, float], used: Iterable[str]) -> Scores:
    """Weighted mean of the scores in use, as m3model.scoring.combine; of one alone, the score itself."""
    chosen = [part for part in _PARTS if part in used]
    if len(chosen) == 1:
        return columns[chosen[0]]
    weight_of = dict(zip(_PARTS, weights))
    total = sum(weight_of[part] for part in chosen)
    mean = np.zeros_like(columns[chosen[0]])
    for part in chosen:
        mean += np.float32(weight_of[part] / total) * columns[part]
    return mean


def _reason(error: Exception) -> str:
    return str(getattr(error, "message", "") or error or type(error).__name__).splitlines()[0]
