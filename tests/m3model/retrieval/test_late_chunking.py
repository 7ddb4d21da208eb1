"""Windows encoded in their document's context, and documents that go through an index as windows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m3model import M3Model
from m3model.retrieval import ExactIndex
from m3model.retrieval.chunking import WindowedStream, chunks, parent_document, search_parents
from m3model.retrieval.late_chunking import _stretches, encode_late
from m3model.retrieval.streaming import ingest_stream

WORDS = ["river", "north", "bridge", "vector", "matrix", "city", "file", "sort"]
LONG = " ".join(WORDS[number * 5 % 7] for number in range(60))


def spans_of(model: M3Model, text: str, length: int = 16, overlap: int = 4) -> list[tuple[int, int]]:
    return [(chunk.begin, chunk.end) for chunk in chunks("d", text, model.tokenizer, length=length, overlap=overlap)]


@pytest.mark.parametrize("prefix", ["", "passage: "])
def test_a_window_has_the_states_of_its_tokens_in_the_whole_document(model: M3Model, folder: Path, prefix: str) -> None:
    own = M3Model.from_pretrained(folder)
    own.config = replace(own.config, passage_prefix=prefix)
    text = " ".join(WORDS * 2)
    spans = spans_of(own, text, length=9, overlap=2)
    assert len(spans) > 2
    found = encode_late(own, [text], [spans])
    ids, offsets = own.tokenize([text])
    with torch.no_grad():
        hidden = own.backbone(ids, offsets, None)
    bounds = own.tokenizer.pieces(prefix + text)
    for number, (begin, end) in enumerate(spans):
        inside = [
            place + 1
            for place, (first, last) in enumerate(zip(bounds.begins - len(prefix), bounds.ends - len(prefix)))
            if last > 0 and begin <= max(first, 0) < end
        ]
        rows, one = hidden[inside], found.select([number])
        mean = torch.nn.functional.normalize(rows.mean(0), dim=0)
        np.testing.assert_allclose(one.dense[0], mean.numpy(), atol=1e-5)
        projected = torch.nn.functional.normalize(own.colbert_linear(rows), dim=1).detach()
        torch.testing.assert_close(one.multi_vector.rows, projected, atol=1e-5, rtol=0)
        weights: dict[int, float] = {}
        for token, weight in zip(ids[inside].tolist(), torch.relu(own.sparse_linear(rows))[:, 0].tolist()):
            if token not in own.config.ignored_token_ids and weight > 0:
                weights[token] = max(weights.get(token, 0.0), weight)
        assert one.sparse.to_dicts()[0] == pytest.approx(weights, abs=1e-5)


@given(count=st.integers(0, 300), room=st.integers(2, 60))
@settings(max_examples=100)
def test_stretches_use_every_token_once_and_full_context(count: int, room: int) -> None:
    starts, stops, owned = _stretches(count, room)
    assert (owned[0], owned[-1]) == (0, count) and len(owned) == len(starts) + 1
    for start, stop, first, last in zip(starts, stops, owned, owned[1:]):
        assert 0 <= start <= first <= last <= stop <= count
        assert stop - start == min(room, count)


def test_the_rest_of_a_document_counts_in_a_window_and_beyond_the_longest_text_too(model: M3Model) -> None:
    spans = spans_of(model, LONG)
    other = LONG[: spans[-1][0]].replace("city", "file") + LONG[spans[-1][0] :]
    assert other != LONG and len(other) == len(LONG)
    for max_length in (model.max_length, 24):
        late = [encode_late(model, [text], [spans], max_length=max_length) for text in (LONG, other)]
        assert len(late[0]) == len(spans) and np.isfinite(late[0].dense).all()
        assert not np.allclose(late[0].dense[0], late[1].dense[0], atol=1e-4)
        assert late[0].multi_vector.offsets[-1] == sum(len(model.tokenizer.pieces(LONG[b:e]).ids) for b, e in spans)
    # Read 24 tokens at a time, the last window does not see what changed far before it; read at once, it does.
    distant = LONG.replace("river", "sort", 1)
    distant_spans = spans_of(model, distant)
    near = [encode_late(model, [t], [s[-1:]], max_length=24) for t, s in ((LONG, spans), (distant, distant_spans))]
    np.testing.assert_allclose(near[0].dense, near[1].dense, atol=1e-5)


def test_a_document_of_one_window_is_encoded_as_any_text_and_batches_do_not_matter(model: M3Model) -> None:
    texts = ["the river", LONG, "", "a matrix"]
    spans = [[(0, len(text))] if len(text) < 20 else spans_of(model, text) for text in texts]
    found = encode_late(model, texts, spans, max_length=30)
    plain = model.encode([texts[0], texts[2], texts[3]])
    for number, row in ((0, 0), (len(found) - 2, 1), (len(found) - 1, 2)):
        np.testing.assert_allclose(found.dense[number], plain.dense[row], atol=1e-5)
        left, right = found.select([number]), plain.select([row])
        assert left.sparse.to_dicts()[0] == pytest.approx(right.sparse.to_dicts()[0], abs=1e-5)
        torch.testing.assert_close(left.multi_vector.rows, right.multi_vector.rows, atol=1e-5, rtol=0)
    small = encode_late(model, texts, spans, max_length=30, batch_tokens=1, sparse=False, dense=False)
    assert small.dense is None and small.sparse is None
    torch.testing.assert_close(small.multi_vector.rows, found.multi_vector.rows, atol=1e-5, rtol=0)
    assert len(encode_late(model, [], [])) == 0


def test_windows_that_do_not_fit_are_refused(model: M3Model) -> None:
    for texts, spans, message in (
        (["a"], [], "1 texts and 0 lists of spans"),
        (["a"], [[]], "at least one span for each"),
        (["abc"], [[(0, 2), (2, 4)]], r"the window \(2, 4\) lies outside its document of 3 characters"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_late(model, texts, spans)


@pytest.mark.parametrize("late", [False, True])
def test_documents_go_in_as_windows_and_come_back_whole(model: M3Model, tmp_path: Path, late: bool) -> None:
    place = str(tmp_path / "index")
    documents = {"long": f"{LONG} {LONG}", "short": "a city", "other": LONG.replace("matrix", "bridge")}

    def ingest(index: ExactIndex) -> list[str]:
        stream = WindowedStream(model, index, length=16, overlap=4, late=late, block=5, max_length=40)
        given = ((name, {"text": text, "lang": "en"}) for name, text in documents.items())
        return [
            i for ids in ingest_stream(index, stream.windows(given), stream.encode, folder=place, block=5) for i in ids
        ]

    index = ExactIndex()
    windows = ingest(index)
    assert len(windows) == len(index) > 15
    queries = model.encode(["a city"], role="query")
    for ranking in search_parents(index, queries, 3, head="all"):
        assert sorted(ranking.ids) == sorted(documents)
        assert [window.rpartition("#")[0] for window in ranking.windows] == ranking.ids
        for name in ranking.ids:
            assert parent_document(index, name) == {"text": documents[name], "lang": "en"}
    # With its context a window changes too; alone, the same text keeps its vector.
    before = {name: index.document(name) for name in windows}
    documents["other"] = f"{documents['other']} vector"
    index = ExactIndex.load(place)
    ingest(index)
    assert (index.document("other#0") == before["other#0"]) is not late
    documents["long"] = LONG[:120]
    index = ExactIndex.load(place)
    ingest(index)
    index = ExactIndex.load(place)
    assert len(index) < len(windows) and parent_document(index, "long")["text"] == LONG[:120]
    with pytest.raises(KeyError, match="no document 'absent#0'"):
        parent_document(index, "absent")
    with pytest.raises(ValueError, match="'bad' has a field 'window'"):
        stream = WindowedStream(model, index, length=16, overlap=4)
        list(stream.windows([("bad", {"text": "a", "window": 1})]))
