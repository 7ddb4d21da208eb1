"""Documents longer than the model: overlapping windows in the index, the parent document in the answer (MaxP).

    chunks         text -> windows of at most `length` tokens that share `overlap` tokens with the one before
    search_parents the windows' ranking, a document standing at the place of its best window (Dai & Callan 2019, MaxP)

Windows are cut between words where there are any, so that a word keeps its tokens, and never hold more than `length`
tokens when they are tokenized by themselves. A window's id is its document's id, "#" and its number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from m3model.embeddings import EncodedTexts
from m3model.retrieval.interface import Ranking, SearchIndex
from m3model.tokenizer import TextTokenizer

__all__ = ["Chunk", "chunks", "parent_of", "search_parents"]

_FIRST_FACTOR = 4


class Chunk(NamedTuple):
    """A window of a document: its id, its text, and where it lies in the document (characters)."""

    id: str
    text: str
    begin: int
    end: int


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


def search_parents(index: SearchIndex, queries: EncodedTexts, k: int = 10, **options: Any) -> list[Ranking]:
    """The best k documents for every query, in an index of windows.

    Args:
        index: its ids are those of `chunks`.
        queries, options: as for the index's `search`.
        k: documents; more windows are asked for until that many documents are among them.

    Returns:
        Rankings of document ids, with the scores of each document's best window.

    Raises:
        ValueError: as the index's `search`, or an id that is not one of a window.
    """
    results: list[Ranking | None] = [None] * len(queries)
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
            results[query] = Ranking(
                list(best)[:k], ranking.score[places], *(None if part is None else part[places] for part in columns)
            )
        open_queries, depth = following, 2 * depth
    return [ranking for ranking in results if ranking is not None]


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
    return [begin for begin, _ in tokenizer.backend.encode(text, add_special_tokens=False).offsets]


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
