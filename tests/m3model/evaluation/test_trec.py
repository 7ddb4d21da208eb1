"""TREC runs and judgements."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3model.evaluation.trec import ranked, read_qrels, read_run, write_qrels, write_run

scores = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, -0.0, 1.0, 1e-45, -1e-45])


@given(st.dictionaries(st.text("abcd", min_size=1, max_size=3), scores, max_size=30))
def test_ranked_is_strictly_decreasing_and_keeps_the_order(given_scores: dict[str, float]) -> None:
    result = ranked(given_scores)
    values = np.array(list(result.values()), dtype=np.float32)
    assert (np.diff(values.astype(np.float64)) < 0).all()
    order = sorted(given_scores, key=lambda passage: (-given_scores[passage], passage))
    assert list(result) == order
    assert list(ranked(given_scores, 5)) == order[:5]


@given(st.dictionaries(st.sampled_from(["q1", "q2"]), st.dictionaries(st.text("abc", min_size=1), scores, min_size=1)))
def test_runs_survive_the_file(run: dict[str, dict[str, float]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.trec"
        write_run(run, path, "system")
        assert read_run(path) == {query: ranked(rows) for query, rows in run.items()}


def test_run_errors_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    for content, message in (
        ("q Q0 d 1 0.5 s\nq Q0 e 2 0.4\n", r"run.trec:2: 5 fields; expected"),
        ("q Q0 d 1 high s\n", r"run.trec:1: the score is 'high'"),
        ("q Q0 d 1 0.5 s\nq Q0 d 2 0.4 s\n", r"run.trec:2: passage 'd' is listed twice"),
        ("q Q0 d 1 nan s\n", r"the score of 'd' is nan"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_run(path)
    with pytest.raises(ValueError, match="passage 'a b' cannot stand in a TREC file"):
        write_run({"q": {"a b": 1.0}}, path, "s")


def test_qrels_survive_the_file_and_errors_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "qrels"
    qrels = {"q1": {"a": 0, "b": 2}, "q2": {"a": -1}}
    write_qrels(qrels, path)
    assert read_qrels(path) == qrels
    path.write_text("q 0 d 1\nq 0 d 0\n")
    with pytest.raises(ValueError, match=r"qrels:2: passage 'd' is judged twice"):
        read_qrels(path)
    path.write_text("q 0 d relevant\n")
    with pytest.raises(ValueError, match=r"qrels:1: relevance is 'relevant'"):
        read_qrels(path)
