"""The demo's stages from an empty folder to the end, with a tiny model and a small collection."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
from checkpoints import write_folder
from typer.testing import CliRunner, Result

from m3model import M3Model
from m3model.cli.app import app
from m3model.demo import run
from m3model.demo.docstrings import Pair
from m3model.retrieval import ExactIndex

WORDS = ["river", "mountain", "city", "bridge", "matrix", "vector", "sort", "list"]
PAIRS = [
    Pair(f"torch.{first}_{second}", f"where is the {first} {second}", f"the {second} of the {first} is north " * 3)
    for first, second in itertools.combinations(WORDS, 2)
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny(folder: Path) -> Path:
        return folder if folder.is_dir() else write_folder(folder)

    monkeypatch.setattr(run, "make_embedded_backbone", tiny)
    monkeypatch.setattr(run, "collect", lambda: PAIRS)


def demo(folder: Path) -> Result:
    return CliRunner().invoke(app, ["--traceback", "demo", "--folder", str(folder)])


@pytest.mark.usefixtures("small")
def test_the_demo_ends_with_figures_answers_and_commands_and_is_not_repeated(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    result = demo(folder)
    assert result.exit_code == 0, result.output
    for word in ("MRR@10", "Recall@10", "dense", "sparse", "multi-vector", "hybrid", "Japanese", "Try next:", "search"):
        assert word in result.stdout
    rows = [json.loads(line) for line in (folder / "documents.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [pair.name for pair in PAIRS]
    assert len(ExactIndex.load(folder / "index")) == len(PAIRS)
    assert M3Model.from_pretrained(folder / "model").sparse_linear.weight.abs().sum() > 0

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    weights = (folder / "model" / "sparse_linear.pt").read_bytes()
    again = demo(folder)
    assert again.exit_code == 0 and f"{len(PAIRS)} of {len(PAIRS)} documents were there" in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    assert weights == (folder / "model" / "sparse_linear.pt").read_bytes()


@pytest.mark.usefixtures("small")
def test_a_demo_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "demo"
    real, calls = ExactIndex.save, []

    def stop_at_the_second(index: ExactIndex, path: str) -> None:
        real(index, path)
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "_BLOCK", 8)
    with monkeypatch.context() as patch:
        patch.setattr(ExactIndex, "save", stop_at_the_second)
        assert demo(folder).exit_code != 0
    assert len(ExactIndex.load(folder / "index")) == 16
    result = demo(folder)
    assert result.exit_code == 0 and "16 of 28 documents were there" in result.stderr
    assert len(ExactIndex.load(folder / "index")) == 28


@pytest.mark.usefixtures("small")
def test_an_index_of_another_model_or_collection_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    assert demo(folder).exit_code == 0
    shutil.rmtree(folder / "model")
    write_folder(folder / "model", seed=5)
    result = demo(folder)
    assert result.exit_code == 0 and "documents were there" not in result.stderr
    (folder / "documents.jsonl").write_text("damaged")
    assert demo(folder).exit_code == 0
    assert len((folder / "documents.jsonl").read_text().splitlines()) == len(PAIRS)
