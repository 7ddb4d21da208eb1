"""M3Trainer: transformers.Trainer over packed texts, the M3 loss and checkpoints that are model folders.

A step, on each process, with B queries and G passages of each:

    ids, offsets   queries and passages one after another: one packed forward pass, as DistributedDataParallel wants it
    embeddings     of the heads that are trained, or with a split batch those of all sub-batches together
    loss           m3_loss of own queries with the passages of all processes
    backward       of loss / number of accumulated steps

Logged with each loss: that of every head, hybrid and distillation, tokens per second, non-zero token weights of a text,
and the gradient's norm. A loss or gradient that is not finite stops the training before it reaches the weights.

A checkpoint is written beside its place and renamed when it is complete and on disk: a folder checkpoint-N is whole, it
is a model folder for M3Model.from_pretrained, and training goes on from it as if it had not been interrupted.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    IntervalStrategy,
    SaveStrategy,
    get_last_checkpoint,
    rotate_checkpoints,
)

from m3model.embeddings import M3Embeddings
from m3model.encoding import pack_ids
from m3model.files import flush, free_room
from m3model.model import M3Model, Role
from m3model.scoring import HEADS
from m3model.training.arguments import M3TrainingArguments
from m3model.training.batching import (
    MEASURED_CHARACTERS,
    LengthGroupedBatchSampler,
    TrainingBatch,
    TrainingCollator,
    token_lengths,
)
from m3model.training.data import TrainingDataset, TrainingRow
from m3model.training.dev_set import DevSet
from m3model.training.distributed import gather_embeddings
from m3model.training.length_cache import LengthCache
from m3model.training.losses import M3Loss, m3_loss
from m3model.training.sharding import gathered_model, gathered_state, is_sharded, load_sharded, shard, sharded_state
from m3model.training.split_batch import split_batch_backward

__all__ = ["M3Trainer", "TrainingDivergedError", "last_checkpoint"]

_UNFINISHED = ".unfinished"
_STATE = "trainer_state.json"
_ROWS = "training_rows.json"


class TrainingDivergedError(RuntimeError):
    """The loss or its gradient is not finite; the weights are those before this step."""


class M3Trainer(Trainer):  # type: ignore[misc]
    """Trains an M3Model.

    With DeepSpeed (ZeRO stages 0 to 2) a gradient that is not finite stops the training too, but behind its step, which
    the engine makes in the backward pass; a loss that is not finite stops it before.

    Evaluation gives nDCG@10 of each trained head and of the hybrid on the development set, as
    eval_ndcg@10_dense, _sparse, _multi_vector and _hybrid; each process computes it whole.
    """

    def __init__(
        self,
        model: M3Model,
        args: M3TrainingArguments,
        train_dataset: TrainingDataset | None = None,
        eval_dataset: Iterable[TrainingRow] | DevSet | None = None,
        *,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """
        Args:
            model: with tokenizer, in float32; bf16 and fp16 of `args` compute in mixed precision.
            args: see M3TrainingArguments.
            train_dataset: None for evaluation alone.
            eval_dataset: rows of the development set.
            callbacks: further callbacks of transformers.

        Raises:
            TypeError: model or args are of other types.
            ValueError: the model has no tokenizer; no room for texts; rows of the development set are missing; more
                layers are to be frozen than there are; groups and batches of one, in which no passage is a negative.
            TrainingDataError: group_size asks for negatives that rows lack.
        """
        if not isinstance(model, M3Model):
            raise TypeError(f"model must be an M3Model, got {type(model).__name__}")
        if not isinstance(args, M3TrainingArguments):
            raise TypeError(f"args must be M3TrainingArguments, got {type(args).__name__}")
        if train_dataset is not None:
            train_dataset.check_negatives(args.group_size)
            _check_batches(train_dataset, args)
        if eval_dataset is not None and not isinstance(eval_dataset, DevSet):
            eval_dataset = DevSet(eval_dataset, args.query_instruction, args.passage_instruction)
        for name in ("query_max_length", "passage_max_length"):
            if getattr(args, name) > model.max_length:
                warnings.warn(
                    f"{name} is {getattr(args, name)}, but the model serves {model.max_length} tokens and texts are cut"
                    " there; M3Model.extend_positions lengthens it",
                    stacklevel=2,
                )
        self._tokenize = _Tokenize(model, "passage", args.passage_max_length)
        self._collator = TrainingCollator(
            self._tokenize,
            query_tokenizer_function=_Tokenize(model, "query", args.query_max_length),
            group_size=args.group_size,
            query_max_length=args.query_max_length,
            passage_max_length=args.passage_max_length,
            query_instruction=args.query_instruction,
            passage_instruction=args.passage_instruction,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            shuffle_ratio=args.shuffle_ratio,
        )
        _freeze(model, args)
        if args.dropout is not None:
            model.backbone.set_dropout(args.dropout)
        # transformers writes into the configuration of its own models, and this one may not change.
        config, model.config = model.config, None  # type: ignore[assignment]
        try:
            super().__init__(
                model,
                args,
                self._collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                callbacks=[*callbacks],
            )
        finally:
            model.config = config
        for callback in self.callback_handler.callbacks:
            # Without it an evaluation before training would log below the working directory.
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = os.path.join(args.output_dir, "tensorboard")
        if self.is_fsdp_enabled:
            raise ValueError("accelerate is set up for FSDP; accepted: fsdp in the arguments and torchrun as launcher")
        if args.fsdp:
            shard(model)
            # To transformers it is a model that came sharded: nothing wraps it again.
            self.is_distributed_loading_by_transformers = True
        self.current_gradient_accumulation_steps = 1
        self._options = {head: head in args.heads for head in HEADS}
        self._lengths: NDArray[np.int32] | None = None
        self._window = _Window()
        self._step_with_token_weights: int | None = None
        self._saving = False

    # ---- Data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of this process; the same epoch gives the same batches in the same order."""
        if self.train_dataset is None:
            raise ValueError("train_dataset is None; training needs one")
        args = self.args
        if self._lengths is None:
            self._lengths = self._measured_lengths()
        batches = _Batches(
            self._collator,
            self.train_dataset,
            self._train_batch_size,
            length_buckets=args.buckets(),
            lengths=self._lengths,
            world_size=args.world_size,
            rank=args.process_index,
            seed=self._collator.seed,
            drop_last=args.dataloader_drop_last,
        )
        return _Loader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self._collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            # Not the one that dropout draws from: a loader takes a seed whenever it starts workers, and workers that
            # outlive an epoch are started in other epochs by a resumed run than by a whole one.
            generator=torch.Generator(),
        )

    def _measured_lengths(self) -> NDArray[np.int32]:
        """Tokens of every row: those of a file that was measured before come out of the cache, which the first process
        alone reads and writes; of the other files each process measures its share."""
        args, data, tokenize = self.args, self.train_dataset, self._tokenize
        cache = LengthCache(args.lengths_folder(), *tokenize.measure, args.passage_max_length, MEASURED_CHARACTERS)
        files = [data.rows_of(number) for number in range(len(data.sources))]
        kept: list[Any] = [None] * len(files)
        if args.process_index == 0:
            kept = [cache.load(digest, len(rows)) for digest, rows in zip(data.digests, files)]
        if args.world_size > 1:
            dist.broadcast_object_list(kept)
        absent = np.concatenate(
            [np.arange(rows.start, rows.stop if held is None else rows.start) for rows, held in zip(files, kept)]
        )
        bounds = [len(absent) * rank // args.world_size for rank in range(args.world_size + 1)]
        share = absent[bounds[args.process_index] : bounds[args.process_index + 1]]
        parts: list[Any] = [token_lengths(data, tokenize, args.passage_max_length, share)]
        if args.world_size > 1:
            own, parts = parts[0], [None] * args.world_size
            dist.all_gather_object(parts, own)
        lengths = np.empty(len(data), dtype=np.int32)
        lengths[absent] = np.concatenate(parts)
        for digest, rows, held in zip(data.digests, files, kept):
            part = lengths[rows.start : rows.stop]
            if held is not None:
                part[:] = held
            elif args.process_index == 0:
                cache.store(digest, part)
        return lengths

    # ---- Step

    def training_step(
        self, model: torch.nn.Module, inputs: TrainingBatch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward, loss and backward of a batch; returns the loss / number of accumulated steps, detached."""
        self._window.begin()
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        queries = inputs["query_offsets"].shape[0] - 1
        ids = torch.cat([inputs["query_ids"], inputs["passage_ids"]])
        offsets = torch.cat([inputs["query_offsets"], inputs["query_offsets"][-1] + inputs["passage_offsets"][1:]])
        options = {**self._options, "max_length": int(offsets.diff().max())}
        ids, offsets = self._prepare_input([ids, offsets])
        teacher = self._prepare_input(inputs.get("teacher_scores"))
        scale = 1.0 / self.current_gradient_accumulation_steps

        def loss_of(embeddings: M3Embeddings[Any]) -> M3Loss:
            loss = self._loss(embeddings, queries, inputs["group_size"], teacher)
            self._watch(loss, embeddings, ids.shape[0])
            return loss

        if self.args.sub_batch_tokens is None:
            loss = loss_of(model(ids, offsets, **options))
            self._backward(scale * loss.total)
        else:
            scaler = self.accelerator.scaler
            scaled = scale if scaler is None else scale * float(scaler.scale(torch.ones((), device=ids.device)))
            loss = split_batch_backward(
                model,
                ids,
                offsets,
                loss_of,
                sub_batch_tokens=self.args.sub_batch_tokens,
                scale=scaled,
                options=options,
                backward=self._backward if self.is_deepspeed_enabled else None,
            )
        return scale * loss.total.detach()

    def _backward(self, loss: Tensor, last: bool = True) -> None:
        """The backward pass of a loss; DeepSpeed's engine makes its step behind the last one that is accumulated."""
        if not self.is_deepspeed_enabled:
            self.accelerator.backward(loss)
            return
        steps = last and self.accelerator.sync_gradients
        # The loss is divided by the accumulated steps already.
        self.accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=steps, scale_wrt_gas=False)

    def _loss(self, embeddings: M3Embeddings[Any], queries: int, group_size: int, teacher: Tensor | None) -> M3Loss:
        args = self.args
        own = embeddings.select(slice(0, queries)), embeddings.select(slice(queries, len(embeddings)))
        passages, first = own[1], 0
        if args.in_batch_negatives and args.cross_rank_negatives:
            passages = gather_embeddings(own[1])
            if len(passages) != args.world_size * len(own[1]):
                raise ValueError(
                    f"process {args.process_index} has {len(own[1])} passages, all {args.world_size} processes"
                    f" together {len(passages)}; accepted: batches of equal size on all of them"
                )
            first = args.process_index * len(own[1])
        return m3_loss(
            own[0],
            passages,
            temperature=args.temperature,
            weights=args.hybrid_weights,
            loss_weights=args.loss_weights,
            self_distill=args.self_distill and self.state.global_step >= args.unified_after_steps,
            official=args.official,
            in_batch_negatives=args.in_batch_negatives,
            teacher_scores=None if args.teacher_loss == "none" else teacher,
            teacher_loss="kl_div" if args.teacher_loss == "none" else args.teacher_loss,
            group_size=group_size,
            first_passage=first,
        )

    def _watch(self, loss: M3Loss, embeddings: M3Embeddings[Any], tokens: int) -> None:
        """Add to what is logged, stop at a loss that is not finite, warn of a sparse head that gives no weights."""
        parts = {name: part.detach() for name, part in zip(loss._fields, loss) if part is not None}
        if embeddings.sparse is not None:
            parts["token_weights"] = embeddings.sparse.offsets[-1] / len(embeddings)
        # The only numbers that cross to the host in a step, all at once.
        values = dict(zip(parts, torch.stack([part.double() for part in parts.values()]).tolist()))
        self._window.add(values, tokens)
        if not math.isfinite(values["total"]):
            raise self._diverged(f"the loss is {values['total']}")
        if "token_weights" not in values:
            return
        step = self.state.global_step
        if self._step_with_token_weights is None:
            self._step_with_token_weights = step - 1
        if values["token_weights"] > 0:
            self._step_with_token_weights = step
        elif step - self._step_with_token_weights == self.args.dead_sparse_steps:
            self._step_with_token_weights = sys.maxsize  # warns once
            warnings.warn(
                f"the sparse head is dead: no token weight was above zero in the last {self.args.dead_sparse_steps}"
                f" steps, up to step {step}; it gets no gradient any more. Start again with a smaller"
                " head_learning_rate or a larger sparse loss weight",
                stacklevel=2,
            )

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # A gradient scaler (fp16) skips such steps itself and lowers its scale.
        if self.accelerator.scaler is None and not math.isfinite(float(norm)):
            raise self._diverged(f"the norm of the gradient is {float(norm)}")
        return norm

    def _diverged(self, what: str) -> TrainingDivergedError:
        found = last_checkpoint(self.args.output_dir)
        kept = "there is no checkpoint yet" if found is None else f"the last checkpoint is {found}"
        return TrainingDivergedError(
            f"{what} at step {self.state.global_step}; {kept}. Try a smaller learning rate, or look for texts that make"
            " no sense in the data"
        )

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """transformers' optimizer, with groups of their own for the heads where they have another learning rate."""
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if fresh and self.args.fsdp:
            optimizer.register_load_state_dict_pre_hook(sharded_state)
        if not fresh or self.args.head_learning_rate is None:
            return optimizer
        heads = {id(p) for head in (self.model.sparse_linear, self.model.colbert_linear) for p in head.parameters()}
        for group in list(optimizer.param_groups):
            chosen = [parameter for parameter in group["params"] if id(parameter) in heads]
            if chosen:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in heads]
                others = {name: value for name, value in group.items() if name != "params"}
                optimizer.add_param_group({**others, "params": chosen, "lr": self.args.head_learning_rate})
        return optimizer

    # ---- Logs and evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers logs, with the means since the last log beside the loss."""
        if "loss" in logs:
            logs.update(self._window.means(self.args.world_size, self.args.device))
            self._window = _Window()
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Iterable[TrainingRow] | DevSet | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """nDCG@10 of each head, see the class; `ignore_keys` is not used.

        Raises:
            ValueError: there is no development set.
        """
        args, dev = self.args, self.eval_dataset if eval_dataset is None else eval_dataset
        if dev is None:
            raise ValueError("eval_dataset is None; evaluation needs a development set")
        if not isinstance(dev, DevSet):
            dev = DevSet(dev, args.query_instruction, args.passage_instruction)
        begin = time.monotonic()
        values = dev.ndcg(
            self._whole_model(),
            args.heads,
            args.hybrid_weights,
            query_max_length=args.query_max_length,
            passage_max_length=args.passage_max_length,
        )
        metrics = {f"{metric_key_prefix}_ndcg@10_{name}": value for name, value in values.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.monotonic() - begin, 3)
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        """As transformers, and a log before every evaluation and checkpoint: a mean over the steps since the last log
        could not be had by a run that goes on from a checkpoint between them."""
        logs = self.args.logging_strategy != IntervalStrategy.NO
        if logs and (self.control.should_save or self.control.should_evaluate):
            self.control.should_log = True
        super()._maybe_log_save_evaluate(*arguments, **options)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As transformers, but among the steps that have a checkpoint; another one could not be loaded in the end."""
        saves = self.args.save_strategy in (SaveStrategy.STEPS, SaveStrategy.EPOCH)
        if saves and not self.control.should_save:
            return False
        found: bool = super()._determine_best_metric(metrics, trial)
        return found

    # ---- Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self._whole_model()
        if self.args.should_save:
            model.save_pretrained(output_dir or self.args.output_dir)

    def _whole_model(self) -> M3Model:
        """The trained model, or where it is sharded a copy put together; every process calls it."""
        model: M3Model = self.accelerator.unwrap_model(self.model)
        return gathered_model(model) if is_sharded(model) else model

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.fsdp:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = gathered_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return os.path.join(folder, _UNFINISHED) if self._saving else folder

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        args, name = self.args, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        run = Path(self._get_output_dir(trial))
        unfinished = run / _UNFINISHED
        if args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.state.best_global_step:
                best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
                self.state.best_model_checkpoint = str(best)
            if args.should_save:
                self.state.save_to_json(str(unfinished / name / _STATE))
                (unfinished / name / _ROWS).write_text(json.dumps(self.train_dataset.digests))
                _publish(unfinished / name, run / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not args.should_save:
                raise
            room = free_room(run)
            shutil.rmtree(unfinished, ignore_errors=True)
            kept = last_checkpoint(run)
            raise OSError(
                f"{name} cannot be written to {run}: {error}; {room}; "
                + ("there is no earlier checkpoint" if kept is None else f"the last complete checkpoint is {kept}")
            ) from error
        finally:
            self._saving = False
        if args.should_save:
            unfinished.rmdir()
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        stored = M3Model.from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        if is_sharded(target):
            load_sharded(target, stored)
        else:
            target.load_state_dict(stored.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.is_world_process_zero():
            self._compare_rows(Path(checkpoint) / _ROWS)
        own = checkpoint is not None and not self.is_deepspeed_enabled
        if own and not Path(str(checkpoint), OPTIMIZER_NAME).is_file():
            warnings.warn(
                f"{checkpoint} has no {OPTIMIZER_NAME} (save_only_model): optimizer and learning rate start anew, so"
                " the run does not end as it would have without the break",
                stacklevel=2,
            )
        super()._load_optimizer_and_scheduler(checkpoint)

    def _compare_rows(self, stored: Path) -> None:
        if stored.is_file() and json.loads(stored.read_text()) != list(self.train_dataset.digests):
            warnings.warn(
                f"{stored.parent} was trained on other rows than those of the training files now: from here on batches"
                " are drawn from these, and the run does not end as it would have",
                stacklevel=2,
            )

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a run, complete as all of them, or None."""
    if not os.path.isdir(output_dir):
        return None
    found: str | None = get_last_checkpoint(os.fspath(output_dir))
    return found


