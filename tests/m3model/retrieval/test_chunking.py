"""Windows of long documents, and rankings of their parents."""

from __future__ import annotations

import numpy as np
import pytest
from embeddings import random_embeddings
from hypothesis import given, settings
from hypothesis import strategies as st

from m3model import M3Model
from m3model.retrieval import ExactIndex
from m3model.retrieval.chunking import chunks, parent_of, search_parents

texts = st.lists(
    st.sampled_from(["river", "of", "eigenvalue ", "的是", "Xq", "\n\n", " ", "ü!", "𝄞", "z" * 30]), max_size=120
)


@settings(max_examples=60)
@given(words=texts, length=st.integers(8, 40), share=st.floats(0, 0.5), spaced=st.booleans())
def test_windows_cover_the_text_and_fit(
    model: M3Model, words: list[str], length: int, share: float, spaced: bool
) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    text = (" " if spaced else "").join(words)
    overlap = int((length - tokenizer.overhead) * share)
    found = chunks("doc#1", text, tokenizer, length=length, overlap=overlap)
    assert [chunk.id for chunk in found] == [f"doc#1#{number}" for number in range(len(found))]
    assert (found[0].begin, found[-1].end) == (0, len(text))
    for chunk in found:
        assert chunk.text == text[chunk.begin : chunk.end]
        (ids,) = tokenizer.encode([chunk.text], 10_000).ids
        # A window of one token can be a single word piece that tokenizes to more on its own.
        assert len(ids) <= length or len(chunk.text) <= 30
    for before, after in zip(found, found[1:]):
        assert before.begin < after.begin <= before.end < after.end or before.end == after.end == len(text)


def test_neighbours_share_about_the_overlap_at_word_borders(model: M3Model) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    text = " ".join(["river", "north", "bridge", "vector"] * 40)
    found = chunks("d", text, tokenizer, length=20, overlap=6)
    assert len(found) > 5
    for before, after in zip(found, found[1:]):
        shared = text[after.begin : before.end]
        (ids,) = tokenizer.encode([shared], 100).ids
        assert 6 <= len(ids) - tokenizer.overhead <= 8
        assert before.text.endswith(shared.rstrip()) or before.text.rstrip().endswith(shared.strip())
        assert text[after.begin - 1].isspace() or text[after.begin].isspace()


def test_short_text_is_one_window_and_bad_sizes_are_refused(model: M3Model) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    assert [tuple(chunk) for chunk in chunks("a", "river", tokenizer, length=20, overlap=4)] == [("a#0", "river", 0, 5)]
    assert [chunk.text for chunk in chunks("a", "", tokenizer, length=20, overlap=4)] == [""]
    for length, overlap in ((2, 0), (20, 10), (20, -1)):
        with pytest.raises(ValueError, match=r"overlap is|max_length is"):
            chunks("a", "river", tokenizer, length=length, overlap=overlap)
    for name in ("a", "a#", "a#b"):
        with pytest.raises(ValueError, match="no id of a window"):
            parent_of(name)


@pytest.mark.parametrize("head", ["dense", "sparse", "dense+sparse"])
def test_a_document_stands_where_its_best_window_does(head: str) -> None:
    embeddings = random_embeddings(90, seed=7, row_width=None)
    # 30 documents; the first has 61 of the windows, so that the best of them fill the first requests.
    ids = [f"doc{max(number - 60, 0)}#{number}" for number in range(90)]
    index = ExactIndex()
    index.add(ids, embeddings)
    queries = random_embeddings(6, seed=8, row_width=None)
    every = index.search(queries, 90, head=head, candidates=90)
    for ranking, windows in zip(search_parents(index, queries, 10, head=head, candidates=90), every):
        best: dict[str, float] = {}
        for chunk, score in zip(windows.ids, windows.score):
            best.setdefault(parent_of(chunk), float(score))
        assert ranking.ids == list(best)[:10]
        # The dense product adds 32 terms in an order that depends on the number of queries.
        np.testing.assert_allclose(ranking.score, list(best.values())[:10], rtol=0, atol=32 * 2**-23)
        assert len(ranking.ids) == len(set(ranking.ids))
