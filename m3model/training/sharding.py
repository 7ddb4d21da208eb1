"""FSDP: weights, gradients and optimizer state cut over the ranks, by torch's fully_shard (arXiv 2304.11277).

Of a parameter [R, ...] rank r of k holds the rows from r·⌈R/k⌉ on. Units that are gathered for their own forward and
backward pass, and let go of again: the embeddings, each layer, and what is left (the heads), which stays until backward
is over. Gradients are averaged over the ranks as by DistributedDataParallel.

A gathered model or state is whole and in plain tensors, on every rank: what is saved does not know of ranks, and a run
may go on with another number of them, or without shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import register_dataclass

from m3model.embeddings import M3Embeddings
from m3model.model import M3Model

__all__ = ["gathered_model", "gathered_state", "is_sharded", "load_sharded", "shard", "sharded_state"]

# fully_shard looks in a forward pass's result for the tensors whose gradients tell that backward has begun.
register_dataclass(M3Embeddings, field_names=["dense", "sparse", "multi_vector"], drop_field_names=[])


def shard(model: M3Model) -> None:
    """Leave this rank its part of the weights of rank 0, in place; every rank calls it."""
    for parameter in model.parameters():
        dist.broadcast(parameter.data, src=0)
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    for unit in (model.backbone.embeddings, *model.backbone.encoder.layer):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def is_sharded(model: object) -> bool:
    return isinstance(model, FSDPModule)


def gathered_model(model: M3Model) -> M3Model:
    """A whole copy on every rank, in evaluation mode; every rank calls it."""
    with torch.device("meta"):
        whole = M3Model(model.config, model.tokenizer)
    state = {name: cast(DTensor, parameter).full_tensor() for name, parameter in model.named_parameters()}
    whole.load_state_dict({name: tensor.detach() for name, tensor in state.items()}, assign=True)
    return whole.eval()


def load_sharded(model: M3Model, whole: M3Model) -> None:
    """Take over the weights of a whole model, of which every rank has a copy."""
    stored = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_like(stored[name].detach().to(model.device), cast(DTensor, parameter)))


def gathered_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state dict in whole tensors on the CPU; every rank calls it."""
    found: dict[str, Any] = optimizer.state_dict()
    return {**found, "state": {number: _gathered(entry) for number, entry in found["state"].items()}}


def sharded_state(optimizer: torch.optim.Optimizer, whole: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict in whole tensors, cut as the parameters of `optimizer` are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {}
    for number, entry in whole["state"].items():
        parameter = parameters[number]
        state[number] = {
            name: _like(value.to(parameter.device), parameter)
            if isinstance(value, Tensor) and not isinstance(value, DTensor) and value.shape == parameter.shape
            else value
            for name, value in entry.items()
        }
    return {**whole, "state": state}


def _gathered(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.full_tensor().cpu() if isinstance(value, DTensor) else value for name, value in entry.items()}


def _like(whole: Tensor, parameter: DTensor) -> DTensor:
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
