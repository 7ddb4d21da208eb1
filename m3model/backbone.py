"""The packed encoder: XLM-RoBERTa and BERT over rows without padding.

    x = LayerNorm(word[token] + position[index] + type[0])                      [T, E]
    layer:  q, k, v = x Wqkvᵀ + b (one product)                                 [T, 3, H, D]
            x = LayerNorm(x + attention(q, k, v) Woᵀ + b)
            x = LayerNorm(x + gelu(x W1ᵀ + b) W2ᵀ + b)

(Devlin et al. 2019, arXiv 1810.04805; Conneau et al. 2020, arXiv 1911.02116.) Parameters carry Hugging Face's names;
the one exception, the fused query/key/value weight, is split into theirs whenever a state dict leaves the module and
put together when one enters, so a state dict of this module is one of XLMRobertaModel / BertModel without the pooler.

Without gradients, bias, GELU and residual are part of the products (m3kernels.linear). Those kernels read the
parameters as they are and keep no copy, so weights may change at any time, and no layer keeps memory of its own: the
most that is held at a time is x, the 4·E numbers a row of the first FFN product, and the weights of one product in the
kernels' layout.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m3kernels import PackedLinear, embed_tokens, flash_attention_varlen, layer_norm, linear
from m3kernels.packing import sequence_of_row
from m3model.config import M3Config
from m3model.quantization import QuantizedLinear

__all__ = ["PackedEncoder"]

_PROJECTIONS = ("query", "key", "value")
_KINDS = ("weight", "weight_scale", "bias")


class PackedEncoder(nn.Module):
    """Hidden states of packed token ids. The embedding tables have no values before `initialize` or a state dict.

    Attributes:
        gradient_checkpointing: in training, keep only the input of each layer and compute it again in backward.
    """

    def __init__(self, config: M3Config) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embeddings = _Embeddings(config)
        self.encoder = _Layers(config)

    def forward(self, token_ids: Tensor, offsets: Tensor, max_length: int | None = None) -> Tensor:
        """Last hidden states [T, E] of token_ids int32 [T] with offsets int32 [N + 1].

        max_length is an upper bound of the longest sequence; default T.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not _is_frozen(self.embeddings)):
            hidden = self.embeddings(token_ids, offsets)
        return self.layers(hidden, offsets, max_length)

    def train(self, mode: bool = True) -> PackedEncoder:
        """As of all modules, but frozen parts stay in evaluation mode: there dropout would regularise nothing, and
        without it they run on the kernels of inference."""
        super().train(mode)
        for part in (self.embeddings, *self.encoder.layer):
            if _is_frozen(part):
                part.eval()
        return self

    def layers(self, hidden: Tensor, offsets: Tensor, max_length: int | None = None, first: int = 0) -> Tensor:
        """Run the layers from number `first` on over their input [T, E]; 0 starts at the embeddings' output."""
        layers = list(self.encoder.layer)[first:]
        seeds = self._dropout_seeds(len(layers))
        for layer, seed in zip(layers, seeds):
            if _is_frozen(layer) and not hidden.requires_grad:
                with torch.no_grad():
                    hidden = layer(hidden, offsets, max_length, seed)
            elif self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, offsets, max_length, seed, use_reentrant=False)
            else:
                hidden = layer(hidden, offsets, max_length, seed)
        return hidden

    def _dropout_seeds(self, count: int) -> list[int]:
        """A seed of the attention dropout for each layer, drawn on the CPU so that no GPU is waited for."""
        if not self.training or self.config.attention_probs_dropout_prob == 0.0:
            return [0] * count
        seeds: list[int] = torch.randint(2**62, (count,)).tolist()
        return seeds

    def set_dropout(self, probability: float) -> None:
        """Train with this dropout of hidden states and attention in place of the config's."""
        self.config = replace(self.config, hidden_dropout_prob=probability, attention_probs_dropout_prob=probability)
        for module in self.modules():
            if isinstance(module, (_Embeddings, _SelfAttention, _Residual)):
                module.dropout = probability

    def initialize(self) -> None:
        """Random weights as Hugging Face draws them: normal with deviation 0.02, biases 0, LayerNorm 1 and 0."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.bias)


class _Embeddings(nn.Module):
    def __init__(self, config: M3Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.first_position = config.first_position
        self.word_embeddings = _table(config.vocab_size, width)
        self.position_embeddings = _table(config.max_position_embeddings, width)
        self.token_type_embeddings = _table(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, token_ids: Tensor, offsets: Tensor) -> Tensor:
        if _fused(self):
            return embed_tokens(
                token_ids,
                offsets,
                self.word_embeddings.weight,
                self.position_embeddings.weight,
                self.token_type_embeddings.weight[0],
                self.LayerNorm.weight,
                self.LayerNorm.bias,
                first_position=self.first_position,
                eps=self.LayerNorm.eps,
            )
        total = token_ids.shape[0]
        sequence = sequence_of_row(offsets, total)
        index = torch.arange(total, device=offsets.device) - offsets.long()[sequence]
        summed = self.word_embeddings(token_ids) + self.token_type_embeddings.weight[0]
        summed = summed + self.position_embeddings(index + self.first_position)
        return F.dropout(self.LayerNorm(summed), self.dropout, self.training)


def _table(rows: int, width: int) -> nn.Embedding:
    """Without values (`initialize` draws them): nn.Embedding's own, drawn on the meta device, import torch's compiler,
    which makes every start of a program that loads a model a second longer."""
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


class _Layers(nn.Module):
    def __init__(self, config: M3Config) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))


class _Layer(nn.Module):
    def __init__(self, config: M3Config) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.intermediate = _Dense(config.hidden_size, config.intermediate_size)
        self.output = _Residual(config.intermediate_size, config)

    def forward(self, hidden: Tensor, offsets: Tensor, max_length: int | None, seed: int) -> Tensor:
        hidden = self.attention(hidden, offsets, max_length, seed)
        out: Tensor = self.output(self.intermediate(hidden), hidden)
        return out


class _Attention(nn.Module):
    def __init__(self, config: M3Config) -> None:
        super().__init__()
        self.self = _SelfAttention(config)
        self.output = _Residual(config.hidden_size, config)

    def forward(self, hidden: Tensor, offsets: Tensor, max_length: int | None, seed: int) -> Tensor:
        out: Tensor = self.output(self.self(hidden, offsets, max_length, seed), hidden)
        return out


class _SelfAttention(nn.Module):
    """Self-attention whose three projections are one linear layer, `qkv`, in memory and three in state dicts."""

    def __init__(self, config: M3Config) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.qkv: nn.Linear | QuantizedLinear = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.register_state_dict_post_hook(_split_projections)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_join_projections)  # type: ignore[no-untyped-call]

    def forward(self, hidden: Tensor, offsets: Tensor, max_length: int | None, seed: int) -> Tensor:
        rows, width = hidden.shape
        qkv = linear(hidden, _weight(self.qkv), self.qkv.bias) if _fused(self) else self.qkv(hidden)
        q, k, v = qkv.view(rows, 3, self.heads, width // self.heads).unbind(1)
        dropout = self.dropout if self.training else 0.0
        return flash_attention_varlen(q, k, v, offsets, max_length, dropout_p=dropout, seed=seed).reshape(rows, width)


def _split_projections(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    for kind in _KINDS:
        fused = state.pop(f"{prefix}qkv.{kind}", None)
        if fused is not None:
            for name, part in zip(_PROJECTIONS, fused.chunk(3)):
                state[f"{prefix}{name}.{kind}"] = part


def _join_projections(module: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
    for kind in _KINDS:
        names = [f"{prefix}{name}.{kind}" for name in _PROJECTIONS]
        if all(name in state for name in names):
            state[f"{prefix}qkv.{kind}"] = torch.cat([state.pop(name) for name in names])


class _Dense(nn.Module):
    """gelu(linear(x))."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.dense: nn.Linear | QuantizedLinear = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        if _fused(self):
            return linear(x, _weight(self.dense), self.dense.bias, activation="gelu")
        return F.gelu(self.dense(x))


class _Residual(nn.Module):
    """LayerNorm(residual + dropout(linear(x)))."""

    def __init__(self, width: int, config: M3Config) -> None:
        super().__init__()
        self.dense: nn.Linear | QuantizedLinear = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        norm = self.LayerNorm
        if _fused(self):
            summed = linear(x, _weight(self.dense), self.dense.bias, residual=residual)
            return layer_norm(summed, norm.weight, norm.bias, eps=norm.eps)
        out: Tensor = norm(F.dropout(self.dense(x), self.dropout, self.training) + residual)
        return out


def _weight(layer: nn.Linear | QuantizedLinear) -> Tensor | PackedLinear:
    return layer.packed if isinstance(layer, QuantizedLinear) else layer.weight


def _is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


def _fused(module: nn.Module) -> bool:
    """Whether nothing needs the values between the parts of a layer: no gradients, and no dropout."""
    return not module.training and not torch.is_grad_enabled()
