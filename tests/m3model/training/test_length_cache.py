"""Token lengths that outlive a run: found again for equal rows and an equal tokenizer, measured for all others."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from checkpoints import write_folder

from m3model import M3Model
from m3model.training import DataSource, M3Trainer, M3TrainingArguments, TrainingDataset, length_cache, trainer
from m3model.training.length_cache import LengthCache

pytest.importorskip("accelerate")

LENGTHS = np.arange(1000, dtype=np.int32)


def test_lengths_are_found_for_the_same_rows_and_measure_alone(tmp_path: Path) -> None:
    cache = LengthCache(tmp_path / "lengths", "tokenizer", "prefix", 512)
    assert cache.load("rows", 1000) is None
    cache.store("rows", LENGTHS)
    found = cache.load("rows", 1000)
    assert found is not None and found.tolist() == LENGTHS.tolist()
    assert cache.load("other rows", 1000) is None and cache.load("rows", 999) is None
    for measure in (("tokenizer", "prefix", 511), ("tokenizer", "", 512), ("other", "prefix", 512)):
        assert LengthCache(tmp_path / "lengths", *measure).load("rows", 1000) is None


@pytest.mark.parametrize("damage", ["cut", "bit", "type"])
def test_an_entry_that_was_damaged_counts_as_none(tmp_path: Path, damage: str) -> None:
    cache = LengthCache(tmp_path, "tokenizer")
    cache.store("rows", LENGTHS)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "bit" else content[:2000])
    if damage == "type":
        np.savez(path, lengths=LENGTHS.astype(np.float64))
    assert cache.load("rows", 1000) is None
    cache.store("rows", LENGTHS)
    assert cache.load("rows", 1000) is not None


def kill_oneself(*_arguments: object, **_options: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def kill_after_half(file: Any, **_arrays: object) -> NoReturn:
    file.write(b"PK" * 100)
    file.flush()
    kill_oneself()


def store_and_be_killed(folder: Path, moment: str) -> None:
    if moment == "half":
        length_cache.np.savez = kill_after_half
    else:
        os.replace = kill_oneself
    LengthCache(folder, "tokenizer").store("rows", LENGTHS + 1)


@pytest.mark.parametrize("moment", ["half", "unnamed"])
@pytest.mark.parametrize("before", [False, True])
def test_a_kill_while_writing_leaves_what_was_there(tmp_path: Path, moment: str, before: bool) -> None:
    cache = LengthCache(tmp_path, "tokenizer")
    if before:
        cache.store("rows", LENGTHS)
    killed = multiprocessing.get_context("fork").Process(target=store_and_be_killed, args=(tmp_path, moment))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    found = cache.load("rows", 1000)
    assert (found is not None and found.tolist() == LENGTHS.tolist()) if before else found is None
    cache.store("rows", LENGTHS)
    assert cache.load("rows", 1000) is not None


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"query": f"row {number}", "pos": ["the river " * (1 + number % 7)]} for number in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


Measure = Callable[..., tuple[list[int], list[int]]]


@pytest.fixture
def measure(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Numbers of the rows that a new trainer measures, and all lengths."""
    measured: list[int] = []
    real = trainer.token_lengths

    def watched(*arguments: Any) -> Any:
        measured.extend(map(int, arguments[3]))
        return real(*arguments)

    monkeypatch.setattr(trainer, "token_lengths", watched)

    def run(*files: Path, model: Path = folder, **changes: Any) -> tuple[list[int], list[int]]:
        settings = {"output_dir": str(tmp_path / "run"), "group_size": 1, "use_cpu": True, **changes}
        arguments = M3TrainingArguments(**settings)
        made = M3Trainer(M3Model.from_pretrained(model), arguments, TrainingDataset([DataSource(f) for f in files]))
        measured.clear()
        made.get_train_dataloader()
        assert made._lengths is not None
        return list(measured), made._lengths.tolist()

    return run


def test_a_second_run_measures_nothing_again(data: Path, tmp_path: Path, measure: Measure) -> None:
    everything = list(range(20))
    numbers, lengths = measure(data)
    assert numbers == everything and len(set(lengths)) > 5
    assert (tmp_path / "run" / "token_lengths").is_dir()
    assert measure(data) == ([], lengths)
    # Another run has a folder of its own unless it is told of this one.
    assert measure(data, output_dir=str(tmp_path / "other"))[0] == everything
    shared = {"output_dir": str(tmp_path / "third"), "token_lengths": str(tmp_path / "run" / "token_lengths")}
    assert measure(data, **shared) == ([], lengths)
    moved = shutil.copy(data, tmp_path / "moved.jsonl")
    assert measure(Path(moved), **shared) == ([], lengths)
    assert not (tmp_path / "third" / "token_lengths").exists()


def test_what_was_changed_is_measured_again(data: Path, tmp_path: Path, measure: Measure) -> None:
    everything = list(range(20))
    lengths = measure(data)[1]
    facts = data.stat()
    data.write_text(data.read_text().replace("the river the river ", "theriver theriver   "))
    os.utime(data, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert data.stat().st_size == facts.st_size  # and of the same time: only the rows tell
    numbers, changed = measure(data)
    assert numbers == everything and changed != lengths
    assert measure(data, passage_max_length=5)[0] == everything
    other = write_folder(tmp_path / "prefixed", section={"passage_prefix": "north "})
    assert measure(data, model=other)[0] == everything
    assert measure(data) == ([], changed)
    added = tmp_path / "added.jsonl"
    added.write_text('{"query": "a", "pos": ["b"]}\n{"query": "c", "pos": ["the mountain"]}\n')
    numbers, all_lengths = measure(added, data)
    assert numbers == [0, 1] and all_lengths[2:] == changed


def test_a_folder_that_cannot_be_written_only_warns(data: Path, tmp_path: Path, measure: Measure) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.warns(UserWarning, match="token lengths cannot be kept in .*taken"):
        numbers, _ = measure(data, token_lengths=str(tmp_path / "taken"))
    assert numbers == list(range(20))
