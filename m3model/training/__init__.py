"""Training of M3 models: the self-knowledge-distillation loss of arXiv 2402.03216, section 3.3, data and trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from m3model.training.batching import LengthGroupedBatchSampler, TrainingBatch, TrainingCollator
from m3model.training.data import DataSource, TrainingDataError, TrainingDataset, TrainingRow, read_training_rows
from m3model.training.distributed import gather_embeddings
from m3model.training.losses import M3Loss, m3_loss
from m3model.training.split_batch import split_batch_backward

if TYPE_CHECKING:
    from m3model.training.arguments import M3TrainingArguments
    from m3model.training.dev_set import DevSet
    from m3model.training.trainer import M3Trainer, TrainingDivergedError, last_checkpoint

__all__ = [
    "DataSource",
    "DevSet",
    "LengthGroupedBatchSampler",
    "M3Loss",
    "M3Trainer",
    "M3TrainingArguments",
    "TrainingBatch",
    "TrainingCollator",
    "TrainingDataError",
    "TrainingDataset",
    "TrainingDivergedError",
    "TrainingRow",
    "gather_embeddings",
    "last_checkpoint",
    "m3_loss",
    "read_training_rows",
    "split_batch_backward",
]

# These import transformers' Trainer, which takes seconds that the other names need not wait for.
_LATE = {
    "DevSet": "dev_set",
    "M3Trainer": "trainer",
    "M3TrainingArguments": "arguments",
    "TrainingDivergedError": "trainer",
    "last_checkpoint": "trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
