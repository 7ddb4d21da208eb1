"""M3Trainer on a tiny model: what it computes, what stops it, and what is left on disk then."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import change_config
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from m3model import M3Model
from m3model.training import (
    DataSource,
    M3Trainer,
    M3TrainingArguments,
    TrainingDataError,
    TrainingDataset,
    TrainingDivergedError,
    last_checkpoint,
    read_training_rows,
)
from m3model.training import trainer as trainer_module
from m3model.training.dev_set import DevSet
from m3model.training.sharding import gathered_model

pytest.importorskip("accelerate")

WORDS = ["river", "mountain", "city", "bridge", "matrix", "vector", "sort", "list", "open", "file", "north", "south"]


needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


def zero(stage: int) -> dict[str, Any]:
    """A configuration of DeepSpeed."""
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    cut = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    return {"deepspeed": {**cut, **dict.fromkeys(automatic, "auto")}}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows: the passage says the word of the query between others."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = []
    for number, word in enumerate(WORDS * 2):
        filler = "of the " * (number % 4)
        others = [other for other in WORDS if other != word]
        negatives = [f"the {filler}{others[(number + place) % 11]} is here" for place in range(3)]
        query = f"where is {word}" if number < 12 else f"what is the {word}"
        rows.append({"query": query, "pos": [f"{filler}{word} is in the query"], "neg": negatives})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def still(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder without dropout."""
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("still") / "m3")
    change_config(copy, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return copy


def make(model: Path, data: Path, out: Path, callbacks: Any = (), **changes: Any) -> M3Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "group_size": 3,
        "learning_rate": 3e-4,
        "max_steps": 9,
        "logging_steps": 1,
        "save_steps": 2,
        "temperature": 0.1,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
    }
    arguments = M3TrainingArguments(**{**settings, **changes})
    loaded = M3Model.from_pretrained(model)
    return M3Trainer(
        loaded, arguments, TrainingDataset([DataSource(data)]), read_training_rows(data), callbacks=callbacks
    )


