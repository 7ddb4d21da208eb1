"""Bad arguments of the ops get an error that names the argument, what was given and what is accepted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import m3kernels as m3

OFFSETS = torch.tensor([0, 2, 5], dtype=torch.int32)
IDS = torch.arange(5, dtype=torch.int32)
Q = torch.zeros(5, 2, 32)
ROWS = torch.zeros(5, 16)
WEIGHTS = torch.ones(5)
PAIRS = torch.tensor([[0, 1]], dtype=torch.int32)


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD: list[tuple[str, type[Exception], str, Callable[[], object]]] = [
    ("list", TypeError, "q must be a tensor, got list", lambda: m3.flash_attention_varlen([1], Q, Q, OFFSETS)),  # type: ignore[arg-type]
    ("int dtype", TypeError, r"q has dtype torch\.int64", lambda: m3.flash_attention_varlen(Q.long(), Q, Q, OFFSETS)),
    (
        "dtype mix",
        TypeError,
        r"k has dtype torch\.bfloat16",
        lambda: m3.flash_attention_varlen(Q, Q.bfloat16(), Q, OFFSETS),
    ),
    ("shape mix", ValueError, r"v has shape \(4, 2, 32\)", lambda: m3.flash_attention_varlen(Q, Q, Q[:4], OFFSETS)),
    ("dims", ValueError, "q must have 3 dimensions", lambda: m3.flash_attention_varlen(ROWS, Q, Q, OFFSETS)),
    ("device mix", ValueError, "k is on meta", lambda: m3.flash_attention_varlen(Q, Q.to("meta"), Q, OFFSETS)),
    (
        "head width",
        ValueError,
        "head width 257",
        lambda: m3.flash_attention_varlen(*[torch.zeros(5, 1, 257)] * 3, OFFSETS),
    ),
    (
        "decreasing",
        ValueError,
        "offsets decreases from 5 to 2",
        lambda: m3.flash_attention_varlen(Q, Q, Q, offsets(0, 5, 2)),
    ),
    (
        "short",
        ValueError,
        "offsets ends at 4, but there are 5",
        lambda: m3.flash_attention_varlen(Q, Q, Q, offsets(0, 4)),
    ),
    ("no offsets", ValueError, "offsets must have N", lambda: m3.flash_attention_varlen(Q, Q, Q, offsets())),
    ("int64", TypeError, r"offsets has dtype torch\.int64", lambda: m3.flash_attention_varlen(Q, Q, Q, OFFSETS.long())),
    (
        "p",
        ValueError,
        "keep_probability is 0",
        lambda: m3.flash_attention_varlen(Q, Q, Q, OFFSETS, keep_probability=0.0),
    ),
    ("dropout", ValueError, "dropout_p is 1", lambda: m3.flash_attention_varlen(Q, Q, Q, OFFSETS, dropout_p=1.0)),
    ("seed", ValueError, "seed is -1", lambda: m3.flash_attention_varlen(Q, Q, Q, OFFSETS, seed=-1)),
    ("width", ValueError, "multiples of 8", lambda: m3.maxsim(ROWS[:, :7], ROWS[:, :7], OFFSETS, OFFSETS)),
    ("widths", ValueError, "passages have width 8", lambda: m3.maxsim(ROWS, ROWS[:, :8], OFFSETS, OFFSETS)),
    ("reduce", ValueError, "reduce is 'max'", lambda: m3.maxsim(ROWS, ROWS, OFFSETS, OFFSETS, reduce="max")),  # type: ignore[arg-type]
    ("query end", ValueError, "query_offsets ends at 4", lambda: m3.maxsim(ROWS, ROWS, offsets(0, 4), OFFSETS)),
    ("passage end", ValueError, "passage_offsets ends at 6", lambda: m3.maxsim(ROWS, ROWS, OFFSETS, offsets(0, 6))),
    (
        "floor",
        ValueError,
        "zero_floor has 1",
        lambda: m3.maxsim(ROWS, ROWS, OFFSETS, OFFSETS, zero_floor=torch.ones(1) > 0),
    ),
    ("pair", ValueError, "2 passages", lambda: m3.maxsim_pairs(ROWS, ROWS, OFFSETS, OFFSETS, PAIRS + 1)),
    ("pairs", ValueError, r"\[P, 2\]", lambda: m3.maxsim_pairs(ROWS, ROWS, OFFSETS, OFFSETS, PAIRS[:, :1])),
    ("ids", ValueError, "token_ids has 4 entries", lambda: m3.sparse_pool(WEIGHTS, IDS[:4], OFFSETS)),
    ("id dtype", TypeError, "token_ids has dtype", lambda: m3.sparse_pool(WEIGHTS, IDS.long(), OFFSETS)),
    (
        "head",
        ValueError,
        "weight has 15",
        lambda: m3.sparse_embed(ROWS, WEIGHTS.new_ones(15), WEIGHTS[:1], IDS, OFFSETS),
    ),
    ("bias", ValueError, "bias has 2", lambda: m3.sparse_embed(ROWS, WEIGHTS.new_ones(16), WEIGHTS[:2], IDS, OFFSETS)),
    ("inputs", ValueError, "weight has 15 inputs", lambda: m3.linear(ROWS, torch.zeros(3, 15))),
    ("layer dtype", TypeError, "weight has dtype", lambda: m3.linear(ROWS, torch.zeros(3, 16).bfloat16())),
    ("layer bias", ValueError, "bias has 2 entries", lambda: m3.linear(ROWS, ROWS, ROWS[0, :2])),
    ("residual", ValueError, r"expected \(5, 5\)", lambda: m3.linear(ROWS, ROWS, residual=ROWS)),
    ("activation", ValueError, "activation is 'relu'", lambda: m3.linear(ROWS, ROWS, activation="relu")),  # type: ignore[arg-type]
    ("storage", ValueError, "accepted: float32, bfloat16", lambda: m3.pack_linear(ROWS, torch.int16)),
    ("int8 depth", ValueError, "at most 131072", lambda: m3.pack_linear(torch.zeros(1, 131073), torch.int8)),
    (
        "panels",
        ValueError,
        r"weight\.panels has shape",
        lambda: m3.linear(ROWS, m3.pack_linear(ROWS)._replace(columns=40)),
    ),
    ("norm", ValueError, "weight has 3 entries", lambda: m3.layer_norm(ROWS, ROWS[0, :3], ROWS[0])),
    ("eps", ValueError, "eps is 0", lambda: m3.layer_norm(ROWS, ROWS[0], ROWS[0], eps=0.0)),
    (
        "table",
        ValueError,
        "token_ids run from 0 to 4, but words has 3",
        lambda: m3.embed_tokens(IDS, OFFSETS, ROWS[:3], ROWS, *[ROWS[0]] * 3),
    ),
    (
        "positions",
        ValueError,
        "sequence of 3 tokens, but positions has 2 rows",
        lambda: m3.embed_tokens(IDS, OFFSETS, ROWS, ROWS, *[ROWS[0]] * 3, first_position=3),
    ),
    ("batch", TypeError, "queries must be a SparseBatch", lambda: m3.sparse_scores(WEIGHTS, WEIGHTS)),  # type: ignore[arg-type]
    ("token id", ValueError, r"dicts\[0\] has the token id 'x'", lambda: m3.SparseBatch.from_dicts([{"x": 1.0}])),
]


@pytest.mark.parametrize(("error", "message", "call"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_argument_is_named(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        call()
