"""The meaning of variable-length attention, in plain PyTorch.

For every sequence of n rows and every head, with s = scale * q kᵀ [n, n]:

    out = softmax(s) v,   log_sum_exp = log Σ_j exp(s_j)

Two random variants drop entries after the exponential, decided by a counter-based hash so that every backend, forward
and backward, sees the same decision without any mask tensor:

* keep_probability p (RetroMAE's enhanced decoder, arXiv 2205.12035): row i attends to row 0 of its sequence, never to
  itself, and to every other row j with probability p; the softmax runs over the kept rows. A row without any kept
  row gives out = 0, log_sum_exp = -inf and no gradient. One decision for all heads.
* dropout d: each probability of the finished softmax is zeroed with probability d, the others are divided by 1 - d.
  One decision for each head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)
SHARED_BY_HEADS = _WORD
"""Stream number of decisions that all heads share."""


def mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash (xor-shift, multiply, twice) of the low 32 bits of int64 `x`, as int64 in [0, 2³²)."""
    x = x & _WORD
    x = ((x ^ (x >> 16)) * _MULTIPLIERS[0]) & _WORD
    x = ((x ^ (x >> 15)) * _MULTIPLIERS[1]) & _WORD
    return x ^ (x >> 15)


def row_keys(seed: int, sequence: int, stream: int, rows: Tensor) -> Tensor:
    """Key of each row: mix(row + mix(stream + mix(sequence + mix(seed_high + mix(seed_low))))), made even."""
    key = mix(torch.tensor(seed & _WORD))
    key = mix(key + ((seed >> 32) & _WORD))
    key = mix(key + sequence)
    key = mix(key + stream)
    return mix(rows.to(torch.int64) + key.to(rows.device)) & ~1


def column_keys(columns: Tensor) -> Tensor:
    """Key of each column: mix(column), made odd."""
    return mix(columns) | 1


def keep_limit(probability: float) -> int:
    """An entry is kept if its square, as a signed 32-bit number, is less than this: with `probability` (0 < p ≤ 1)."""
    return min(math.ceil(probability * 2**32) - 2**31, 2**31 - 1)


def kept(seed: int, sequence: int, stream: int, length: int, probability: float, device: torch.device) -> Tensor:
    """Decision for every (row, column) of a sequence: bool [length, length].

    The square of the sum of the row's and the column's key decides: one addition and one multiplication of 32 bits,
    since what an entry costs is what dropout costs. The sum is odd; squares of odd numbers modulo 2³² are the numbers
    8 n + 1, each as often as the other, so the probability is met to 2⁻²⁹. Nothing linear ties entries together: of the
    squares at the corners of a rectangle the fourth differs from what three would give by 2 · (difference of the row
    keys) · (difference of the column keys). int64 wraps around and keeps the low 32 bits right.
    """
    positions = torch.arange(length, dtype=torch.int64, device=device)
    sums = row_keys(seed, sequence, stream, positions)[:, None] + column_keys(positions)[None, :]
    squares = (sums * sums + 2**31) & _WORD
    return squares < keep_limit(probability) + 2**31


def sampled_mask(seed: int, sequence: int, length: int, keep_probability: float, device: torch.device) -> Tensor:
    """Which columns each row attends to under `keep_probability`: bool [length, length]."""
    mask = kept(seed, sequence, SHARED_BY_HEADS, length, keep_probability, device)
    mask[:, :1] = True
    return mask & ~torch.eye(length, dtype=torch.bool, device=device)


def dropout_factors(
    seed: int, sequence: int, heads: int, length: int, dropout_p: float, device: torch.device
) -> Tensor:
    """What multiplies each probability under dropout: 0 or 1 / (1 - dropout_p), float32 [heads, length, length]."""
    decisions = [kept(seed, sequence, head, length, 1.0 - dropout_p, device) for head in range(heads)]
    return torch.stack(decisions).to(torch.float32) / (1.0 - dropout_p)


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _one_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: int,
    scale: float,
    keep_probability: float | None,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs [H, n, D], log-sum-exp [H, n] and the probabilities after dropout [H, n, n] of one sequence [H, n, D]."""
    heads, length, _ = q.shape
    scores = scale * (q @ k.transpose(1, 2))
    if keep_probability is not None:
        mask = sampled_mask(seed, sequence, length, keep_probability, q.device)
        scores = scores.masked_fill(~mask, -math.inf)
    log_sum_exp = torch.logsumexp(scores, dim=2)
    reachable = log_sum_exp != -math.inf
    probabilities = torch.exp(scores - torch.where(reachable, log_sum_exp, 0.0)[:, :, None])
    if dropout_p > 0.0:
        probabilities = probabilities * dropout_factors(seed, sequence, heads, length, dropout_p, q.device).to(q.dtype)
    return probabilities @ v, log_sum_exp, probabilities


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    scale: float,
    keep_probability: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention within each sequence of packed rows, differentiable.

    Args:
        q, k, v: [T, H, D], any float dtype; computed in float32 (float64 for float64).
        offsets: int32 [N + 1].
    Returns:
        out [T, H, D] in the dtype of q, log_sum_exp [H, T] in float32 (float64 for float64).
    """
    work = _working_dtype(q.dtype)
    bounds = offsets.tolist()
    outputs, sums = [], []
    for sequence, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        qs, ks, vs = (x[begin:end].to(work).transpose(0, 1) for x in (q, k, v))
        out, log_sum_exp, _ = _one_sequence(qs, ks, vs, sequence, scale, keep_probability, dropout_p, seed)
        outputs.append(out.transpose(0, 1))
        sums.append(log_sum_exp)
    if not outputs:
        return torch.zeros_like(q), q.new_zeros((q.shape[1], 0), dtype=work)
    return torch.cat(outputs).to(q.dtype), torch.cat(sums, dim=1)


def flash_attention_varlen_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    offsets: Tensor,
    scale: float,
    keep_probability: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `flash_attention_varlen` to q, k and v, written out.

    With P the probabilities before dropout, Z the dropout factors and δ_i = Σ_d grad_out_id out_id:

        grad_v = (P∘Z)ᵀ grad_out,  dS = P ∘ (Z ∘ (grad_out vᵀ) - δ),  grad_q = scale dS k,  grad_k = scale dSᵀ q
    """
    work = _working_dtype(q.dtype)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    bounds = offsets.tolist()
    heads = q.shape[1]
    for sequence, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        qs, ks, vs, gs, os = (x[begin:end].to(work).transpose(0, 1) for x in (q, k, v, grad_out, out))
        length = end - begin
        _, _, dropped = _one_sequence(qs, ks, vs, sequence, scale, keep_probability, dropout_p, seed)
        _, _, plain = _one_sequence(qs, ks, vs, sequence, scale, keep_probability, 0.0, seed)
        grad_probabilities = gs @ vs.transpose(1, 2)
        if dropout_p > 0.0:
            factors = dropout_factors(seed, sequence, heads, length, dropout_p, q.device)
            grad_probabilities = grad_probabilities * factors.to(work)
        grad_scores = plain * (grad_probabilities - (gs * os).sum(dim=2, keepdim=True))
        for grad, value in zip(
            grads,
            (
                scale * (grad_scores @ ks),
                scale * (grad_scores.transpose(1, 2) @ qs),
                dropped.transpose(1, 2) @ gs,
            ),
        ):
            grad[begin:end] = value.transpose(0, 1).to(grad.dtype)
    return grads[0], grads[1], grads[2]
