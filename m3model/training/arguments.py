"""Arguments of training: transformers.TrainingArguments and what M3 adds, under the names of the formulas (losses.py).

Steps 0 to unified_after_steps train dense, sparse, multi-vector and hybrid without distillation (the warm-up of the
paper, section 3.3), the steps after them with self-distillation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from transformers import TrainingArguments

from m3model.scoring import HEADS

__all__ = ["M3TrainingArguments"]

_TEACHER_LOSSES = ("none", "kl_div", "m3_kd_loss")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class M3TrainingArguments(TrainingArguments):  # type: ignore[misc]
    """Arguments of `M3Trainer`; those of transformers.TrainingArguments keep their meaning.

    Raises:
        ValueError: a value outside its range, or a setting of transformers that this trainer cannot serve.
    """

    temperature: float = field(default=0.02, metadata=_help("Scores are divided by it."))
    heads: list[str] = field(
        default_factory=lambda: list(HEADS), metadata=_help("Heads to train: some of dense sparse multi_vector.")
    )
    hybrid_weights: list[float] = field(
        default_factory=lambda: [1.0, 0.3, 1.0],
        metadata=_help("Weights of dense, sparse and multi-vector in the hybrid."),
    )
    loss_weights: list[float] = field(
        default_factory=lambda: [1.0, 0.1, 1.0], metadata=_help("Weights of the three heads' losses (lambda).")
    )
    self_distill: bool = field(default=True, metadata=_help("Distil the hybrid into each head."))
    unified_after_steps: int = field(default=0, metadata=_help("Steps of the warm-up, without distillation."))
    official: bool = field(
        default=False, metadata=_help("Compute the loss as FlagEmbedding does: padding counts as zero in MaxSim.")
    )
    in_batch_negatives: bool = field(default=True, metadata=_help("Passages of the other queries are negatives."))
    cross_rank_negatives: bool = field(
        default=True, metadata=_help("Passages of the other processes are negatives, for all heads.")
    )
    teacher_loss: str = field(
        default="kl_div", metadata=_help("Use of scores in the data: none, kl_div or m3_kd_loss.")
    )
    group_size: int = field(default=8, metadata=_help("Passages of a query: a positive and group_size - 1 negatives."))
    query_max_length: int = field(default=512, metadata=_help("Tokens at which longer queries are cut."))
    passage_max_length: int = field(default=512, metadata=_help("Tokens at which longer passages are cut."))
    query_instruction: str = field(default="", metadata=_help("Text before every query whose row has no prompt."))
    passage_instruction: str = field(default="", metadata=_help("Text before every passage."))
    shuffle_ratio: float = field(
        default=0.0, metadata=_help("Probability that the thirds of a long positive change places.")
    )
    length_buckets: dict[str, int] | str | None = field(
        default=None,
        metadata=_help('Largest batch for rows of up to so many tokens, as JSON: {"500": 48, "2000": 20}.'),
    )
    token_lengths: str | None = field(
        default=None,
        metadata=_help(
            "Folder that keeps the rows' token lengths, also for other runs; default OUTPUT_DIR/token_lengths."
        ),
    )
    sub_batch_tokens: int | None = field(
        default=None,
        metadata=_help(
            "Split batch: tokens whose activations are held at a time; the batch is limited by its embeddings."
        ),
    )
    head_learning_rate: float | None = field(
        default=None, metadata=_help("Learning rate of the sparse and the multi-vector head.")
    )
    freeze_word_embeddings: bool = field(default=False, metadata=_help("Leave the word embeddings as they are."))
    frozen_layers: int = field(
        default=0, metadata=_help("Leave all embeddings and so many first layers as they are; they need no backward.")
    )
    dropout: float | None = field(
        default=None, metadata=_help("Dropout of hidden states and attention; default what the model's config says.")
    )
    dead_sparse_steps: int = field(
        default=20, metadata=_help("Warn when so many steps in a row have no token weight above zero.")
    )
    learning_rate: float = field(
        default=1e-5, metadata=_help("Learning rate of the backbone, and of the heads without one of their own.")
    )
    warmup_steps: float = field(
        default=0.1, metadata=_help("Steps over which the learning rate grows; below 1: part of all steps.")
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata=_help("Further arguments of the scheduler, as JSON.")
    )
    logging_steps: float = field(
        default=10, metadata=_help("Steps from log to log; evaluations and checkpoints log too.")
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata=_help("Not used: a loss that is not finite stops the training.")
    )
    save_total_limit: int | None = field(
        default=2, metadata=_help("Checkpoints kept, the best one and the last one always.")
    )
    remove_unused_columns: bool = field(default=False, metadata=_help("Not used: rows come from M3's own data sets."))
    metric_for_best_model: str | None = field(
        default=None, metadata=_help("Such as ndcg@10_hybrid, which is the default where a best one is asked for.")
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata=_help("Every parameter takes part in every step.")
    )

    fsdp: bool = field(
        default=False, metadata=_help("Cut weights, gradients and optimizer state over the processes (FSDP2).")
    )
    fsdp_config: dict[str, Any] | None = field(
        default=None, metadata=_help("Not used: the embeddings and each layer are units.")
    )

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "length_buckets"]

    def __post_init__(self) -> None:
        if self.deepspeed and self.fsdp:
            raise ValueError(f"deepspeed is {self.deepspeed!r} and fsdp is set; accepted: one of them")
        if self.deepspeed and find_spec("deepspeed") is None:
            raise ValueError("deepspeed is set and not installed; accepted: with pip install m3kernels[deepspeed]")
        by_quality = self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        best_is_asked_for = self.load_best_model_at_end or self.save_strategy == "best" or by_quality
        if best_is_asked_for and self.metric_for_best_model is None:
            self.metric_for_best_model = f"ndcg@10_{'hybrid' if len(self.heads) > 1 else ''.join(self.heads)}"
        super().__post_init__()
        if isinstance(self.lr_scheduler_kwargs, str):
            raise ValueError(f"lr_scheduler_kwargs is {self.lr_scheduler_kwargs!r}; accepted: a JSON object")
        if by_quality:
            self.lr_scheduler_kwargs = {"mode": "max", **(self.lr_scheduler_kwargs or {})}
        if self.deepspeed and self.hf_deepspeed_config.is_zero3():
            raise ValueError(
                "deepspeed asks for ZeRO stage 3; accepted: stages 0 to 2, or fsdp, which cuts the weights as it does"
            )
        if isinstance(self.length_buckets, str):
            raise ValueError(f'length_buckets is {self.length_buckets!r}; accepted: JSON such as {{"500": 48}}')
        unknown = [head for head in self.heads if head not in HEADS]
        if unknown or not self.heads or len(set(self.heads)) < len(self.heads):
            raise ValueError(f"heads are {self.heads}; accepted: some of {', '.join(HEADS)}, at least one")
        self.heads = [head for head in HEADS if head in self.heads]
        measured = [f"ndcg@10_{name}" for name in (*self.heads, *(["hybrid"] if len(self.heads) > 1 else []))]
        metric = self.metric_for_best_model
        if metric is not None and metric.removeprefix("eval_") not in measured:
            raise ValueError(f"metric_for_best_model is {metric!r}; accepted: {', '.join(measured)}")
        self.buckets()
        lengths = ("query_max_length", "passage_max_length", "sub_batch_tokens", "dead_sparse_steps")
        sizes = ("group_size", "per_device_train_batch_size", "gradient_accumulation_steps")
        for name in (*lengths, *sizes):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; accepted: at least 1")
        if self.max_steps == 0:
            raise ValueError("max_steps is 0; accepted: at least 1, or -1 for num_train_epochs")
        for name in ("unified_after_steps", "frozen_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: at least 0")
        if self.temperature <= 0 or not math.isfinite(self.temperature):
            raise ValueError(f"temperature is {self.temperature}; accepted: finite numbers above 0")
        for name in ("hybrid_weights", "loss_weights"):
            values = getattr(self, name)
            if len(values) != len(HEADS) or not all(math.isfinite(value) and value >= 0 for value in values):
                raise ValueError(f"{name} are {values}; accepted: three finite numbers of at least 0")
        if self.teacher_loss not in _TEACHER_LOSSES:
            raise ValueError(f"teacher_loss is {self.teacher_loss!r}; accepted: {', '.join(_TEACHER_LOSSES)}")
        if self.head_learning_rate is not None and not self.head_learning_rate > 0:
            raise ValueError(f"head_learning_rate is {self.head_learning_rate}; accepted: above 0")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; accepted: at least 0 and below 1")
        if not self.in_batch_negatives and self.group_size < 2:
            raise ValueError("group_size is 1 without in_batch_negatives; nothing would be a negative")
        self._refuse_what_cannot_be_served()

    def buckets(self) -> dict[int, int] | None:
        """length_buckets with numbers as keys.

        Raises:
            ValueError: a key or a value is no whole number above 0, or there is none.
        """
        if self.length_buckets is None:
            return None
        accepted = f'length_buckets is {self.length_buckets}; accepted: whole numbers above 0, such as {{"500": 48}}'
        assert isinstance(self.length_buckets, Mapping)
        try:
            found = {int(str(length)): int(str(size)) for length, size in self.length_buckets.items()}
        except ValueError as error:
            raise ValueError(accepted) from error
        if min([*found, *found.values()], default=0) < 1:
            raise ValueError(accepted)
        return found

    def lengths_folder(self) -> Path:
        """Where token lengths are kept."""
        return Path(self.output_dir, "token_lengths") if self.token_lengths is None else Path(self.token_lengths)

    def _process_fsdp_args(self) -> None:
        """Keep `fsdp` from accelerate: the trainer itself cuts the weights over the processes, also on CPUs."""
        if not isinstance(self.fsdp, bool) or self.fsdp_config:
            raise ValueError(
                f"fsdp is {self.fsdp!r}, fsdp_config {self.fsdp_config}; accepted: fsdp true or false and no"
                " fsdp_config: the embeddings and each layer are units"
            )
        self.fsdp_config = {}

    def _refuse_what_cannot_be_served(self) -> None:
        for name in ("label_smoothing_factor", "neftune_noise_alpha", "use_liger_kernel"):
            if getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}; the M3 loss has no such thing")
        if self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy is {self.train_sampling_strategy!r}; accepted: random, of batches that are"
                " always grouped by length"
            )
        if self.torch_empty_cache_steps is not None:
            raise ValueError(f"torch_empty_cache_steps is {self.torch_empty_cache_steps}; accepted: None")
        if self.n_gpu > 1:
            raise ValueError(f"one process sees {self.n_gpu} GPUs; start one process a GPU with torchrun")
