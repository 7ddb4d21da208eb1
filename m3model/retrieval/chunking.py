"""Documents longer than the model: overlapping windows in the index, the parent document in the answer (MaxP).

    chunks           text -> windows of at most `length` tokens that share `overlap` tokens with the one before
    search_parents   the windows' ranking, a document standing at the place of its best window (Dai & Callan 2019, MaxP)
    parent_document  the document that was cut, out of its windows in an index
    WindowedStream   between a stream of documents and ingest_stream: cuts them, and encodes each window by itself or in
                     its context (m3model.retrieval.late_chunking)

Windows are cut between words where there are any, so that a word keeps its tokens, and never hold more than `length`
tokens when they are tokenized by themselves. A window's id is its document's id, "#" and its number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from m3model.embeddings import EncodedTexts
from m3model.retrieval.interface import Ranking, SearchIndex
from m3model.retrieval.late_chunking import encode_late
from m3model.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from m3model.model import M3Model
    from m3model.retrieval.exact import ExactIndex
    from m3model.retrieval.milvus import MilvusIndex

__all__ = ["Chunk", "ParentRanking", "WindowedStream", "chunks", "parent_document", "parent_of", "search_parents"]

_FIRST_FACTOR = 4


class Chunk(NamedTuple):
    """A window of a document: its id, its text, and where it lies in the document (characters)."""

    id: str
    text: str
    begin: int
    end: int


@dataclass(frozen=True)
class ParentRanking(Ranking):
    """Documents, each with the scores of its best window.

    Attributes:
        windows: [k] ids of those windows.
    """

    windows: list[str]


def chunks(
    document: str,
    text: str,
    tokenizer: TextTokenizer,
    *,
    length: int = 512,
    overlap: int = 64,
    prefix: str = "",
) -> list[Chunk]:
    """The windows of a text, at least one.

    Args:
        document: id of the document.
        text: of any length.
        tokenizer: of the model.
        length: tokens of a window, special tokens and prefix included.
        overlap: tokens that a window shares with the one before, about.
        prefix: the model's prefix for passages.

    Raises:
        ValueError: length leaves no room, or overlap is not below half of it.
    """
    tokenizer.check_max_length(length)
    room = length - tokenizer.overhead - len(_token_begins(tokenizer, prefix))
    if not overlap >= 0 or room < 2 or overlap > room // 2:
        raise ValueError(
            f"overlap is {overlap}, length {length}; accepted: a length with room beside special tokens and prefix,"
            " and an overlap of at most half of that room"
        )
    tokens = _token_begins(tokenizer, text)
    if len(tokens) <= room:
        return [Chunk(f"{document}#0", text, 0, len(text))]
    units = _Units(text, tokens)
    found: list[Chunk] = []
    first, last = 0, _last_unit(tokenizer, units, 0, room)
    while True:
        begin, end = units.begins[first], units.begins[last]
        found.append(Chunk(f"{document}#{len(found)}", text[begin:end], begin, end))
        if last == len(units):
            return found
        shared = int(np.searchsorted(units.tokens, units.tokens[last] - overlap, side="right")) - 1
        first = units.word_begin(max(min(shared, last), first + 1), first + 1)
        following = _last_unit(tokenizer, units, first, room)
        if following <= last:
            # A window that begins inside a long word can hold less than the one before; then they share nothing.
            first, following = last, _last_unit(tokenizer, units, last, room)
        last = following


def parent_of(chunk: str) -> str:
    """Id of the document that a window belongs to.

    Raises:
        ValueError: the id is not one of a window.
    """
    parent, mark, number = chunk.rpartition("#")
    if not mark or not number.isdigit():
        raise ValueError(f"{chunk!r} is no id of a window; accepted: a document's id, '#' and a number")
    return parent


def search_parents(index: SearchIndex, queries: EncodedTexts, k: int = 10, **options: Any) -> list[ParentRanking]:
    """The best k documents for every query, in an index of windows.

    Args:
        index: its ids are those of `chunks`.
        queries, options: as for the index's `search`.
        k: documents; more windows are asked for until that many documents are among them.

    Returns:
        Rankings of document ids, with the scores and the id of each document's best window.

    Raises:
        ValueError: as the index's `search`, or an id that is not one of a window.
    """
    results: list[ParentRanking | None] = [None] * len(queries)
    depth = _FIRST_FACTOR * k
    open_queries = list(range(len(queries)))
    while open_queries:
        rankings = index.search(queries.select(open_queries), depth, **options)
        following = []
        for query, ranking in zip(open_queries, rankings):
            best: dict[str, int] = {}
            for place, chunk in enumerate(ranking.ids):
                best.setdefault(parent_of(chunk), place)
            if len(best) < k and len(ranking) == depth:
                following.append(query)
                continue
            places = np.array(list(best.values())[:k], dtype=np.int64)
            columns = (ranking.dense, ranking.sparse, ranking.multi_vector)
            dense, sparse, multi_vector = (None if part is None else part[places] for part in columns)
            windows = [ranking.ids[place] for place in places.tolist()]
            results[query] = ParentRanking(list(best)[:k], ranking.score[places], dense, sparse, multi_vector, windows)
        open_queries, depth = following, 2 * depth
    return [ranking for ranking in results if ranking is not None]


def parent_document(index: SearchIndex, parent: str) -> dict[str, Any]:
    """The document whose windows a WindowedStream put into the index: its text and other fields.

    Raises:
        KeyError: the index has no window of it.
    """
    content = index.document(f"{parent}#0")
    text, number = str(content["text"]), 1
    while (name := f"{parent}#{number}") in index:
        window = index.document(name)
        text += window["text"][len(text) - window["window"]["begin"] :]
        number += 1
    return {**{field: value for field, value in content.items() if field != "window"}, "text": text}


class WindowedStream:
    """Windows of documents for `ingest_stream`, which takes `windows(documents)` and `encode`.

    A window's JSON object is that of its document with the window's text, and "window": where it lies and in which
    document; with `late` also the hash of the whole text, so that a window is encoded again when its context changes. A
    document that comes again with fewer windows loses the others.
    """

    def __init__(
        self,
        model: M3Model,
        index: ExactIndex | MilvusIndex,
        *,
        length: int,
        overlap: int,
        late: bool = False,
        block: int = 1024,
        **options: Any,
    ) -> None:
        """
        Args:
            length, overlap: as in `chunks`.
            late: encode a window in the context of its document (`encode_late`) instead of by itself.
            block: as in ingest_stream.
            options: of `model.encode`.
        """
        self.model, self.index = model, index
        self.length, self.overlap, self.late, self.options = length, overlap, late, options
        self._block = block
        self._recent: dict[str, str] = {}

    def windows(self, documents: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
        tokenizer, _, prefix = self.model.tokenization(self.length, "passage")
        for name, content in documents:
            if "window" in content:
                raise ValueError(f"the document {name!r} has a field 'window', which its windows need for themselves")
            found = chunks(name, content["text"], tokenizer, length=self.length, overlap=self.overlap, prefix=prefix)
            if self.late:
                self._recent[name] = content["text"]
                if len(self._recent) > self._block + 1:
                    del self._recent[next(iter(self._recent))]
            number = len(found)
            while (surplus := f"{name}#{number}") in self.index:
                self.index.delete([surplus])
                number += 1
            context = {"context": hashlib.sha256(content["text"].encode("utf-8", "surrogatepass")).hexdigest()}
            for chunk in found:
                window = {"document": name, "begin": chunk.begin, "end": chunk.end, **(context if self.late else {})}
                yield chunk.id, {**content, "text": chunk.text, "window": window}

    def encode(self, contents: Sequence[Mapping[str, Any]]) -> EncodedTexts:
        if not self.late:
            return self.model.encode([content["text"] for content in contents], **self.options)
        spans: dict[str, list[tuple[int, int]]] = {}
        for content in contents:
            window = content["window"]
            spans.setdefault(window["document"], []).append((window["begin"], window["end"]))
        return encode_late(self.model, [self._recent[name] for name in spans], list(spans.values()), **self.options)


class _Units:
    """A text cut where tokens begin; tokens that begin at one character are one unit.

    Attributes:
        begins: character at which each unit begins, and the length of the text.
        tokens: number of tokens before each unit, and of all.
    """

    def __init__(self, text: str, tokens: list[int]) -> None:
        firsts = [number for number, begin in enumerate(tokens) if number == 0 or begin > tokens[number - 1]]
        self.text = text
        self.begins = [0, *(tokens[number] for number in firsts[1:]), len(text)]
        self.tokens = np.array([*firsts, len(tokens)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.begins) - 1

    def word_begin(self, unit: int, least: int) -> int:
        """The last unit from `least` to `unit` that starts a word; `unit` itself if none does."""
        for number in range(unit, least - 1, -1):
            begin = self.begins[number]
            if self.text[begin - 1].isspace() or self.text[begin : begin + 1].isspace():
                return number
        return unit


def _token_begins(tokenizer: TextTokenizer, text: str) -> list[int]:
    """The character at which every token begins."""
    begins: list[int] = tokenizer.pieces(text).begins.tolist()
    return begins


def _last_unit(tokenizer: TextTokenizer, units: _Units, first: int, room: int) -> int:
    """The unit before which a window from `first` ends: at least one unit, at most `room` tokens."""
    last = int(np.searchsorted(units.tokens, units.tokens[first] + room, side="right")) - 1
    if last < len(units):
        last = units.word_begin(max(last, first + 1), max((first + last) // 2, first + 1))
    while last > first + 1:
        # Tokenized by itself, a window that was cut inside a word can have more tokens.
        alone = units.text[units.begins[first] : units.begins[last]]
        surplus = len(_token_begins(tokenizer, alone)) - room
        if surplus <= 0:
            break
        last = max(last - surplus, first + 1)
    return last
