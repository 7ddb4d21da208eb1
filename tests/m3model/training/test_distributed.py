"""k processes with batch B (gloo) compute the loss and the gradients of one process with batch k·B."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.nn.parallel import DistributedDataParallel

from m3model import M3Embeddings, M3Model
from m3model.training import gather_embeddings, m3_loss, split_batch_backward
from m3model.training.losses import M3Loss

GROUP = 2
TOLERANCE = 1e-5
QUERIES = ["the river", "a b c", "how do i sort", "matrix", "x y", "north of the city", "open file", "list"]
PASSAGES = [f"{'the bridge of ' * (number % 5)}{query}" for number, query in enumerate(QUERIES * GROUP)]


def load(folder: Path) -> M3Model:
    """In float64, so that what is left of a difference is an error; in evaluation, so without dropout."""
    return M3Model.from_pretrained(folder, dtype=torch.float64).eval()


def texts_of(first: int, last: int) -> list[str]:
    """Queries `first` to `last` and their passages: one forward pass, as DistributedDataParallel wants it."""
    return [*QUERIES[first:last], *PASSAGES[GROUP * first : GROUP * last]]


def loss_on_a_rank(embeddings: M3Embeddings[Any], queries: int, rank: int) -> M3Loss:
    own = embeddings.select(slice(0, queries)), embeddings.select(slice(queries, len(embeddings)))
    return m3_loss(own[0], gather_embeddings(own[1]), group_size=GROUP, first_passage=GROUP * queries * rank)


def leave() -> NoReturn:
    """End this rank when all are done: gloo's threads can hang the release of a group that another rank has left."""
    dist.barrier()
    os._exit(0)


def train_on_a_rank(rank: int, ranks: int, folder: Path, workplace: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{workplace / 'meeting'}", rank=rank, world_size=ranks)
    model = load(folder)
    encoder = DistributedDataParallel(model)
    own = len(QUERIES) // ranks
    ids, offsets = model.tokenize(texts_of(own * rank, own * (rank + 1)))
    results = {}
    for way in ("whole", "split"):
        model.zero_grad()
        if way == "whole":
            loss = loss_on_a_rank(encoder(ids, offsets), own, rank)
            loss.total.backward()
        else:
            # Other numbers of sub-batches on each rank.
            loss = split_batch_backward(
                encoder, ids, offsets, lambda out: loss_on_a_rank(out, own, rank), sub_batch_tokens=20 + 30 * rank
            )
        mean = loss.total.detach() / ranks
        dist.all_reduce(mean)
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        results[way] = {"loss": mean, "gradients": gradients}
    if rank == 0:
        torch.save(results, workplace / "results.pt")
    leave()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_one_process(ranks: int, folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    loss = loss_on_a_rank(model(*model.tokenize(texts_of(0, len(QUERIES)))), len(QUERIES), 0)
    loss.total.backward()
    processes.spawn(train_on_a_rank, (ranks, folder, tmp_path), nprocs=ranks)
    largest = max(float(parameter.grad.abs().max()) for parameter in model.parameters())
    for way, result in torch.load(tmp_path / "results.pt").items():
        torch.testing.assert_close(result["loss"], loss.total.detach(), rtol=TOLERANCE, atol=0, msg=way)
        for name, parameter in model.named_parameters():
            error = float((result["gradients"][name] - parameter.grad).abs().max())
            assert error <= TOLERANCE * largest, (way, name, error, largest)


def gather_unequal_parts(rank: int, ranks: int, folder: Path, workplace: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{workplace / 'meeting'}", rank=rank, world_size=ranks)
    model = load(folder)
    bounds = [0, 3, 4]
    with torch.no_grad():
        out = model(*model.tokenize(QUERIES[bounds[rank] : bounds[rank + 1]]))
        everyone = gather_embeddings(out)
        wanted = model(*model.tokenize(QUERIES[: bounds[-1]]))
    torch.testing.assert_close(everyone.dense, wanted.dense)
    assert everyone.sparse.offsets.equal(wanted.sparse.offsets)
    assert everyone.sparse.token_ids.equal(wanted.sparse.compact().token_ids)
    torch.testing.assert_close(everyone.sparse.weights, wanted.sparse.compact().weights)
    assert everyone.multi_vector.offsets.equal(wanted.multi_vector.offsets)
    torch.testing.assert_close(everyone.multi_vector.rows, wanted.multi_vector.rows)
    with pytest.raises(ValueError, match="heads"):
        gather_embeddings(M3Embeddings(out.dense, None if rank else out.sparse))
    leave()


def test_ranks_with_unequal_numbers_of_texts(folder: Path, tmp_path: Path) -> None:
    processes.spawn(gather_unequal_parts, (2, folder, tmp_path), nprocs=2)


def test_one_process_keeps_its_embeddings() -> None:
    alone = M3Embeddings(torch.ones(2, 3))
    assert gather_embeddings(alone) is alone
    with pytest.raises(TypeError, match="M3Embeddings"):
        gather_embeddings(torch.ones(2, 3))
