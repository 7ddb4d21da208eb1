"""m3 train: YAML and options, what it leaves, and how it refuses."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import Result
from rich.console import Console
from transformers import TrainerState
from typer.testing import CliRunner

from m3model import M3Model
from m3model.cli import train as train_command
from m3model.cli import train_progress
from m3model.cli.app import app
from m3model.training import M3Trainer

WORDS = ["river", "mountain", "city", "bridge", "matrix", "vector"]


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Path:
    """A file of rows and a configuration that trains on it twice, once with a weight."""
    rows = [
        {"query": f"where is {word}", "pos": [f"the {word} is here"], "neg": [f"the {other} is here"]}
        for word, other in zip(WORDS, reversed(WORDS))
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": str(folder),
        "train": [str(data), {"path": str(data), "name": "again", "weight": 0.5}],
        "dev": str(data),
        "output_dir": str(tmp_path / "run"),
        "group_size": 2,
        "per_device_train_batch_size": 3,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-4,
        "self_distill": False,
        "save_total_limit": None,
        "use_cpu": True,
    }
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def m3(*arguments: object) -> Result:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return CliRunner().invoke(app, ["train", *map(str, arguments)])
    finally:
        torch.set_num_threads(threads)


def test_training_from_a_file_with_an_option_that_wins(config: Path, tmp_path: Path, folder: Path) -> None:
    result = m3(config, "--max_steps", 3, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["steps"] == 3 and said["model"] == str(tmp_path / "run" / "model")
    assert set(said["loss"]) == {"loss", "loss_dense", "loss_sparse", "loss_multi_vector", "loss_ensemble"}
    assert set(said["ndcg@10"]) == {"dense", "sparse", "multi_vector", "hybrid"}
    assert "12 rows of 2 files (rows 6, again 6)" in result.stderr and "step 3 of 3: loss" in result.stderr
    trained, before = M3Model.from_pretrained(tmp_path / "run" / "model"), M3Model.from_pretrained(folder)
    assert not torch.equal(trained.colbert_linear.weight, before.colbert_linear.weight)
    used = json.loads((tmp_path / "run" / "arguments.json").read_text())
    assert used["max_steps"] == 3 and used["learning_rate"] == 1e-4 and used["self_distill"] is False

    refused = m3(config)
    assert refused.exit_code == 1 and "checkpoint-3" in refused.stderr and "--resume" in refused.stderr
    resumed = m3(config, "--resume")
    assert resumed.exit_code == 0 and "checkpoint-3 on" in resumed.stderr
    assert "last loss" in resumed.stdout and "multi_vector" in resumed.stdout and "after 4 steps" in resumed.stdout


def test_the_bar_shows_losses_speed_and_time_left_on_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(train_progress, "stderr", lambda: console)
    names = ("loss", "loss_dense", "loss_sparse", "loss_multi_vector", "loss_ensemble", "loss_distill")
    state = TrainerState(max_steps=12000, global_step=1234, is_world_process_zero=True)
    bar = train_progress.TrainingBar()
    bar.on_train_begin(None, state, None)
    bar.on_log(None, state, None, {**dict.fromkeys(names, 1.125), "tokens_per_second": 123456.0})
    bar.close()
    last = screen.getvalue().split("multi")[-2]
    for part in (" 1234/12000 ", " 123456 tokens/s ", " left ", "loss 1.125, dense 1.125, sparse 1.125"):
        assert part in last, repr(last)
    assert "distil 1.125" in screen.getvalue()


def test_two_processes_under_torchrun_print_and_write_once(config: Path, tmp_path: Path) -> None:
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "m3model.cli", "train", str(config), "--train", str(packed), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 4
    assert done.stderr.count("6 rows of 1 file") == done.stderr.count("step 4 of 4: loss") == 1
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoint-4").glob("rng_state*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temperature", "0"], "temperature is 0.0"),
        (["--temperature", "hot"], "invalid float value"),
        (["--tempreature", "1"], "unknown arguments: --tempreature 1"),
        (["--heads", "dense", "lexical"], "heads are"),
        (["--train", "a.jsonl", "--train", "b.jsonl"], "--train given more than once"),
        (["--group-size", "2", "--group_size=3"], "--group_size given more than once"),
        (["--resume_from_checkpoint", "run"], "--resume goes on from the last checkpoint"),
    ],
)
def test_bad_options_exit_with_status_2(config: Path, arguments: list[str], said: str) -> None:
    result = m3(config, *arguments)
    assert result.exit_code == 2 and said in result.stderr, result.stderr


def test_bad_configurations_exit_with_status_2(config: Path, tmp_path: Path) -> None:
    assert "there is no file" in m3(tmp_path / "none.yaml").stderr
    assert "model and train are needed" in m3("--output_dir", tmp_path / "x").stderr
    broken = tmp_path / "broken.yaml"
    for content, said in (
        ("learning_rte: 1", "unknown learning_rte"),
        ("- a", "holds no lines"),
        ("a: [", "no YAML"),
        ("group_size: 2\nseed: 1\ngroup_size: 3", "line 3: group_size for the second time"),
    ):
        broken.write_text(content)
        result = m3(broken)
        assert result.exit_code == 2 and said in result.stderr, result.stderr


def test_words_of_yaml_are_those_of_the_options(config: Path) -> None:
    lines = [line for line in config.read_text().splitlines() if not line.startswith(("dev:", "save_strategy:"))]
    lines += ["save_strategy: no", "init_heads: no", "activation_checkpointing: on", "dev: null", "adam_epsilon: 1.e-7"]
    lines += ["query_instruction: '--query:'", "lr_scheduler_type: cosine_with_min_lr"]
    config.write_text("\n".join([*lines, "lr_scheduler_kwargs: {min_lr: 1e-6}"]))
    run, args = train_command._parse([str(config), "--weight_decay", "1e-2"])
    assert args.save_strategy == "no" and args.activation_checkpointing is True and run.init_heads is False
    assert args.query_instruction == "--query:" and run.dev is None
    assert (args.lr_scheduler_kwargs, args.adam_epsilon, args.weight_decay) == ({"min_lr": 1e-6}, 1e-7, 1e-2)


def test_a_bad_row_stops_before_the_model_is_loaded(config: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").open("a").write('{"query": "a"}\n')
    result = m3(config)
    assert result.exit_code == 1 and "rows.jsonl:7" in result.stderr and "'pos'" in result.stderr
    wrong = m3(config, "--train", '{"file": "x"}')
    assert wrong.exit_code == 1 and "accepted: a path, or path, name, weight" in wrong.stderr


@pytest.mark.parametrize(("content", "said"), [("{}", "rows.jsonl:1: no 'query'"), ("", "the file has no rows")])
def test_rows_spoilt_between_two_runs_leave_the_checkpoint(
    config: Path, tmp_path: Path, content: str, said: str
) -> None:
    assert m3(config, "--max_steps", 2).exit_code == 0
    rows = tmp_path / "rows.jsonl"
    good = rows.read_text()
    rows.write_text(content)
    refused = m3(config, "--resume")
    assert refused.exit_code == 1 and said in refused.stderr
    rows.write_text(good)
    resumed = m3(config, "--resume")
    assert resumed.exit_code == 0 and "checkpoint-2 on" in resumed.stderr, resumed.output


def test_no_room_for_the_trained_model_leaves_the_checkpoint(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = M3Trainer.save_model

    def limited(trainer: M3Trainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:
            return real(trainer, output_dir, _internal_call)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (100_000, before[1])
        )  # a write beyond it fails like one to a full disk
        try:
            return real(trainer, output_dir)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patch:
        patch.setattr(M3Trainer, "save_model", limited)
        refused = m3(config)
    assert refused.exit_code == 1, refused.exception
    assert "run/model: " in refused.stderr and "MiB are free there; --resume writes it anew from" in refused.stderr, (
        refused.stderr
    )
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
        "token_lengths",
    ]
    assert m3(config, "--resume").exit_code == 0
    assert M3Model.from_pretrained(tmp_path / "run" / "model").encode(["river"]).dense is not None


def test_help_lists_the_arguments_of_transformers_and_of_m3() -> None:
    result = m3("--help")
    assert result.exit_code == 0
    for option in ("--learning_rate", "--learning-rate", "--sub_batch_tokens", "--unified_after_steps", "--dev"):
        assert option in result.stdout
