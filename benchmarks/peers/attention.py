"""Ways to compute attention over a ragged batch on a CPU: ours, and what PyTorch ships.

    sdpa padded   scaled_dot_product_attention over [N, H, longest, D] with a boolean mask of the real keys
    sdpa loop     scaled_dot_product_attention once for each sequence, the results concatenated
    sdpa          without a mask, where all sequences are equally long
    nested        scaled_dot_product_attention over jagged nested tensors

and ours with its options, at one batch.

Each peer gets its inputs in the layout that its model would hold them in: heads beside each other in a row (a view of
[T, H·D] or [N, L, H·D]), padded beforehand where it needs padding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_cases import Case
from m3kernels import flash_attention_varlen

Attend = Callable[[list[Tensor]], Tensor]


def _offsets(case: Case) -> Tensor:
    return torch.tensor([0, *case.lengths]).cumsum(0).int().to(case.device)


def _by_head(x: Tensor) -> Tensor:
    """[..., L, H, D] as [..., H, L, D]."""
    return x.transpose(-2, -3)


def _packed(case: Case, rows: list[Tensor]) -> list[Tensor]:
    return rows


def _padded(case: Case, rows: list[Tensor]) -> list[Tensor]:
    return [torch.nn.utils.rnn.pad_sequence(list(x.split(list(case.lengths))), batch_first=True) for x in rows]


def _ours(**options: float) -> Callable[[Case], Attend]:
    def prepare(case: Case) -> Attend:
        offsets, longest = _offsets(case), max(case.lengths)
        return lambda leaves: flash_attention_varlen(*leaves, offsets, longest, **options)

    return prepare


def _sdpa_padded(case: Case) -> Attend:
    real = torch.arange(max(case.lengths)) < torch.tensor(case.lengths)[:, None]
    mask = real[:, None, None, :].to(case.device)
    return lambda leaves: _by_head(scaled_dot_product_attention(*map(_by_head, leaves), attn_mask=mask))


def _sdpa(case: Case) -> Attend:
    return lambda leaves: _by_head(scaled_dot_product_attention(*map(_by_head, leaves)))


def _sdpa_loop(case: Case) -> Attend:
    lengths = list(case.lengths)

    def attend(leaves: list[Tensor]) -> Tensor:
        texts = zip(*(x.split(lengths) for x in leaves))
        return torch.cat(
            [_by_head(scaled_dot_product_attention(*(_by_head(x)[None] for x in qkv)))[0] for qkv in texts]
        )

    return attend


def _nested(case: Case) -> Attend:
    offsets = _offsets(case).long()
    shortest, longest = min(case.lengths), max(case.lengths)

    def attend(leaves: list[Tensor]) -> Tensor:
        jagged = (
            torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=shortest, max_seqlen=longest) for x in leaves
        )
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in jagged)).transpose(1, 2).values()

    return attend


OURS = "m3kernels"
PEERS: dict[str, tuple[Callable[[Case, list[Tensor]], list[Tensor]], Callable[[Case], Attend]]] = {
    OURS: (_packed, _ours()),
    "sdpa padded": (_padded, _sdpa_padded),
    "sdpa loop": (_packed, _sdpa_loop),
    "sdpa": (_padded, _sdpa),
    "nested": (_packed, _nested),
    "m3kernels, dropout 0.1": (_packed, _ours(dropout_p=0.1)),
    "m3kernels, sampled 0.5": (_packed, _ours(keep_probability=0.5)),
}
OPTIONS_AT = "8 x 2048"
"""The batch at which the cost of our options is measured."""


def peers_of(case: Case) -> list[str]:
    """`sdpa` without a mask attends to padding, so it serves equal lengths only."""
    left_out = {peer for peer in PEERS if peer.startswith(f"{OURS},") and case.batch != OPTIONS_AT}
    if len(set(case.lengths)) > 1:
        left_out.add("sdpa")
    return [peer for peer in PEERS if peer not in left_out]


def call_of(peer: str, case: Case) -> Callable[[], object]:
    """One forward, or forward and backward, of `peer`; returns what it computed."""
    lay_out, prepare = PEERS[peer]
    *leaves, grad = lay_out(case, case.rows())
    attend = prepare(case)
    if not case.training:

        def forward() -> Tensor:
            with torch.no_grad():
                return attend(leaves)

        return forward
    for leaf in leaves:
        leaf.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        out = attend(leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    return step
