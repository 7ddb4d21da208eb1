"""Linear layers of the encoder with int8 or bfloat16 weights: `QuantizedLinear`, put in place by `quantize_layers`.

    int8   a quarter of the memory; one scale for each output, activations in 8 bits (m3kernels.linear)
    bf16   half of the memory; activations as they are, sums in float32

In a state dict an int8 weight is its codes, int8 [N, K, 1], and `weight_scale`, float32 [N]; the third axis makes
programs that expect [N, K] refuse the file instead of taking codes for weights. A bfloat16 weight is [N, K], which all
can read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from m3kernels import PackedLinear, linear, pack_linear
from m3kernels.linear.packed import pack_codes

__all__ = ["Quantization", "QuantizedLinear", "check_quantization", "quantize_layers", "stored_as_they_are"]

Quantization = Literal["int8", "bf16"]
_STORAGE = {"int8": torch.int8, "bf16": torch.bfloat16}


def check_quantization(name: str, value: object) -> None:
    """Raise ValueError, naming the argument, unless `value` is one of Quantization."""
    if value not in get_args(Quantization):
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(get_args(Quantization))}")


def quantize_layers(module: nn.Module, quantization: Quantization) -> None:
    """Replace every nn.Linear within `module`, one after another, so that only one is held twice."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, QuantizedLinear(child, quantization))


def stored_as_they_are(state: dict[str, Tensor]) -> set[str]:
    """Names in the state dict of a float32 model whose dtype is not the model's: codes, scales, bfloat16 weights."""
    return {name for name, tensor in state.items() if tensor.dtype != torch.float32 or name.endswith(".weight_scale")}


class QuantizedLinear(nn.Module):
    """x weightᵀ + bias with a constant weight; gradients flow to x only."""

    panels: Tensor
    scales: Tensor | None

    def __init__(self, layer: nn.Linear, quantization: Quantization) -> None:
        super().__init__()
        self.storage = _STORAGE[quantization]
        self.register_buffer("panels", None, persistent=False)
        self.register_buffer("scales", None, persistent=False)
        self._keep(pack_linear(layer.weight, self.storage), layer.bias.detach())

    @property
    def packed(self) -> PackedLinear:
        return PackedLinear(self.panels, self.scales, self.columns, self.depth)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.packed, self.bias)

    def _keep(self, packed: PackedLinear, bias: Tensor) -> None:
        self.panels, self.scales, self.columns, self.depth = packed
        self.bias = nn.Parameter(bias, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Move everything, convert the bias alone: the weights keep the type that they are stored in."""

        def moved(stored: Tensor) -> Tensor:
            changed = fn(stored)
            return changed if changed.dtype == stored.dtype else stored.to(changed.device)

        self.panels = moved(self.panels)
        self.scales = None if self.scales is None else moved(self.scales)
        self.bias = nn.Parameter(fn(self.bias.detach()), requires_grad=False)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.scales is None:
            destination[f"{prefix}weight"] = self.packed.unpack()
        else:
            destination[f"{prefix}weight"] = self.packed.codes()[:, :, None]
            destination[f"{prefix}weight_scale"] = self.scales
        destination[f"{prefix}bias"] = self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own: dict[str, Tensor] = {}
        self._save_to_state_dict(own, prefix, False)
        missing = [name for name in own if name not in state_dict]
        missing_keys.extend(missing)
        given = {name: state_dict[name] for name in own if name in state_dict}
        wrong = [
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {own[name].dtype} {tuple(own[name].shape)}"
            for name, tensor in given.items()
            if tensor.shape != own[name].shape or (name != f"{prefix}bias" and tensor.dtype != own[name].dtype)
        ]
        error_msgs.extend(wrong)
        if missing or wrong:
            return
        weight, bias = given[f"{prefix}weight"], given[f"{prefix}bias"]
        device = weight.device if self.panels.is_meta else self.panels.device
        if self.scales is None:
            packed = pack_linear(weight.to(device))
        else:
            packed = pack_codes(weight[:, :, 0].to(device), given[f"{prefix}weight_scale"].to(device, copy=True))
        dtype = bias.dtype if self.panels.is_meta else self.bias.dtype
        self._keep(packed, bias.detach().to(device, dtype, copy=True))