def curve(trainer: M3Trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(model: M3Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def test_loss_falls_and_the_best_checkpoint_is_a_model_folder(folder: Path, data: Path, tmp_path: Path) -> None:
    trainer = make(
        folder,
        data,
        tmp_path,
        max_steps=40,
        save_steps=10,
        eval_strategy="steps",
        eval_steps=10,
        load_best_model_at_end=True,
        unified_after_steps=10,
        learning_rate=1e-3,
        report_to="tensorboard",
    )
    trainer.model.initialize_heads()
    before = trainer.evaluate()
    trainer.train()
    losses = curve(trainer)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), losses
    after = trainer.evaluate()
    for head in ("dense", "sparse", "multi_vector", "hybrid"):
        assert 0 < before[f"eval_ndcg@10_{head}"] <= 1
        assert len(curve(trainer, f"eval_ndcg@10_{head}")) == 5
    assert after["eval_ndcg@10_hybrid"] > before["eval_ndcg@10_hybrid"]
    assert after["eval_ndcg@10_hybrid"] == max(curve(trainer, "eval_ndcg@10_hybrid"))
    # Two stages: no distillation in the steps of the warm-up.
    first = next(entry["step"] for entry in trainer.state.log_history if "loss_distill" in entry)
    assert first == 11 and len(curve(trainer, "loss_distill")) == 30
    for key in ("loss_dense", "loss_sparse", "loss_multi_vector", "loss_ensemble", "grad_norm", "token_weights"):
        assert len(curve(trainer, key)) == 40 and min(curve(trainer, key)) > 0, key
    assert min(curve(trainer, "tokens_per_second")) > 10
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents*"))
    best = M3Model.from_pretrained(trainer.state.best_model_checkpoint)
    assert largest_difference(weights(best), weights(trainer.model)) == 0
    assert best.encode(["the river"]).dense.shape == (1, 64)
    assert not (tmp_path / ".unfinished").exists()


@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True}, {"gradient_accumulation_steps": 2}])
def test_split_batch_takes_the_same_steps(still: Path, data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    shared = {**changes, "max_steps": 3, "save_strategy": "no", "optim": "sgd", "learning_rate": 0.05}
    start = weights(M3Model.from_pretrained(still))
    whole = make(still, data, tmp_path / "whole", **{**shared, "activation_checkpointing": False})
    whole.train()
    split = make(still, data, tmp_path / "split", sub_batch_tokens=40, **shared)
    assert split.model.backbone.gradient_checkpointing is False
    split.train()
    assert split.model.backbone.gradient_checkpointing == bool(changes.get("activation_checkpointing"))
    assert curve(split) == pytest.approx(curve(whole), rel=1e-5)
    moved = largest_difference(weights(whole.model), start)
    # float32 sums in another order, 3 steps of them.
    assert largest_difference(weights(split.model), weights(whole.model)) < 1e-4 * moved, moved


class QualityFalls:
    """Makes every evaluation worse than the one before it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: list[float] = []
        monkeypatch.setattr(DevSet, "ndcg", self.ndcg)

    def ndcg(self, *_arguments: Any, **_options: Any) -> dict[str, float]:
        self.values.append(0.9 - 0.1 * len(self.values))
        return {"hybrid": self.values[-1]}


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_the_best_checkpoint_is_one_that_was_saved(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    falls = QualityFalls(monkeypatch)
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = make(folder, data, tmp_path, max_steps=4, save_steps=2, save_strategy=strategy, **evaluation)
    trainer.train()
    assert len(falls.values) == 4
    best = 1 if strategy == "best" else 2
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.state.best_metric == falls.values[best - 1]
    stored = M3Model.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert largest_difference(weights(stored), weights(trainer.model)) == 0


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(model: Path, data: Path, out: Path, step: int) -> None:
    torch.set_num_threads(1)
    make(model, data, out, [KillAt(step)]).train()


def test_a_killed_run_goes_on_as_if_nothing_had_happened(folder: Path, data: Path, tmp_path: Path) -> None:
    step = random.SystemRandom().randint(3, 8)
    context = multiprocessing.get_context("spawn")
    killed = context.Process(target=train_until_killed, args=(folder, data, tmp_path / "killed", step))
    killed.start()
    whole = make(folder, data, tmp_path / "whole")
    whole.train()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    resumed = make(folder, data, tmp_path / "killed")
    checkpoint = last_checkpoint(tmp_path / "killed")
    assert checkpoint is not None and int(checkpoint.split("-")[-1]) == (step - 1) // 2 * 2
    resumed.train(resume_from_checkpoint=checkpoint)
    assert curve(resumed) == curve(whole), f"killed at step {step}"
    assert largest_difference(weights(resumed.model), weights(whole.model)) == 0, f"killed at step {step}"


@pytest.mark.parametrize("changes", [{"save_steps": 2}, {"save_steps": 2, "gradient_accumulation_steps": 2}], ids=str)
def test_a_resumed_run_logs_what_the_whole_one_does(
    folder: Path, data: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Also where logs are of several steps and a checkpoint is written between two of them."""
    shared = {**changes, "max_steps": 7, "logging_steps": 3}
    whole = make(folder, data, tmp_path, save_total_limit=None, **shared)
    whole.train()
    resumed = make(folder, data, tmp_path / "again", **shared)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for key in (
        "step",
        "loss",
        "loss_dense",
        "loss_sparse",
        "loss_ensemble",
        "loss_distill",
        "token_weights",
        "grad_norm",
    ):
        assert curve(resumed, key) == curve(whole, key), key
    assert [entry["step"] for entry in whole.state.log_history if "loss" in entry] == [2, 3, 4, 6, 7]


def test_workers_that_outlive_an_epoch_do_not_change_a_resumed_run(folder: Path, data: Path, tmp_path: Path) -> None:
    """6 batches an epoch; with dropout, which draws from the generator that a loader would take its seed from."""
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    shared = {"max_steps": 8, "save_steps": 6, "dataloader_multiprocessing_context": "fork"}
    whole = make(folder, data, tmp_path, **shared, **workers)
    whole.train()
    resumed = make(folder, data, tmp_path / "again", **shared, **workers)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    alone = make(folder, data, tmp_path / "alone", max_steps=8, save_steps=6)
    alone.train()
    assert curve(resumed) == curve(whole) == curve(alone)
    assert whole.get_train_dataloader().multiprocessing_context.get_start_method() == "fork"


def test_a_checkpoint_without_optimizer_is_not_resumed_in_silence(folder: Path, data: Path, tmp_path: Path) -> None:
    make(folder, data, tmp_path, max_steps=2, save_only_model=True).train()
    with pytest.warns(UserWarning, match=r"checkpoint-2 has no optimizer\.pt \(save_only_model\)"):
        make(folder, data, tmp_path, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_run_that_goes_on_with_other_rows_says_so(folder: Path, data: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(data.read_bytes())
    make(folder, rows, tmp_path, max_steps=2, save_steps=2).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make(folder, data, tmp_path, max_steps=3).train(resume_from_checkpoint=checkpoint)
    rows.write_bytes(data.read_bytes().splitlines(keepends=True)[0] + data.read_bytes())
    with pytest.warns(UserWarning, match="checkpoint-2 was trained on other rows"):
        make(folder, rows, tmp_path, max_steps=3).train(resume_from_checkpoint=checkpoint)


def test_a_length_beyond_the_model_is_reported(folder: Path, data: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="passage_max_length is 9000, but the model serves 8192 tokens"):
        make(folder, data, tmp_path, passage_max_length=9000)


def on_ranks(ranks: int, task: Any, *arguments: Any) -> None:
    """Run task(trainer's own process group, *arguments) in so many processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(run_a_rank, (ranks, port, task, arguments), nprocs=ranks)


def run_a_rank(rank: int, ranks: int, port: int, task: Any, arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed takes a GPU that use_cpu leaves alone
    torch.set_num_threads(1)
    task(*arguments)
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads can hang the release of DistributedDataParallel's group when a rank leaves first


def train_on_a_rank(model: Path, data: Path, out: Path, changes: dict[str, Any]) -> None:
    trainer = make(model, data, out, ddp_backend="gloo", **changes)
    measured, real = [], trainer_module.token_lengths

    def watched(*arguments: Any) -> Any:
        measured.extend(arguments[3])
        return real(*arguments)

    trainer_module.token_lengths = watched
    trainer.train()
    rank, ranks = trainer.args.process_index, trainer.args.world_size
    assert measured == list(range(24 * rank // ranks, 24 * (rank + 1) // ranks))
    alone = real(trainer.train_dataset, trainer._collator.tokenizer_function, trainer.args.passage_max_length)
    assert trainer._lengths.tolist() == alone.tolist()
    whole = whole_weights(trainer)
    if trainer.args.process_index == 0:
        torch.save(
            {"curve": curve(trainer), "norms": curve(trainer, "grad_norm"), "weights": whole}, out / "results.pt"
        )


def measure_on_a_rank(model: Path, data: Path, added: Path, out: Path) -> None:
    """Lengths of one file, of it and another one, and of both again."""
    measured: list[int] = []
    real = trainer_module.token_lengths

    def watched(*arguments: Any) -> Any:
        measured.extend(arguments[3])
        return real(*arguments)

    trainer_module.token_lengths = watched
    for files, shares in (
        ([data], [range(12), range(12, 24)]),
        ([added, data], [range(3), range(3, 7)]),
        ([added], 2 * [[]]),
    ):
        arguments = M3TrainingArguments(output_dir=str(out), group_size=1, use_cpu=True, ddp_backend="gloo")
        dataset = TrainingDataset([DataSource(file) for file in files])
        trainer = M3Trainer(M3Model.from_pretrained(model), arguments, dataset)
        measured.clear()
        trainer.get_train_dataloader()
        assert measured == [*shares[arguments.process_index]]
        alone = real(dataset, trainer._collator.tokenizer_function, arguments.passage_max_length)
        assert trainer._lengths.tolist() == alone.tolist()


def test_processes_share_what_an_earlier_run_measured(folder: Path, data: Path, tmp_path: Path) -> None:
    added = tmp_path / "added.jsonl"
    added.write_text("".join(data.read_text().splitlines(keepends=True)[:7]))
    on_ranks(2, measure_on_a_rank, folder, data, added, tmp_path / "run")
    kept = sorted((tmp_path / "run" / "token_lengths").iterdir())
    assert len(kept) == 2 and {path.suffix for path in kept} == {".npz"}


def whole_weights(trainer: M3Trainer) -> dict[str, Tensor]:
    return weights(gathered_model(trainer.model) if trainer.args.fsdp else trainer.model)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {}),
        (4, {}),
        (2, {"fsdp": True, "gradient_checkpointing": True}),
        (2, {"fsdp": True, "frozen_layers": 1}),
        pytest.param(2, {**zero(1), "sub_batch_tokens": None}, marks=needs_deepspeed),
        pytest.param(2, zero(2), marks=needs_deepspeed),
        pytest.param(2, {**zero(2), "gradient_accumulation_steps": 2}, marks=needs_deepspeed),
    ],
    ids=str,
)
def test_several_processes_take_the_steps_of_one(
    still: Path, data: Path, tmp_path: Path, ranks: int, changes: dict[str, Any]
) -> None:
    common = {"max_steps": 4, "save_steps": 4, "optim": "sgd", "learning_rate": 0.05, "sub_batch_tokens": 60}
    changes = {**common, **changes}
    several = {**changes, "per_device_train_batch_size": 4 // ranks}
    on_ranks(ranks, train_on_a_rank, still, data, tmp_path / "several", several)
    one = make(still, data, tmp_path / "one", **{**changes, "fsdp": False, "deepspeed": None})
    start = weights(one.model)
    one.train()
    found = torch.load(tmp_path / "several" / "results.pt")
    assert found["curve"] == pytest.approx(curve(one), rel=1e-5)
    assert found["norms"] == pytest.approx(curve(one, "grad_norm"), rel=1e-4)
    moved = largest_difference(weights(one.model), start)
    assert largest_difference(found["weights"], weights(one.model)) < 1e-4 * moved
    checkpoint = tmp_path / "several" / "checkpoint-4"
    assert largest_difference(found["weights"], weights(M3Model.from_pretrained(checkpoint))) == 0
    stored = sorted(path.name for path in checkpoint.glob("rng_state*"))
    assert stored == [f"rng_state_{rank}.pth" for rank in range(ranks)]


def train_shards_twice(model: Path, data: Path, out: Path) -> None:
    """A sharded run, and another that goes on from the middle of it; both evaluate."""
    settings: dict[str, Any] = {"fsdp": True, "ddp_backend": "gloo", "per_device_train_batch_size": 2, "max_steps": 4}
    settings |= {"eval_strategy": "steps", "eval_steps": 4}
    whole = make(model, data, out, **settings)
    held = sum(parameter.to_local().numel() for parameter in whole.model.parameters())
    everything = sum(parameter.numel() for parameter in whole.model.parameters())
    assert held < 0.6 * everything, f"a rank of two holds {held} of {everything} weights"
    whole.train()
    moments = whole.optimizer.state[whole.model.sparse_linear.weight]["exp_avg"]
    assert isinstance(moments, DTensor)
    again = make(model, data, out / "again", **settings)
    again.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert curve(again) == curve(whole)
    assert curve(again, "eval_ndcg@10_hybrid") == curve(whole, "eval_ndcg@10_hybrid")
    assert largest_difference(whole_weights(again), whole_weights(whole)) == 0
    if whole.args.process_index == 0:
        torch.save(curve(whole), out / "curve.pt")


def test_a_sharded_run_goes_on_sharded_and_alone(still: Path, data: Path, tmp_path: Path) -> None:
    on_ranks(2, train_shards_twice, still, data, tmp_path / "two")
    alone = make(still, data, tmp_path / "alone", max_steps=4)
    alone.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-2"))
    assert curve(alone) == pytest.approx(torch.load(tmp_path / "two" / "curve.pt"), rel=1e-3)


def train_in_deepspeed_twice(model: Path, data: Path, out: Path) -> None:
    settings: dict[str, Any] = {**zero(2), "per_device_train_batch_size": 2, "max_steps": 4, "sub_batch_tokens": 60}
    whole = make(model, data, out, **settings)
    whole.train()
    again = make(model, data, out / "again", **settings)
    again.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert curve(again) == curve(whole)
    assert largest_difference(weights(again.model), weights(whole.model)) == 0


@needs_deepspeed
def test_a_run_in_deepspeed_goes_on(folder: Path, data: Path, tmp_path: Path) -> None:
    on_ranks(2, train_in_deepspeed_twice, folder, data, tmp_path)


@needs_deepspeed
def test_the_third_stage_of_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage 3; accepted: stages 0 to 2"):
        M3TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **zero(3))


class Spoil(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_rest: Any) -> None:
        if state.global_step == 5:
            with torch.no_grad():
                model.colbert_linear.weight[0, 0] = torch.nan


def test_a_loss_that_is_not_a_number_stops_before_the_step(folder: Path, data: Path, tmp_path: Path) -> None:
    trainer = make(folder, data, tmp_path, [Spoil()])
    with pytest.raises(TrainingDivergedError, match=r"loss is nan at step 5.*checkpoint-4"):
        trainer.train()
    stored = M3Model.from_pretrained(tmp_path / "checkpoint-4")
    assert all(bool(tensor.isfinite().all()) for tensor in stored.state_dict().values())
    whole = make(folder, data, tmp_path / "whole")
    whole.train()
    resumed = make(folder, data, tmp_path)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    assert largest_difference(weights(resumed.model), weights(whole.model)) == 0


def test_a_gradient_that_is_not_finite_stops_before_the_step(folder: Path, data: Path, tmp_path: Path) -> None:
    trainer = make(folder, data, tmp_path)
    trainer.model.sparse_linear.bias.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(TrainingDivergedError, match="norm of the gradient"):
        trainer.train()
    assert all(bool(tensor.isfinite().all()) for tensor in trainer.model.state_dict().values())


class CutShort(TrainerCallback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_begin(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
        if state.global_step == 2:  # a batch is read ahead
            os.truncate(self.path, 0)


def test_a_file_emptied_during_training_leaves_the_last_checkpoint(folder: Path, data: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    shutil.copy(data, rows)
    trainer = make(folder, rows, tmp_path / "run", [CutShort(rows)])
    with pytest.raises(TrainingDataError, match=r"rows\.jsonl was cut short"):
        trainer.train()
    with pytest.raises(TrainingDataError, match=r"rows\.jsonl: the file has no rows"):
        make(folder, rows, tmp_path / "run")
    shutil.copy(data, rows)
    found = last_checkpoint(tmp_path / "run")
    assert found is not None and found.endswith("checkpoint-2")
    resumed = make(folder, rows, tmp_path / "run")
    resumed.train(resume_from_checkpoint=found)
    whole = make(folder, rows, tmp_path / "whole")
    whole.train()
    assert largest_difference(weights(resumed.model), weights(whole.model)) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def check_disk_full(folder: Path, data: Path, out: Path, scratch: Path) -> None:
    trainer = make(folder, data, out)
    with pytest.raises(OSError, match=r"checkpoint-4 cannot be written.*[0-9] MiB are free there.*checkpoint-2"):
        trainer.train()
    assert sorted(path.name for path in out.glob("*")) == ["checkpoint-2", "token_lengths"]
    assert not (out / ".unfinished").exists()
    resumed = make(folder, data, out, save_strategy="no")
    resumed.train(resume_from_checkpoint=last_checkpoint(out))
    whole = make(folder, data, scratch, save_strategy="no")
    whole.train()
    assert largest_difference(weights(resumed.model), weights(whole.model)) == 0


def test_a_full_disk_leaves_the_last_checkpoint(folder: Path, data: Path, small_disk: Path, tmp_path: Path) -> None:
    check_disk_full(folder, data, small_disk / "run", tmp_path / "whole")


def test_an_error_while_writing_leaves_the_last_checkpoint(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trainer_module.flush

    def full(path: Path) -> None:
        if path.name == "optimizer.pt" and "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path)

    monkeypatch.setattr(trainer_module, "flush", full)
    check_disk_full(folder, data, tmp_path / "run", tmp_path / "whole")


def test_a_dead_sparse_head_is_reported(folder: Path, data: Path, tmp_path: Path) -> None:
    trainer = make(folder, data, tmp_path, save_strategy="no", dead_sparse_steps=3)
    with torch.no_grad():
        trainer.model.sparse_linear.bias.fill_(-1000)
    with pytest.warns(UserWarning, match="sparse head is dead.*last 3 steps"):
        trainer.train()
    assert set(curve(trainer, "token_weights")) == {0.0}
    # 4 batches without token weights, but 2 steps
    twice = make(
        folder, data, tmp_path, save_strategy="no", dead_sparse_steps=3, max_steps=2, gradient_accumulation_steps=2
    )
    with torch.no_grad():
        twice.model.sparse_linear.bias.fill_(-1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make(folder, data, tmp_path, save_strategy="no", dead_sparse_steps=3, max_steps=4).train()
        twice.train()


def test_heads_that_are_left_out_stay_as_they_are(folder: Path, data: Path, tmp_path: Path) -> None:
    trainer = make(
        folder, data, tmp_path, heads=["dense"], max_steps=2, save_strategy="no", freeze_word_embeddings=True
    )
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    same = {name for name in before if torch.equal(before[name], after[name])}
    heads = {name for name in before if name.startswith(("sparse_linear", "colbert_linear"))}
    assert same == heads | {"backbone.embeddings.word_embeddings.weight"}
    assert curve(trainer, "loss") == curve(trainer, "loss_dense")
    assert set(trainer.evaluate()) >= {"eval_ndcg@10_dense"} and "eval_ndcg@10_hybrid" not in trainer.evaluate()


@pytest.mark.parametrize("split", [None, 40])
def test_frozen_layers_stay_as_they_are(folder: Path, data: Path, tmp_path: Path, split: int | None) -> None:
    trainer = make(folder, data, tmp_path, frozen_layers=1, max_steps=2, save_strategy="no", sub_batch_tokens=split)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    assert [layer.training for layer in trainer.model.backbone.encoder.layer] == [False, True]
    for name in before:
        frozen = name.startswith(("backbone.embeddings", "backbone.encoder.layer.0."))
        # The bias of the keys moves no score.
        if not name.endswith("key.bias"):
            assert torch.equal(before[name], after[name]) == frozen, name
    with pytest.raises(ValueError, match="frozen_layers is 3; the backbone has 2"):
        make(folder, data, tmp_path, frozen_layers=3)


def test_frozen_layers_give_what_they_gave_before(still: Path, data: Path, tmp_path: Path) -> None:
    losses = []
    for frozen in (0, 1):
        trainer = make(still, data, tmp_path / str(frozen), frozen_layers=frozen, max_steps=1, save_strategy="no")
        trainer.train()
        losses.append(curve(trainer))
    # The kernels of inference add up in another order.
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_dropout_may_differ_from_that_of_the_config(folder: Path, still: Path, data: Path, tmp_path: Path) -> None:
    shared = {"max_steps": 3, "save_strategy": "no"}
    trainers = []
    for model, dropout in ((folder, 0.0), (still, None), (folder, None), (still, 0.1)):
        # A trainer seeds the generator when it is made.
        trainers.append(make(model, data, tmp_path / str(len(trainers)), dropout=dropout, **shared))
        trainers[-1].train()
    without, same, with_it, put_in = map(curve, trainers)
    assert without == same and with_it == put_in and with_it != without
    trainers[0].save_model(str(tmp_path / "saved"))
    assert M3Model.from_pretrained(tmp_path / "saved").config.hidden_dropout_prob == 0.1


def test_the_heads_may_learn_faster(folder: Path, data: Path, tmp_path: Path) -> None:
    trainer = make(folder, data, tmp_path, head_learning_rate=0.5, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    rate_of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    decay_of = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        assert rate_of[id(parameter)] == (0.5 if "_linear" in name else 3e-4), name
        assert decay_of[id(parameter)] == (0.0 if "bias" in name or "LayerNorm" in name else 0.1), name


def test_teacher_scores_of_the_data_are_used_or_not(still: Path, data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps({**r, "pos_scores": [3.0], "neg_scores": [1.0, 2.0, 0.0]}) + "\n" for r in rows))
    shared = {"max_steps": 1, "save_strategy": "no"}
    losses = {}
    for kind in ("none", "kl_div", "m3_kd_loss"):
        trainer = make(still, path, tmp_path / kind, teacher_loss=kind, **shared)
        trainer.train()
        losses[kind] = curve(trainer)[0]
    plain = make(still, data, tmp_path / "plain", **shared)
    plain.train()
    assert losses["none"] == curve(plain)[0]
    assert len(set(losses.values())) == 3, losses


def test_mixed_precision_is_close_to_float32(still: Path, data: Path, tmp_path: Path) -> None:
    losses = []
    for bf16 in (False, True):
        trainer = make(still, data, tmp_path / str(bf16), bf16=bf16, max_steps=2, save_strategy="no")
        trainer.train()
        losses.append(curve(trainer))
    # bfloat16 rounds each product to 2^-8; two layers and scores / 0.1.
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("heads", ["dense", "lexical"]),
        ("heads", []),
        ("temperature", 0.0),
        ("hybrid_weights", [1.0, 1.0]),
        ("loss_weights", [1.0, -1.0, 1.0]),
        ("teacher_loss", "mse"),
        ("group_size", 0),
        ("sub_batch_tokens", 0),
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("max_steps", 0),
        ("unified_after_steps", -1),
        ("head_learning_rate", 0.0),
        ("frozen_layers", -1),
        ("dropout", 1.0),
        ("label_smoothing_factor", 0.1),
        ("length_buckets", "2000"),
        ("length_buckets", {}),
        ("length_buckets", {"long": 4}),
        ("length_buckets", '{"500": 2.5}'),
        ("length_buckets", {500: 0}),
        ("metric_for_best_model", "loss"),
        ("metric_for_best_model", "ndcg@10_lexical"),
        ("train_sampling_strategy", "group_by_length"),
        ("torch_empty_cache_steps", 4),
        ("lr_scheduler_kwargs", "num_cycles=2"),
        ("deepspeed", "zero3.json"),
        ("fsdp", "full_shard"),
        ("fsdp_config", {"version": 1}),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name.replace("_weights", "_weights are")):
        M3TrainingArguments(
            **{"output_dir": str(tmp_path), "use_cpu": True, "fsdp": name == "fsdp_config", name: value}
        )


def test_the_learning_rate_may_follow_the_quality(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    QualityFalls(monkeypatch)
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5}}
    trainer = make(
        folder, data, tmp_path, max_steps=4, save_strategy="no", eval_strategy="steps", eval_steps=1, **plateau
    )
    trainer.train()
    assert trainer.lr_scheduler.best == pytest.approx(0.9)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(3e-4 / 8)


def test_batches_by_length_and_negatives_that_are_missing(folder: Path, data: Path, tmp_path: Path) -> None:
    trainer = make(folder, data, tmp_path, length_buckets='{"9": 4, "60": 2}')
    sizes = {len(batch["query_offsets"]) - 1 for batch in trainer.get_train_dataloader()}
    assert trainer._lengths is not None
    assert sizes <= {1, 2, 4} and 2 in sizes, f"{sizes} of rows of {sorted(set(trainer._lengths.tolist()))} tokens"
    alone = tmp_path / "alone.jsonl"
    alone.write_text('{"query": "a", "pos": ["b"]}\n{"query": "c", "pos": ["d"]}\n')
    with pytest.raises(ValueError, match=r"alone\.jsonl:1: the row has no negatives"):
        make(folder, alone, tmp_path)
    assert last_checkpoint(tmp_path / "nothing") is None
    make(folder, alone, tmp_path, group_size=1, max_steps=1, save_strategy="no").train()
    for one in ({"per_device_train_batch_size": 1}, {"length_buckets": {9: 1, 99: 1}}):
        with pytest.raises(ValueError, match="nothing would be a negative"):
            make(folder, alone, tmp_path, group_size=1, **one)
