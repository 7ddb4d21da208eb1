"""What is compared on a GPU: one dictionary {peer: call} for each case of attention, late interaction and sparse head.

A call runs one forward, or one forward and backward, on tensors that lie on the device already. Peers that are not
installed, or refuse the case, are left out with a note. All peers get the same values; padded peers get them padded
beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import m3kernels

Call = Callable[[], Any]
Notes = dict[str, str]


@dataclass(frozen=True)
class GpuCase:
    """flops: useful floating-point operations of one forward; training counts 3.5 or 3 times as many."""

    op: str
    name: str
    flops: float
    training: bool
    make: Callable[[torch.device, torch.dtype, Notes], dict[str, Call]]


def cases(tiny: bool) -> list[GpuCase]:
    """All cases; `tiny` ones take the interpreter seconds."""
    found = []
    attention_shapes = [(2, 33)] if tiny else [(64, 512), (16, 2048), (4, 8192)]
    for sequences, length in attention_shapes:
        for ragged in (False, True):
            lengths = _lengths(sequences, length, ragged)
            for training in (False, True):
                found.append(_attention(lengths, 1 if tiny else 16, 64, ragged, training))
    late_shapes = (
        [(2, 5, 3, 40, 64)] if tiny else [(1, 32, 1000, 300, 128), (32, 32, 256, 128, 1024), (1, 32, 200, 2048, 1024)]
    )
    for shape in late_shapes:
        for training in (False, True):
            found.append(_late_interaction(*shape, training))
    for texts, length in [(2, 30)] if tiny else [(64, 512), (8, 8192)]:
        for training in (False, True):
            found.append(_sparse_head(texts, length, 64 if tiny else 1024, training))
    return found


def _lengths(sequences: int, length: int, ragged: bool) -> list[int]:
    """Equal lengths, or lengths spread evenly from an eighth of it."""
    if not ragged:
        return [length] * sequences
    return [length * (sequences + 7 * i) // (8 * sequences) + 1 for i in range(sequences)]


def _stepped(function: Callable[..., Tensor], leaves: list[Tensor], training: bool) -> Call:
    if not training:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*leaves)

        return forward

    def step() -> tuple[Tensor, ...]:
        value = function(*leaves)
        return torch.autograd.grad(value, leaves, torch.ones_like(value))

    return step


def _attention(lengths: list[int], heads: int, width: int, ragged: bool, training: bool) -> GpuCase:
    def make(device: torch.device, dtype: torch.dtype, notes: Notes) -> dict[str, Call]:
        total, longest = sum(lengths), max(lengths)
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randn(total, heads, width, generator=generator).to(device, dtype) for _ in range(3)]
        offsets = m3kernels.offsets_from_lengths(torch.tensor(lengths)).to(device)
        padded = [m3kernels.unpack(x, offsets, longest).transpose(1, 2) for x in rows]
        for x in (*rows, *padded):
            x.requires_grad_(training)
        real = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        mask = real[:, None, None, :] if ragged else None
        calls: dict[str, Call] = {
            "m3kernels": _stepped(
                lambda q, k, v: m3kernels.flash_attention_varlen(q, k, v, offsets, longest), rows, training
            ),
            "torch SDPA, padded": _stepped(
                lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask),
                padded,
                training,
            ),
        }
        if device.type != "cuda":
            notes["flex attention, varlen_attn, FlashAttention"] = "need a GPU"
            return calls
        calls["torch flex attention, padded"] = _stepped(_flex(real if ragged else None, longest), padded, training)
        with _noted(notes, "torch varlen_attn"):
            from torch.nn.attention.varlen import varlen_attn

            calls["torch varlen_attn"] = _stepped(
                lambda q, k, v: varlen_attn(q, k, v, offsets, offsets, longest, longest), rows, training
            )
        with _noted(notes, "FlashAttention"):
            from flash_attn import flash_attn_varlen_func

            calls["FlashAttention"] = _stepped(
                lambda q, k, v: flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest), rows, training
            )
        return calls

    kind = "ragged" if ragged else "equal"
    name = f"{len(lengths)} {kind} texts of at most {max(lengths)}, {heads} heads of {width}"
    return GpuCase("attention", name, 4.0 * heads * width * sum(n * n for n in lengths), training, make)


def _flex(real: Tensor | None, length: int) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    blocks = None
    if real is not None:
        blocks = create_block_mask(
            lambda text, head, query, key: real[text, key], real.shape[0], None, length, length, device=real.device
        )
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks)


def _late_interaction(queries: int, rows: int, passages: int, length: int, width: int, training: bool) -> GpuCase:
    def make(device: torch.device, dtype: torch.dtype, notes: Notes) -> dict[str, Call]:
        generator = torch.Generator().manual_seed(1)

        def unit(*shape: int) -> Tensor:
            made = torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)
            return made.to(device, dtype).requires_grad_(training)

        q, p = unit(queries, rows, width), unit(passages, length, width)
        offsets = [
            (torch.arange(count + 1, dtype=torch.int32) * size).to(device)
            for count, size in ((queries, rows), (passages, length))
        ]
        calls: dict[str, Call] = {
            "m3kernels": _stepped(
                lambda q, p: m3kernels.maxsim(q.flatten(0, 1), p.flatten(0, 1), *offsets, reduce="sum"),
                [q, p],
                training,
            ),
            "torch einsum (FlagEmbedding's formula)": _stepped(
                lambda q, p: torch.einsum("aid,bjd->abij", q, p).amax(-1).sum(-1, dtype=torch.float32), [q, p], training
            ),
        }
        if device.type != "cuda":
            notes["flash-maxsim, late-interaction-kernels"] = "need a GPU"
            return calls
        with _noted(notes, "flash-maxsim"):
            import flash_maxsim

            if training:
                calls["flash-maxsim"] = _stepped(flash_maxsim.flash_maxsim_batched_train, [q, p], training)
            else:
                calls["flash-maxsim"] = _stepped(flash_maxsim.flash_maxsim_batched, [q, p], training)
        with _noted(notes, "late-interaction-kernels"):
            from late_interaction_kernels import maxsim

            calls["late-interaction-kernels"] = _stepped(maxsim, [q, p], training)
        return calls

    name = f"{queries} x {rows} rows with {passages} x {length}, width {width}"
    return GpuCase("late interaction", name, 2.0 * queries * rows * passages * length * width, training, make)


def _sparse_head(texts: int, length: int, width: int, training: bool) -> GpuCase:
    def make(device: torch.device, dtype: torch.dtype, notes: Notes) -> dict[str, Call]:
        vocabulary = 250_002 if device.type == "cuda" else 1000
        generator = torch.Generator().manual_seed(2)
        hidden = torch.randn(texts, length, width, generator=generator).to(device, dtype).requires_grad_(training)
        weight = (torch.randn(width, generator=generator) / 32).to(device, dtype).requires_grad_(training)
        bias = torch.zeros(1, device=device, dtype=dtype, requires_grad=training)
        ids = torch.randint(4, vocabulary, (texts, length), generator=generator).to(device)
        flat, offsets = ids.flatten().int(), (torch.arange(texts + 1, dtype=torch.int32) * length).to(device)
        leaves = [hidden, weight, bias]

        def official(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
            """FlagEmbedding 1.4.2 infers by scatter_reduce (and cannot train so); it trains through [B, L, V]."""
            token_weights = torch.relu(h @ w[:, None] + b).squeeze(-1)
            vectors = torch.zeros(texts, vocabulary, device=device, dtype=dtype)
            return vectors.scatter_reduce(dim=-1, index=ids, src=token_weights, reduce="amax")

        return {
            "m3kernels": _stepped(
                lambda h, w, b: m3kernels.sparse_embed(h.flatten(0, 1), w, b, flat, offsets).weights, leaves, training
            ),
            "scatter_reduce (FlagEmbedding's formula)": _stepped(official, leaves, training),
        }

    return GpuCase(
        "sparse head", f"{texts} texts of {length}, width {width}", 2.0 * texts * length * width, training, make
    )


class _noted:
    """Leaves a peer out, with the reason, that is not installed or whose names have changed."""

    def __init__(self, notes: Notes, peer: str) -> None:
        self.notes, self.peer = notes, peer

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> bool:
        if kind is not None and issubclass(kind, (ImportError, AttributeError)):
            self.notes[self.peer] = f"not installed: {error}"
            return True
        return False


def each_peer(case: GpuCase, device: torch.device, dtype: torch.dtype, notes: Notes) -> Iterator[tuple[str, Call]]:
    yield from case.make(device, dtype, notes).items()
