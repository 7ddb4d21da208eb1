"""k processes with batch B (gloo) compute the loss and the gradients of one process with batch k·B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.nn.parallel import DistributedDataParallel

from m3model import M3Embeddings, M3Model
from m3model.training import gather_embeddings, m3_loss

GROUP = 2
TOLERANCE = 1e-5
QUERIES = ["the river", "a b c", "how do i sort", "matrix", "x y", "north of the city", "open file", "list"]
PASSAGES = [f"{'the bridge of ' * (number % 5)}{query}" for number, query in enumerate(QUERIES * GROUP)]


def load(folder: Path) -> M3Model:
    """In float64, so that what is left of a difference is an error; in evaluation, so without dropout."""
    return M3Model.from_pretrained(folder, dtype=torch.float64).eval()


def rank_embeddings(encoder: Any, model: M3Model, first: int, last: int) -> tuple[M3Embeddings[Any], M3Embeddings[Any]]:
    """Queries `first` to `last` and their passages in one forward pass, as DistributedDataParallel wants it."""
    texts = [*QUERIES[first:last], *PASSAGES[GROUP * first : GROUP * last]]
    out = encoder(*model.tokenize(texts))
    return out.select(slice(0, last - first)), out.select(slice(last - first, len(texts)))


def train_on_a_rank(rank: int, ranks: int, folder: Path, workplace: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{workplace / 'meeting'}", rank=rank, world_size=ranks)
    model = load(folder)
    encoder = DistributedDataParallel(model)
    own = len(QUERIES) // ranks
    queries, passages = rank_embeddings(encoder, model, own * rank, own * (rank + 1))
    everyone = gather_embeddings(passages)
    loss = m3_loss(queries, everyone, group_size=GROUP, first_passage=GROUP * own * rank)
    loss.total.backward()
    mean = loss.total.detach() / ranks
    dist.all_reduce(mean)
    if rank == 0:
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.save({"loss": mean, "gradients": gradients}, workplace / "result.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_one_process(ranks: int, folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    loss = m3_loss(*rank_embeddings(model, model, 0, len(QUERIES)))
    loss.total.backward()
    processes.spawn(train_on_a_rank, (ranks, folder, tmp_path), nprocs=ranks)
    result = torch.load(tmp_path / "result.pt")
    torch.testing.assert_close(result["loss"], loss.total.detach(), rtol=TOLERANCE, atol=0)
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert result["gradients"][name] is None, name
            continue
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(result["gradients"][name], parameter.grad, rtol=0, atol=TOLERANCE * max(scale, 1e-6))
        compared += scale > 0
    assert compared > 20


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
    dist.destroy_process_group()


def test_ranks_with_unequal_numbers_of_texts(folder: Path, tmp_path: Path) -> None:
    processes.spawn(gather_unequal_parts, (2, folder, tmp_path), nprocs=2)


def test_one_process_keeps_its_embeddings() -> None:
    alone = M3Embeddings(torch.ones(2, 3))
    assert gather_embeddings(alone) is alone
    with pytest.raises(TypeError, match="M3Embeddings"):
        gather_embeddings(torch.ones(2, 3))
