"""An ExactIndex that was added to, changed, deleted from, saved and loaded answers as one of what is left alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from dying_writer import killed_writer
from hypothesis import given, settings
from hypothesis import strategies as st
from random_texts import random_texts

from m3model import EncodedTexts
from m3model.retrieval import HEADS, ExactIndex

QUERIES = random_texts(3, 77, steps=8)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("upsert"), st.integers(0, 25), st.integers(1, 12)),
        st.tuples(st.just("delete"), st.integers(0, 25), st.integers(1, 20)),
        st.tuples(st.sampled_from(["search", "reload", "copy"]), st.just(0), st.just(0)),
    ),
    max_size=12,
)


def of(contents: dict[str, int]) -> EncodedTexts:
    """Vectors that depend on each content alone."""
    parts = [random_texts(1, seed, steps=8) for seed in contents.values()]
    return EncodedTexts.concatenate(parts) if parts else random_texts(0, 0)


def assert_answers_as_new(index: ExactIndex, contents: dict[str, int]) -> None:
    new = ExactIndex()
    new.add(list(contents), of(contents), [{"seed": seed} for seed in contents.values()])
    assert len(index) == len(contents) and all(index.document(name) == {"seed": contents[name]} for name in contents)
    for head in HEADS:
        for rerank in (3, None):
            options = {"head": head, "candidates": 6, "rerank": rerank, "weights": (0.5, 1.5, 2.0)}
            for found, expected in zip(index.search(QUERIES, 5, **options), new.search(QUERIES, 5, **options)):
                assert found.ids == expected.ids, (head, rerank)
                np.testing.assert_array_equal(found.score, expected.score)


@given(changes=steps)
@settings(max_examples=25, deadline=None)
def test_any_changes_leave_what_is_there(changes: list[tuple[str, int, int]], tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("index") / "index"
    index, contents, seed = ExactIndex(), {}, 0
    for step, first, count in changes:
        names = [f"d{number}" for number in range(first, first + count)]
        if step == "upsert":
            fresh = {name: (seed := seed + 1) for name in names}
            index.upsert(names, of(fresh), [{"seed": own} for own in fresh.values()])
            contents = {name: own for name, own in contents.items() if name not in fresh} | fresh
        elif step == "delete":
            assert index.delete(names) == len(contents.keys() & set(names))
            contents = {name: own for name, own in contents.items() if name not in names}
        elif step == "search":
            index.search(QUERIES, 2)
        else:
            index.save(folder if step == "reload" else folder.with_name("copy"))
            if step == "reload":
                index = ExactIndex.load(folder)
        assert len(index) == len(contents) and all((name in index) == (name in contents) for name in names)
    if contents:
        assert_answers_as_new(index, contents)
    else:
        assert [len(ranking) for ranking in index.search(QUERIES, 5, head="dense")] == [0, 0, 0]
    index.save(folder)
    assert ExactIndex.load(folder)._place_of.keys() == contents.keys()
    left = list(folder.rglob("deleted-*"))
    assert len(left) == sum(held.deleted is not None for held in index._segments)
    shutil.rmtree(folder.parent)


def test_one_living_document_among_many_deleted_is_found() -> None:
    """The inverted index lists deleted documents too: the search goes deeper until enough are alive."""
    index = ExactIndex()
    contents = {f"d{number}": number for number in range(200)}
    index.add(list(contents), of(contents), [{"seed": seed} for seed in contents.values()])
    index.search(QUERIES, 1)
    best = max((ranking.ids for ranking in index.search(QUERIES, 95, head="sparse")), key=len)
    assert len(best) > 50
    index.delete(best)
    left = {name: seed for name, seed in contents.items() if name not in best}
    assert_answers_as_new(index, left)
    assert index._segments[0].deleted is not None
    # More than half: the segment is written anew.
    index.delete(list(left)[:50])
    assert_answers_as_new(index, dict(list(left.items())[50:]))
    assert index._segments[0].deleted is None


def test_deletions_do_not_rewrite_the_segment(tmp_path: Path) -> None:
    index = ExactIndex()
    contents = {f"d{number}": number for number in range(20)}
    index.add(list(contents), of(contents), [{"seed": seed} for seed in contents.values()])
    index.save(tmp_path / "index")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*.npy")}
    for name in ("d3", "d8"):
        loaded = ExactIndex.load(tmp_path / "index")
        assert loaded.delete([name, "unknown"]) == 1
        loaded.save(tmp_path / "index")
        del contents[name]
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*.npy")}
    assert before.items() <= after.items() and len(after) == len(before) + 1
    assert_answers_as_new(ExactIndex.load(tmp_path / "index"), contents)


def test_deleting_and_replacing_refuse_what_adding_refuses() -> None:
    index = ExactIndex()
    index.add(["a", "b"], random_texts(2, 1))
    with pytest.raises(TypeError, match="ids must be a list of strings"):
        index.delete("ab")
    with pytest.raises(ValueError, match="the id 'a' is twice in ids"):
        index.upsert(["a", "a"], random_texts(2, 2))
    with pytest.raises(ValueError, match="the index has dense of width 8"):
        index.upsert(["a"], random_texts(1, 2, width=16))
    broken = random_texts(1, 4)
    broken.sparse.weights[:] = -1.0
    with pytest.raises(ValueError, match="negative or not finite"):
        index.upsert(["a"], broken)
    assert index._place_of.keys() == {"a", "b"} and all(held.deleted is None for held in index._pending)


def test_a_process_killed_while_it_saves_deletions_leaves_all_or_none(tmp_path: Path) -> None:
    index = ExactIndex()
    index.add([f"d{n}" for n in range(12)], random_texts(12, 1), [{"n": n} for n in range(12)])
    index.delete(["d5"])
    index.save(tmp_path / "index")
    index = ExactIndex.load(tmp_path / "index")
    index.delete(["d7"])
    index.save(tmp_path / "index")
    codes = set()
    for count in (2, 24, 100):
        copy = tmp_path / f"copy{count}"
        shutil.copytree(tmp_path / "index", copy)
        code = killed_writer(copy, count, "upsert", "d1")
        loaded = ExactIndex.load(copy)
        assert len(loaded) == 10 and "d1" in loaded and loaded.document("d1") in ({"n": 1}, {"new": 1})
        assert (loaded.document("d1") == {"new": 1}) or code == -9
        found = loaded.search(random_texts(1, 3), 20, head="dense")[0].ids
        assert sorted(found) == sorted(f"d{n}" for n in range(12) if n not in (5, 7))
        loaded.delete(["d0"])
        loaded.save(copy)
        assert len(ExactIndex.load(copy)) == 9
        codes.add((code, loaded.document("d1") == {"new": 1}))
    assert {(0, True), (-9, False)} <= codes
    assert os.listdir(tmp_path / "index")