def _check_batches(dataset: TrainingDataset, args: M3TrainingArguments) -> None:
    """Raise ValueError where every batch would be one query with its positive alone: the loss would always be 0."""
    rows = max(source.batch_size or args.train_batch_size for source in dataset.sources)
    buckets = args.buckets()
    if buckets is not None:
        rows = min(rows, max(buckets.values()))
    if args.group_size * rows * (args.world_size if args.cross_rank_negatives else 1) < 2:
        raise ValueError("group_size is 1 and no batch has more than 1 row; nothing would be a negative")


def _freeze(model: M3Model, args: M3TrainingArguments) -> None:
    """Take the gradient from what is not trained; DistributedDataParallel would wait for it."""
    layers = model.backbone.encoder.layer
    if args.frozen_layers > len(layers):
        raise ValueError(f"frozen_layers is {args.frozen_layers}; the backbone has {len(layers)} layers")
    model.requires_grad_(True)
    model.sparse_linear.requires_grad_("sparse" in args.heads)
    model.colbert_linear.requires_grad_("multi_vector" in args.heads)
    if args.freeze_word_embeddings:
        model.backbone.embeddings.word_embeddings.requires_grad_(False)
    if args.frozen_layers:
        model.backbone.embeddings.requires_grad_(False)
        layers[: args.frozen_layers].requires_grad_(False)


