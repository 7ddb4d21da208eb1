"""Training steps of m3model in a process of its own, one for each line on stdin (benchmarks.report_train asks).

    python -m benchmarks.peers.training FOLDER BATCH.npz [--layers N] [--split TOKENS] [--checkpoints] [--memory GIB]

Answers each line with JSON: seconds of the step, its loss, and the highest resident memory during it, in bytes; the
first line printed gives the resident memory before the first step. The step: forward, loss of all heads, backward,
fused AdamW, which is what transformers' Trainer takes. --memory is a limit of the data segment: what goes beyond fails.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.stepping import answer_steps, limit_memory
from m3model import M3Embeddings, M3Model
from m3model.training import M3Loss, m3_loss, split_batch_backward


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("batch")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--split", type=int)
    parser.add_argument("--checkpoints", action="store_true")
    parser.add_argument("--memory", type=float)
    arguments = parser.parse_args()
    limit_memory(arguments.memory)
    torch.manual_seed(0)
    model = M3Model.from_pretrained(arguments.folder).train()
    if arguments.layers is not None:
        del model.backbone.encoder.layer[arguments.layers :]
    model.set_gradient_checkpointing(arguments.checkpoints)
    batch = {name: torch.from_numpy(array) for name, array in np.load(arguments.batch).items()}
    answer_steps(training_step(model, batch, arguments.split))


def training_step(model: M3Model, batch: dict[str, Tensor], split: int | None) -> Callable[[], float]:
    """A call that takes a step and returns the loss; `split`: tokens of a sub-batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    queries = len(batch["query_offsets"]) - 1
    ids = torch.cat([batch["query_ids"], batch["passage_ids"]])
    offsets = torch.cat([batch["query_offsets"], batch["query_offsets"][-1] + batch["passage_offsets"][1:]])

    def loss_of(embeddings: M3Embeddings[Any]) -> M3Loss:
        own = embeddings.select(slice(0, queries)), embeddings.select(slice(queries, len(embeddings)))
        return m3_loss(*own, official=True)

    def step() -> float:
        if split:
            loss = split_batch_backward(model, ids, offsets, loss_of, sub_batch_tokens=split)
        else:
            loss = loss_of(model(ids, offsets))
            loss.total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.total.item()

    return step


if __name__ == "__main__":
    main()
