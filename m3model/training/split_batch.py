"""Gradients of a large batch from small ones: activations of one sub-batch at a time, embeddings of all.

    1  embeddings E_i of sub-batch i without graph, its random state kept                  (first forward pass)
    2  loss(E_1 … E_k), and the gradients G_i of the loss with respect to the embeddings
    3  E_i again with graph from the kept random state, so with the same dropout; backward with G_i  (second pass)

What is added to the parameters' gradients equals that of the whole batch, since the loss depends on the parameters
through the embeddings only (GradCache, arXiv 2101.06983). It costs one more forward pass; the batch is then limited by
its embeddings, and with gradient checkpointing a sub-batch by the inputs of its layers. An engine that takes backward
passes of a loss only (DeepSpeed's) is given Σ E_i · G_i with G_i constant, whose gradients are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from m3kernels import SparseBatch
from m3model.embeddings import M3Embeddings, MultiVectors
from m3model.training.losses import M3Loss
from m3model.training.sharding import is_sharded

__all__ = ["split_batch_backward", "sub_batches"]

Encoder = Callable[..., M3Embeddings[Any]]


def split_batch_backward(
    encoder: Encoder,
    token_ids: Tensor,
    offsets: Tensor,
    loss_of: Callable[[M3Embeddings[Any]], M3Loss],
    *,
    sub_batch_tokens: int,
    scale: float = 1.0,
    options: Mapping[str, Any] | None = None,
    backward: Callable[[Tensor, bool], None] | None = None,
) -> M3Loss:
    """Add the gradients of `scale` · loss_of(embeddings of all texts).total to the parameters of `encoder`.

    Args:
        encoder: a model, or one in DistributedDataParallel, whose ranks then average once, in the last sub-batch, and
            may have different numbers of sub-batches; or a sharded one, whose ranks have equal numbers of texts and
            average after each sub-batch.
        token_ids: int32 [T]; offsets: int32 [N + 1], of at least one text.
        loss_of: from the embeddings of the N texts to their loss; it may gather those of other ranks.
        sub_batch_tokens: rows of a sub-batch; a longer text makes one of its own.
        scale: 1 / number of accumulated steps, or a gradient scaler's.
        options: further arguments by name of every call of `encoder`, such as which heads to compute.
        backward: an engine's backward pass; gets a loss of each sub-batch, and whether it is the last one.

    Returns:
        The loss, detached and without `scale`.

    Raises:
        ValueError: there is no text, or sub_batch_tokens is below 1.
        RuntimeError: the second pass gives other token weights than the first: the encoder is not deterministic.
    """
    bounds = sub_batches(offsets, sub_batch_tokens)
    if is_sharded(encoder):
        # Every pass gathers weights from all ranks, so all ranks make as many passes.
        most = torch.tensor(len(bounds), device=token_ids.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        bounds = _more_parts(bounds, int(most))
    begins = offsets.tolist()
    keywords = dict(options or {})

    def encode(first: int, last: int) -> M3Embeddings[Any]:
        rows = token_ids[begins[first] : begins[last]]
        return _compact(encoder(rows, offsets[first : last + 1] - begins[first], **keywords))

    states, parts = [], []
    with torch.no_grad():
        for first, last in bounds:
            states.append(_RandomState.now(token_ids.device))
            parts.append(encode(first, last))
    whole = M3Embeddings.concatenate(parts)
    leaves = [tensor.detach().requires_grad_() for tensor in _tensors(whole)]
    loss = loss_of(_with_tensors(whole, leaves))
    gradients = torch.autograd.grad(scale * loss.total, leaves)
    taken = [0] * len(gradients)
    after = _RandomState.now(token_ids.device)
    for number, ((first, last), state, before) in enumerate(zip(bounds, states, parts)):
        alone = isinstance(encoder, DistributedDataParallel) and number < len(bounds) - 1
        with encoder.no_sync() if alone else nullcontext():  # type: ignore[attr-defined]
            state.restore()
            again = encode(first, last)
            _check_same(before, again)
            outputs = _tensors(again)
            shares = []
            for place, output in enumerate(outputs):
                shares.append(gradients[place][taken[place] : taken[place] + output.shape[0]])
                taken[place] += output.shape[0]
            if backward is None:
                torch.autograd.backward(outputs, shares)
            else:
                products = [(output * share).sum() for output, share in zip(outputs, shares)]
                backward(torch.stack(products).sum(), number == len(bounds) - 1)
    after.restore()
    rest = [None if part is None else part.detach() for part in loss[1:]]
    return M3Loss(loss.total.detach(), *rest)


def sub_batches(offsets: Tensor, tokens: int) -> list[tuple[int, int]]:
    """(first, last) text of consecutive sub-batches of at most `tokens` rows, or of one longer text.

    Raises:
        ValueError: there is no text, or tokens is below 1.
    """
    if tokens < 1:
        raise ValueError(f"sub_batch_tokens is {tokens}; accepted: at least 1")
    begins = offsets.tolist()
    if len(begins) < 2:
        raise ValueError(f"offsets have {len(begins)} entries; accepted: at least 2, for one text")
    bounds, first = [], 0
    for last in range(1, len(begins)):
        if last == len(begins) - 1 or begins[last + 1] - begins[first] > tokens:
            bounds.append((first, last))
            first = last
    return bounds


def _more_parts(bounds: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """The same texts in `count` sub-batches: those of most texts are halved.

    Raises:
        ValueError: there are fewer texts than that.
    """
    bounds = list(bounds)
    if bounds[-1][1] < count:
        raise ValueError(
            f"a rank has {bounds[-1][1]} texts, another {count} sub-batches; accepted: equal numbers of texts"
        )
    while len(bounds) < count:
        place = max(range(len(bounds)), key=lambda number: bounds[number][1] - bounds[number][0])
        first, last = bounds[place]
        bounds[place : place + 1] = [(first, (first + last) // 2), ((first + last) // 2, last)]
    return bounds


class _RandomState(NamedTuple):
    """The generators that dropout draws from: the CPU's and the device's."""

    cpu: Tensor
    device: torch.device
    cuda: Tensor | None

    @staticmethod
    def now(device: torch.device) -> _RandomState:
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return _RandomState(torch.get_rng_state(), device, cuda)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def _compact(embeddings: M3Embeddings[Any]) -> M3Embeddings[Any]:
    sparse = embeddings.sparse
    return M3Embeddings(embeddings.dense, None if sparse is None else sparse.compact(), embeddings.multi_vector)


def _tensors(embeddings: M3Embeddings[Any]) -> list[Tensor]:
    """The tensors with gradients, in a fixed order."""
    sparse, multi_vector = embeddings.sparse, embeddings.multi_vector
    parts = (embeddings.dense, sparse and sparse.weights, multi_vector and multi_vector.rows)
    return [part for part in parts if part is not None]


def _with_tensors(embeddings: M3Embeddings[Any], tensors: list[Tensor]) -> M3Embeddings[Any]:
    """The same embeddings with these in place of `_tensors`."""
    left = iter(tensors)
    sparse, multi_vector = embeddings.sparse, embeddings.multi_vector
    return M3Embeddings(
        None if embeddings.dense is None else next(left),
        None if sparse is None else SparseBatch(sparse.token_ids, next(left), sparse.offsets),
        None if multi_vector is None else MultiVectors(next(left), multi_vector.offsets),
    )


def _check_same(first: M3Embeddings[Any], second: M3Embeddings[Any]) -> None:
    if first.sparse is None or second.sparse is None:
        return
    if not torch.equal(first.sparse.token_ids, second.sparse.token_ids):
        raise RuntimeError("the second pass gives other token weights than the first: the encoder is not deterministic")
