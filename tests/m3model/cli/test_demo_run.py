"""The demo's stages from an empty folder to the end, with a tiny model and a small collection."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_folder
from typer.testing import CliRunner, Result

from m3model import M3Model
from m3model.cli.app import app
from m3model.demo import collection, fine_tuning, measuring, run
from m3model.demo.docstrings import Pair
from m3model.retrieval import ExactIndex
from m3model.training import M3Trainer

EXTRA = [
    Pair(f"numpy.{a}_{b}_{n}", f"what is {a} {b} {n}", f"{b} {n} and {a} of the north " * 3)
    for n in range(5)
    for a, b in itertools.permutations(["open", "close", "list", "file", "query"], 2)
]
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
    monkeypatch.setattr(collection, "collect", lambda: PAIRS + EXTRA)
    monkeypatch.setattr(collection, "choose", lambda pairs, *_rest: pairs[: len(PAIRS)])
    monkeypatch.setitem(fine_tuning._RECIPE, "frozen_layers", 1)


def demo(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["--traceback", "demo", "--folder", str(folder), "--steps", "4", *options])


@pytest.mark.usefixtures("small")
def test_the_demo_ends_with_figures_answers_and_commands_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo"
    result = demo(folder)
    assert result.exit_code == 0, result.output
    for word in ("MRR@10", "nDCG@10", "dense", "sparse", "multi-vector", "hybrid", "Japanese", "Try next:", "search"):
        assert word in result.stdout
    assert "0 of 12 are what was expected" in result.stdout
    rows = [json.loads(line) for line in (folder / "documents.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [pair.name for pair in PAIRS]
    assert len(ExactIndex.load(folder / "index")) == len(PAIRS)
    assert M3Model.from_pretrained(folder / "model").sparse_linear.weight.abs().sum() > 0
    for word in (
        "nDCG@10_before",
        "nDCG@10_after",
        "MRR@10_after",
        "train: 4 steps on 100 other pairs",
        "step 4 of 4: loss",
    ):
        assert word in result.output
    rows = [json.loads(line)["query"] for file in (folder / "train").iterdir() for line in file.open()]
    assert sorted(rows) == sorted(pair.summary for pair in EXTRA)
    for measure in ("nDCG@10", "MRR@10"):
        assert re.search(
            rf"The lead of its {measure}: [+-]\S+ ± \S+ on dense, \S+ ± \S+ on sparse, \S+ ± \S+ on multi-vector\.",
            " ".join(result.stdout.split()),
        )
    assert not (folder / "training").exists()
    assert ExactIndex.load(folder / "index").metadata["model"] == str((folder / "trained").resolve())

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    weights = (folder / "model" / "sparse_linear.pt").read_bytes()
    stamp = (folder / "trained" / "config.json").stat().st_mtime_ns
    others = [pair._replace(body=f"{pair.body} anew") for pair in EXTRA]
    monkeypatch.setattr(collection, "collect", lambda: PAIRS + others)  # docstrings that another process makes
    (folder / "before").mkdir()  # as a kill leaves it between what was measured and the end of its index
    again = demo(folder)
    assert not (folder / "before").exists()
    assert again.exit_code == 0 and f"{len(PAIRS)} of {len(PAIRS)} documents were there" in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    assert weights == (folder / "model" / "sparse_linear.pt").read_bytes()
    assert stamp == (folder / "trained" / "config.json").stat().st_mtime_ns and "step 4 of 4" not in again.output
    trained_before = M3Model.from_pretrained(folder / "trained").state_dict()
    other = demo(folder, "--seed", "2")
    assert other.exit_code == 0 and "step 4 of 4" in other.output and "documents were there" not in other.stderr
    trained_after = M3Model.from_pretrained(folder / "trained").state_dict()
    assert any(not torch.equal(trained_after[name], tensor) for name, tensor in trained_before.items())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("stage", ["before", "index"])
def test_a_demo_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    folder = tmp_path / "demo"
    real, calls = ExactIndex.save, []

    def stop_at_the_second(index: ExactIndex, path: str) -> None:
        real(index, path)
        calls.append(Path(path).name)
        if calls.count(stage) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "_BLOCK", 8)
    with monkeypatch.context() as patch:
        patch.setattr(ExactIndex, "save", stop_at_the_second)
        assert demo(folder).exit_code != 0
    assert len(ExactIndex.load(folder / stage)) == 16
    result = demo(folder)
    assert result.exit_code == 0 and "16 of 28 documents were there" in result.stderr
    assert not (folder / "before").exists()
    assert len(ExactIndex.load(folder / "index")) == 28


@pytest.mark.usefixtures("small")
def test_training_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "demo"
    monkeypatch.setattr(fine_tuning, "_SAVE_STEPS", 2)
    real = M3Trainer._save_checkpoint

    def stop_after_saving(trainer: M3Trainer, model: Any, trial: Any) -> None:
        real(trainer, model, trial)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(M3Trainer, "_save_checkpoint", stop_after_saving)
        assert demo(folder).exit_code != 0
    assert (folder / "training" / "checkpoint-2").is_dir() and not (folder / "trained").exists()
    result = demo(folder)
    assert result.exit_code == 0, result.output
    whole = tmp_path / "whole"
    assert demo(whole).exit_code == 0
    ours, theirs = (M3Model.from_pretrained(place / "trained").state_dict() for place in (folder, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


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
    (folder / "training.jsonl").unlink()
    assert demo(folder).exit_code == 0
    assert len((folder / "training.jsonl").read_text().splitlines()) == len(EXTRA)


@pytest.mark.usefixtures("small")
def test_without_training_the_model_is_measured_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    result = CliRunner().invoke(app, ["--traceback", "demo", "--folder", str(folder), "--steps", "0"])
    assert result.exit_code == 0, result.output
    assert (
        "nDCG@10_now" in result.stdout and not (folder / "trained").exists() and not (folder / "before.json").exists()
    )
    assert ExactIndex.load(folder / "index").metadata["model"] == str((folder / "model").resolve())
