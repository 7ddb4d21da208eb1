"""`m3 eval` and `m3 explain` as a user calls them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from m3model.cli.app import app

absent = [name for name in ("ir_measures", "bm25s", "matplotlib") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(absent), reason=f"{absent} not installed; pip install m3kernels[eval]")


def m3(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def xquad(tmp_path: Path) -> Path:
    for language, words in (("en", ["river bridge", "matrix vector"]), ("de", ["river north", "vector list"])):
        paragraphs = [
            {"context": text, "qas": [{"id": f"{n}{i}", "question": f"{['where', 'how'][i]} {text}"} for i in range(2)]}
            for n, text in enumerate(words)
        ]
        content = {"data": [{"title": "t", "paragraphs": paragraphs}]}
        (tmp_path / f"xquad.{language}.json").write_text(json.dumps(content))
    return tmp_path


def test_one_command_makes_the_table(folder: Path, xquad: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["eval", "-m", folder, "--dataset", "xquad", "--data", xquad, "-o", out]
    result = m3(*command, "--json")
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    systems = ["dense", "sparse", "dense+sparse", "multi_vector", "all", "BM25"]
    assert sorted({row["system"] for row in rows}) == sorted(systems)
    assert [row["group"] for row in rows[::6]] == ["monolingual", "cross-lingual", "pool", "pool-all"]
    assert all(set(row["tasks"]) == {"de-en"} for row in rows if row["group"] == "cross-lingual")
    text = (out / "report.md").read_text()
    assert "95 % interval" in text and "## xquad, pool-all" in text
    assert len(list((out / "runs").glob("*/*.trec"))) == 7 * 6
    again = m3(*command, "--json", "--heads", "dense", "--settings", "monolingual", "--queries", "2", "--no-bm25")
    assert again.exit_code == 0 and len(again.stdout.splitlines()) == 1
    assert "monolingual" in m3(*command, "--settings", "monolingual").stdout
    own = [*command, "--settings", "monolingual", "--weights", "0.5,0,1", "--candidates", "3", "--rerank", "2"]
    assert m3(*own).exit_code == 0
    noted = (out / "report.md").read_text()
    assert "of all (0.5, 0.0, 1.0) (given by --weights); 3 candidates, 2 dense ones reranked" in noted
    report = {"report.md", "report.html", "results.json"}
    for keep, left in (("runs", report | {"runs", "qrels"}), ("report", report)):
        few = [*command, "--settings", "monolingual", "--heads", "sparse", "--no-bm25", "--keep", keep]
        assert m3(*few, "--cache", tmp_path / "cache").exit_code == 0 and (tmp_path / "cache").is_dir()
        assert {path.name for path in out.iterdir() if path.suffix != ".png"} == left
    assert m3(*few, "--cache", out / "cache").exit_code == 0 and (out / "cache").is_dir()


def test_bad_arguments(folder: Path, xquad: Path, tmp_path: Path) -> None:
    command = ["eval", "-m", folder, "--data", xquad, "-o", tmp_path / "out"]
    for extra, status, text in (
        (["--dataset", "xquad", "--heads", "dens"], 2, "'dens'"),
        (["--dataset", "xquad", "--languages", "fr"], 1, "no language fr; it has de, en"),
        (["--dataset", "miracl", "--settings", "pool"], 2, "only xquad has settings"),
        (["--dataset", "nothing"], 1, "dataset is 'nothing'; accepted: miracl"),
        (["--dataset", "xquad", "--preset", "mine"], 1, "preset is 'mine'"),
        (["--dataset", "miracl"], 1, "huggingface.co/datasets/miracl"),
    ):
        result = m3(*command, *extra)
        assert result.exit_code == status, result.stderr
        assert text in " ".join(result.stderr.split()).replace("│ ", "")


def test_explain_writes_page_and_heat_map(folder: Path, tmp_path: Path) -> None:
    command = ["explain", "-m", folder, "where is the river", "the river bridge"]
    result = m3(*command, "--html", tmp_path / "a.html", "--png", tmp_path / "a.png", "--json")
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    assert len(content["matches"]) == len(content["query"]) - 1
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "multi_vector" in m3(*command).stdout
