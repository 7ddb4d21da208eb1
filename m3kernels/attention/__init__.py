"""Variable-length attention: `flash_attention_varlen` on packed rows, `flash_attention` on padded ones."""

from __future__ import annotations

import torch
from torch import Tensor

from m3kernels._checks import check_offsets, check_same, check_tensor
from m3kernels.attention import ops as _ops  # noqa: F401  (registers the ops)
from m3kernels.packing import offsets_from_lengths, pack, unpack

__all__ = ["flash_attention", "flash_attention_varlen", "varlen_attn"]

MAX_HEAD_WIDTH = 256


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_length: int | None = None,
    *,
    scale: float | None = None,
    keep_probability: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    allow_tf32: bool = False,
) -> Tensor:
    """Bidirectional attention within each sequence of packed rows: softmax(scale · q kᵀ) v.

    Memory is O(T·H·D): nothing of size length² exists in forward or backward (FlashAttention-2, arXiv 2307.08691).

    Args:
        q, k, v: packed rows [T, H, D] of equal shape; float32, bfloat16, float16 (float64 through the reference).
            Sums run in float32.
        offsets: int32 [N + 1] on the same device; sequence i owns rows offsets[i]:offsets[i + 1], which may be none.
        max_length: an upper bound of the longest sequence, a hint that changes no result; default T.
        scale: factor of the scores, default D ** -0.5.
        keep_probability: sampled attention of RetroMAE's decoder (arXiv 2205.12035, section 3.3): each row attends to
            the first row of its sequence, never to itself, and to every other row with this probability in (0, 1].
            A row with nothing to attend to gives 0.
        dropout_p: probability in [0, 1) of dropping an attention probability. It costs time: forward and backward of
            heads of 64 take 2 to 3 % longer, of heads of 32 3 to 6 % (benchmarks/results/amx/attention_dropout.csv).
        seed: non-negative 64-bit number from which keep_probability and dropout_p draw, the same on every device.
        allow_tf32: let a GPU multiply float32 inputs in tf32.

    Returns:
        [T, H, D] in the dtype of q, differentiable in q, k and v.

    Accuracy at length L, as the largest error relative to the largest entry: in float32, output and gradients stay
    below 2e-6·√(L + D). In bfloat16 and float16, of unit u = eps / 2, the output stays below 2 u (rounded once) and
    gradients below 8 u (the rounded output enters them). GPU kernels also round the probabilities to 16 bits: 2 u and
    4 u, as ratios of norms. A CPU widens 16-bit inputs as it reads them, so there they save memory, not time, but for
    the forward on a machine with AMX: it multiplies bfloat16 as it is (the probabilities rounded to it, within the same
    bounds), float16 as two and float32, from 512 rows on, as three bfloat16 parts, whose sums are exact for numbers of
    2^-109 and more. M3_CPU_ISA=avx512vnni keeps to multiply-adds.

    Rows without a value: an empty sequence has no output. A lone row attends to itself, so its output is its v. A row
    whose scores are all −∞, like one that sampling left nothing, gives 0. A NaN in row j of q spoils row j of out; in
    k, every row of that sequence and head; in v, one column of them. A score of +∞ makes its row NaN, one of −∞ counts
    as 0. Gradients of that sequence and head may then be NaN; other sequences and heads never notice.

    Raises:
        TypeError: an argument is no tensor or has a dtype not listed above, or the dtypes differ.
        ValueError: shapes, devices, offsets (checked by value on the CPU) or probabilities are not as described.
    """
    check_tensor("q", q, dims=3)
    for name, value in (("k", k), ("v", v)):
        check_tensor(name, value, dims=3, device=q.device)
        check_same(name, value, "q", q)
    check_offsets("offsets", offsets, q.device)
    _check_numbers(q.shape[2], max_length, keep_probability, dropout_p, seed)
    options = (
        q.shape[0] if max_length is None else max_length,
        q.shape[2] ** -0.5 if scale is None else float(scale),
        keep_probability,
        float(dropout_p),
        seed,
        allow_tf32,
    )
    out: Tensor = torch.ops.m3.flash_attention_forward(q, k, v, offsets, *options)[0]
    return out


def _check_numbers(
    head_width: int, max_length: int | None, keep_probability: float | None, dropout_p: float, seed: int
) -> None:
    if not 1 <= head_width <= MAX_HEAD_WIDTH:
        raise ValueError(f"q has head width {head_width}; accepted: 1 to {MAX_HEAD_WIDTH}")
    if max_length is not None and max_length < 0:
        raise ValueError(f"max_length is {max_length}; it cannot be negative")
    if keep_probability is not None and not 0.0 < keep_probability <= 1.0:
        raise ValueError(f"keep_probability is {keep_probability}; accepted: above 0, at most 1")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; accepted: at least 0, below 1")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; accepted: 0 to 2**63 - 1")


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    *,
    scale: float | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """Attention over padded batches, a drop-in for scaled_dot_product_attention with a key-padding mask.

    Args:
        q, k, v: [N, H, L, D], dtypes as in `flash_attention_varlen`.
        lengths: integer [N], how many rows of each sequence are real; default all L. Rows past them are neither read
            nor attended to. Their sum stays on the device: a GPU is not waited for.
        scale: factor of the scores, default D ** -0.5.

    Returns:
        [N, H, L, D]; rows past the length are 0 (scaled_dot_product_attention leaves arbitrary values there).

    Raises:
        TypeError, ValueError: as `flash_attention_varlen`; also lengths outside 0..L (checked by value on the CPU).
    """
    check_tensor("q", q, dims=4)
    for name, value in (("k", k), ("v", v)):
        check_tensor(name, value, dims=4, device=q.device)
        check_same(name, value, "q", q)
    sequences, heads, length, width = q.shape
    padded = [x.transpose(1, 2) for x in (q, k, v)]
    if lengths is None:
        offsets = torch.arange(sequences + 1, device=q.device, dtype=torch.int32) * length
        rows = tuple(x.reshape(sequences * length, heads, width) for x in padded)
    else:
        offsets = offsets_from_lengths(lengths.to(q.device), limit=length)
        # On a GPU the sum of the lengths is not known here: rows past it belong to no sequence and nothing reads them.
        # The reference, which serves float64, wants every row to have its sequence.
        total = sequences * length if q.is_cuda and q.dtype != torch.float64 else int(offsets[-1])
        rows = tuple(pack(x, offsets, total) for x in padded)
    out = flash_attention_varlen(rows[0], rows[1], rows[2], offsets, length, scale=scale, allow_tf32=allow_tf32)
    if lengths is None:
        return out.reshape(sequences, length, heads, width).transpose(1, 2)
    return unpack(out, offsets, length).transpose(1, 2)


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
) -> Tensor:
    """`flash_attention_varlen` with the argument order of torch.nn.attention.varlen.varlen_attn, on every device.

    Only self-attention is supported: `cu_seq_k` has to be the same tensor as `cu_seq_q`, or equal to it.

    Raises:
        ValueError: the keys are packed in another way than the queries, or as `flash_attention_varlen`.
    """
    if cu_seq_k is not cu_seq_q and (cu_seq_k.shape != cu_seq_q.shape or not torch.equal(cu_seq_q, cu_seq_k)):
        raise ValueError("cu_seq_k differs from cu_seq_q; accepted: self-attention, where both are the same")
    return flash_attention_varlen(query, key, value, cu_seq_q, max(max_q, max_k), scale=scale)