def _publish(unfinished: Path, target: Path) -> None:
    """Flush a complete folder to disk and give it its name."""
    for path in (*unfinished.rglob("*"), unfinished):
        flush(path)
    with suppress(FileNotFoundError):
        shutil.rmtree(target)
    os.rename(unfinished, target)
    flush(target.parent)


class _Tokenize:
    """Texts to packed ids on the CPU, with the model's prefix of one role; goes to worker processes."""

    def __init__(self, model: M3Model, role: Role, max_length: int) -> None:
        self._tokenizer, self._limit, self._prefix = model.tokenization(max_length, role)

    @property
    def measure(self) -> tuple[str, str, int]:
        """What the tokens of a text depend on: tokenizer, prefix and the largest number."""
        return self._tokenizer.digest(), self._prefix, self._limit

    def __call__(self, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        return pack_ids(self._tokenizer.encode(texts, min(max_length, self._limit), self._prefix).ids)


class _Batches(LengthGroupedBatchSampler):
    """The sampler, which also tells the collator the epoch: after a resume transformers reaches nothing else."""

    def __init__(self, collator: TrainingCollator, *arguments: Any, **options: Any) -> None:
        self._collator = collator
        super().__init__(*arguments, **options)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self._collator.set_epoch(epoch)


class _Loader(DataLoader[Any]):
    def set_epoch(self, epoch: int) -> None:
        assert isinstance(self.batch_sampler, _Batches)
        self.batch_sampler.set_epoch(epoch)


class _Window:
    """What happened since the last log; time runs from the first step on, so evaluation does not count."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._tokens = 0
        self._begin: float | None = None

    def begin(self) -> None:
        if self._begin is None:
            self._begin = time.monotonic()

    def add(self, values: dict[str, float], tokens: int) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._tokens += tokens

    def means(self, ranks: int, device: torch.device) -> dict[str, float]:
        """Means over steps and processes, and tokens per second of all processes together."""
        names = [name for name in self._sums if name != "total"]
        numbers = torch.tensor(
            [*(self._sums[name] / self._counts[name] for name in names), self._tokens],
            dtype=torch.float64,
            device=device,
        )
        if ranks > 1:
            dist.all_reduce(numbers)
        *means, tokens = numbers.tolist()
        seconds = time.monotonic() - (self._begin or time.monotonic())
        logs = {name if name == "token_weights" else f"loss_{name}": mean / ranks for name, mean in zip(names, means)}
        return {**logs, "tokens_per_second": tokens / max(seconds, 1e-9)}
