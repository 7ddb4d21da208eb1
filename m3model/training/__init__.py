"""Training of M3 models: the self-knowledge-distillation loss of arXiv 2402.03216, section 3.3."""

from m3model.training.batching import LengthGroupedBatchSampler, TrainingBatch, TrainingCollator
from m3model.training.data import DataSource, TrainingDataError, TrainingDataset, TrainingRow, read_training_rows
from m3model.training.distributed import gather_embeddings
from m3model.training.losses import M3Loss, m3_loss
from m3model.training.split_batch import split_batch_backward

__all__ = [
    "DataSource",
    "LengthGroupedBatchSampler",
    "M3Loss",
    "TrainingBatch",
    "TrainingCollator",
    "TrainingDataError",
    "TrainingDataset",
    "TrainingRow",
    "gather_embeddings",
    "m3_loss",
    "read_training_rows",
    "split_batch_backward",
]
