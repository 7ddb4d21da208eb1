"""Variable-length attention on NVIDIA GPUs, in Triton: forward, and a deterministic backward without atomics.

    forward    out = softmax(scale q kᵀ) v and log_sum_exp, by online softmax over tiles of keys  (arXiv 2307.08691)
    backward   1. grad_q and δ = Σ_d grad_out·out, one program for each tile of query rows
               2. grad_k and grad_v, one program for each tile of key rows, which reads that δ

Shapes: q, k, v, out [T, H, D] packed rows, D in 32, 64, 128; offsets int32 [N + 1]; log_sum_exp, δ float32 [H, T].
Every element of every output is written by exactly one program, in a fixed order of additions.

Launch: (T // BLOCK + N, H) programs, a bound that needs no length from the device. Sequence i owns the tiles from
offsets[i] // BLOCK + i on: floor(b / B) - floor(a / B) + 1 ≥ ceil((b - a) / B), so its rows always find room, and a
program finds its sequence by bisection. Surplus programs (at most one for each sequence) leave at once.

Arithmetic: products of 16-bit inputs run on tensor cores with float32 sums. float32 inputs are multiplied in IEEE
float32, which no tensor core does: they run on the plain FMA units unless the caller allows tf32.
FLOPs: 4·n²·H·D forward, 14·n²·H·D backward (each of its two passes recomputes the scores). Bytes: one read of q and one
write of out; k and v are read once for each tile of query rows, from L2 while they fit.
Addresses: a 64-bit base for each tile plus 32-bit offsets within it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3kernels._tiles import TileTable, turned_on
from m3kernels.attention.reference import keep_limit

HEAD_WIDTHS = (32, 64, 128)
OPTION_SETS = dict.fromkeys(
    ("forward", "backward_q", "backward_kv"), ((), ("SAMPLED",), ("DROPOUT",), ("SAMPLED", "DROPOUT"))
)
"""Kernel → the sets of compile-time switches that calls turn on."""
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
_MULTIPLIER_0 = tl.constexpr(0x21F0AAAD)
_MULTIPLIER_1 = tl.constexpr(0x735A2D97)
_SHARED_BY_HEADS = tl.constexpr(0xFFFFFFFF)


@dataclass(frozen=True)
class Options:
    """What the kernels are told about one call, apart from its tensors."""

    scale: float
    keep_probability: float | None
    dropout_p: float
    seed: int
    allow_tf32: bool

    @property
    def switches(self) -> dict[str, bool]:
        """The compile-time switches; those that are on make one of OPTION_SETS."""
        return {"SAMPLED": self.keep_probability is not None, "DROPOUT": self.dropout_p > 0.0}

    def kernel_arguments(self) -> dict[str, Any]:
        """Arguments that all kernels share: numbers of the hash as int32 bit patterns, and compile-time switches."""
        keep = 1.0 if self.keep_probability is None else self.keep_probability
        return {
            "scale": self.scale,
            "seed_key": _as_int32(_seed_key(self.seed)),
            "keep_limit": keep_limit(keep),
            "dropout_limit": keep_limit(1.0 - self.dropout_p),
            "dropout_factor": 1.0 / (1.0 - self.dropout_p),
            **self.switches,
            "PRECISION": "tf32" if self.allow_tf32 else "ieee",
        }


def forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, options: Options, tiles: TileTable
) -> tuple[Tensor, Tensor]:
    """Outputs [T, H, D] in the dtype of q and log-sum-exp float32 [H, T]; −∞ where a row attends to nothing."""
    _check(q)
    rows, heads, width = q.shape
    q, k, v = (_unit_stride(x) for x in (q, k, v))
    out = torch.empty((rows, heads, width), dtype=q.dtype, device=q.device)
    log_sum_exp = torch.empty((heads, rows), dtype=torch.float32, device=q.device)
    sequences = offsets.shape[0] - 1
    if rows == 0 or heads == 0:
        return out, log_sum_exp
    tile = tiles.find("forward", q.dtype, width, options.allow_tf32, turned_on(options.switches))
    forward_kernel[(rows // tile.block_m + sequences, heads)](
        q, k, v, out, log_sum_exp, offsets, sequences, rows,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        WIDTH=width, **options.kernel_arguments(), **tile.launch_options(),
    )  # fmt: skip
    return out, log_sum_exp


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    offsets: Tensor,
    options: Options,
    tiles: TileTable,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to q, k and v, each [T, H, D] in the dtype of q."""
    _check(q)
    rows, heads, width = q.shape
    grad_out, q, k, v = (_unit_stride(x) for x in (grad_out, q, k, v))
    out = out.contiguous()
    grad_q, grad_k, grad_v = (torch.empty((rows, heads, width), dtype=q.dtype, device=q.device) for _ in range(3))
    sequences = offsets.shape[0] - 1
    if rows == 0 or heads == 0:
        return grad_q, grad_k, grad_v
    delta = torch.empty_like(log_sum_exp)
    strides = [x.stride(axis) for x in (q, k, v, grad_out) for axis in (0, 1)]
    shared = options.kernel_arguments()
    tile = tiles.find("backward_q", q.dtype, width, options.allow_tf32, turned_on(options.switches))
    backward_q_kernel[(rows // tile.block_m + sequences, heads)](
        q, k, v, out, grad_out, grad_q, log_sum_exp, delta, offsets, sequences, rows, *strides,
        WIDTH=width, **shared, **tile.launch_options(),
    )  # fmt: skip
    tile = tiles.find("backward_kv", q.dtype, width, options.allow_tf32, turned_on(options.switches))
    backward_kv_kernel[(rows // tile.block_n + sequences, heads)](
        q, k, v, grad_out, grad_k, grad_v, log_sum_exp, delta, offsets, sequences, rows, *strides,
        WIDTH=width, **shared, **tile.launch_options(),
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def compiled_arguments(
    kernel: Any, dtype: str, width: int, options: Collection[str]
) -> tuple[dict[str, str], dict[str, Any], tuple[str, ...]]:
    """For ahead-of-time compilation: Triton types of a kernel's arguments, its constants with only these switches on,
    and the arguments that are multiples of 16 bytes or elements, as `forward` and `backward` pass them."""
    types = {"scale": "fp32", "dropout_factor": "fp32"}
    types |= {"log_sum_exp_ptr": "*fp32", "delta_ptr": "*fp32", "offsets_ptr": "*i32"}
    signature = {}
    for name in kernel.arg_names:
        default = f"*{dtype}" if name.endswith("_ptr") else "constexpr" if name.isupper() else "i32"
        signature[name] = types.get(name, default)
    aligned = tuple(name for name in signature if name.endswith(("_ptr", "_row", "_head")))
    return signature, {"WIDTH": width, **{name: name in options for name in ("SAMPLED", "DROPOUT")}}, aligned


def _check(q: Tensor) -> None:
    if q.shape[2] not in HEAD_WIDTHS:
        raise ValueError(f"q has head width {q.shape[2]}; the GPU kernels accept {', '.join(map(str, HEAD_WIDTHS))}")


def _unit_stride(x: Tensor) -> Tensor:
    """Rows may lie apart (a slice of a fused QKV product does), the values of one head may not."""
    return x if x.stride(2) == 1 else x.contiguous()


def _as_int32(word: int) -> int:
    """The signed number with the bits of an unsigned 32-bit one: its Triton type does not depend on its value."""
    return word - 2**32 if word >= 2**31 else word


def _seed_key(seed: int) -> int:
    """mix(seed_high + mix(seed_low)) of the reference's hash: the part that no row changes."""

    def mix(x: int) -> int:
        x &= 0xFFFFFFFF
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
        return x ^ (x >> 15)

    return mix((seed >> 32) + mix(seed))


_RUN_TIME_VALUES = ["sequences", "total", "seed_key", "keep_limit", "dropout_limit", "scale", "dropout_factor"]


@triton.jit(do_not_specialize=_RUN_TIME_VALUES)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, log_sum_exp_ptr, offsets_ptr, sequences, total,
    q_row, q_head, k_row, k_head, v_row, v_head,
    scale, seed_key, keep_limit, dropout_limit, dropout_factor,
    WIDTH: tl.constexpr, SAMPLED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M query rows of one head against all keys of their sequence; the sums stay in registers."""
    head = tl.program_id(1)
    sequence, begin, length, first = find_tile(offsets_ptr, sequences, BLOCK_M)
    if first >= length:
        return
    rows, columns, width = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    row_ok = first + rows < length
    q = tl.load(
        tile_base(q_ptr, begin + first, q_row, head, q_head) + rows[:, None] * q_row + width[None, :],
        mask=row_ok[:, None],
        other=0.0,
    )
    k_ptrs = tile_base(k_ptr, begin, k_row, head, k_head) + columns[None, :] * k_row + width[:, None]
    v_ptrs = tile_base(v_ptr, begin, v_row, head, v_head) + columns[:, None] * v_row + width[None, :]
    if SAMPLED:
        keep_keys = row_keys(seed_key, sequence, _SHARED_BY_HEADS, first + rows)
    if DROPOUT:
        dropout_keys = row_keys(seed_key, sequence, head.to(tl.uint32), first + rows)
    maximum = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total_weight = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for start in range(0, length, BLOCK_N):
        column_ok = start + columns < length
        k = tl.load(k_ptrs, mask=column_ok[None, :], other=0.0)
        # The bias −∞ of absent columns rides on the multiply-add that scales the scores.
        bias = tl.where(column_ok, 0.0, -float("inf"))
        scores = tl.dot(q, k, input_precision=PRECISION) * (scale * LOG2_E) + bias[None, :]
        if SAMPLED:
            attended = is_attended(keep_keys[:, None], (first + rows)[:, None], (start + columns)[None, :], keep_limit)
            scores = tl.where(attended, scores, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        # A row that has met no key yet keeps −∞; subtracting 0 instead makes its weights 0 and not NaN.
        shift = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(maximum - shift)
        total_weight = total_weight * shrink + tl.sum(weights, 1)
        if DROPOUT:
            kept = is_kept(dropout_keys[:, None], (start + columns)[None, :], dropout_limit)
            weights = tl.where(kept, weights, 0.0)
        v = tl.load(v_ptrs, mask=column_ok[:, None], other=0.0)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision=PRECISION)
        maximum = new_maximum
        k_ptrs += BLOCK_N * k_row.to(tl.int64)
        v_ptrs += BLOCK_N * v_row.to(tl.int64)
    shift = tl.where(maximum == -float("inf"), 0.0, maximum)
    factor = 1.0 / tl.where(total_weight == 0.0, 1.0, total_weight)
    if DROPOUT:
        factor = factor * dropout_factor
    store_tile(out_ptr, sums * factor[:, None], begin + first, rows, row_ok, head, WIDTH)
    tl.store(
        log_sum_exp_ptr + head.to(tl.int64) * total + begin + first + rows,
        (shift + tl.log2(total_weight)) * LN_2,
        mask=row_ok,
    )


@triton.jit(do_not_specialize=_RUN_TIME_VALUES)
def backward_q_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_out_ptr, grad_q_ptr, log_sum_exp_ptr, delta_ptr, offsets_ptr,
    sequences, total,
    q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head,
    scale, seed_key, keep_limit, dropout_limit, dropout_factor,
    WIDTH: tl.constexpr, SAMPLED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: grad_q and δ of BLOCK_M query rows of one head; loops over all keys of their sequence."""
    head = tl.program_id(1)
    sequence, begin, length, first = find_tile(offsets_ptr, sequences, BLOCK_M)
    if first >= length:
        return
    rows, columns, width = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    row_ok = first + rows < length
    packed = head.to(tl.int64) * total + begin + first + rows
    out_row = tl.num_programs(1) * WIDTH
    out = tl.load(
        tile_base(out_ptr, begin + first, out_row, head, WIDTH) + rows[:, None] * out_row + width[None, :],
        mask=row_ok[:, None],
        other=0.0,
    )
    grad_out = tl.load(
        tile_base(grad_out_ptr, begin + first, grad_row, head, grad_head) + rows[:, None] * grad_row + width[None, :],
        mask=row_ok[:, None],
        other=0.0,
    )
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    tl.store(delta_ptr + packed, delta, mask=row_ok)
    q = tl.load(
        tile_base(q_ptr, begin + first, q_row, head, q_head) + rows[:, None] * q_row + width[None, :],
        mask=row_ok[:, None],
        other=0.0,
    )
    log_sums = load_log_sums(log_sum_exp_ptr + packed, row_ok)
    k_ptrs = tile_base(k_ptr, begin, k_row, head, k_head) + columns[None, :] * k_row + width[:, None]
    v_ptrs = tile_base(v_ptr, begin, v_row, head, v_head) + columns[None, :] * v_row + width[:, None]
    if SAMPLED:
        keep_keys = row_keys(seed_key, sequence, _SHARED_BY_HEADS, first + rows)
    if DROPOUT:
        dropout_keys = row_keys(seed_key, sequence, head.to(tl.uint32), first + rows)
    grad_q = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for start in range(0, length, BLOCK_N):
        column_ok = start + columns < length
        k = tl.load(k_ptrs, mask=column_ok[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=column_ok[None, :], other=0.0)
        weights = tl.exp2(tl.dot(q, k, input_precision=PRECISION) * (scale * LOG2_E) - log_sums[:, None])
        attended = column_ok[None, :]
        if SAMPLED:
            attended = attended & is_attended(
                keep_keys[:, None], (first + rows)[:, None], (start + columns)[None, :], keep_limit
            )
        weights = tl.where(attended, weights, 0.0)
        grad_weights = tl.dot(grad_out, v, input_precision=PRECISION)
        if DROPOUT:
            kept = is_kept(dropout_keys[:, None], (start + columns)[None, :], dropout_limit)
            grad_weights = tl.where(kept, grad_weights * dropout_factor, 0.0)
        grad_scores = weights * (grad_weights - delta[:, None])
        grad_q = tl.dot(grad_scores.to(k.dtype), tl.trans(k), grad_q, input_precision=PRECISION)
        k_ptrs += BLOCK_N * k_row.to(tl.int64)
        v_ptrs += BLOCK_N * v_row.to(tl.int64)
    store_tile(grad_q_ptr, grad_q * scale, begin + first, rows, row_ok, head, WIDTH)


@triton.jit(do_not_specialize=_RUN_TIME_VALUES)
def backward_kv_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, grad_k_ptr, grad_v_ptr, log_sum_exp_ptr, delta_ptr, offsets_ptr,
    sequences, total,
    q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head,
    scale, seed_key, keep_limit, dropout_limit, dropout_factor,
    WIDTH: tl.constexpr, SAMPLED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: grad_k and grad_v of BLOCK_N key rows of one head; loops over all query rows of their sequence.

    Tiles are held transposed, [keys, query rows], so that both products that add up need no transposed weights.
    """
    head = tl.program_id(1)
    sequence, begin, length, first = find_tile(offsets_ptr, sequences, BLOCK_N)
    if first >= length:
        return
    rows, columns, width = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    column_ok = first + columns < length
    k = tl.load(
        tile_base(k_ptr, begin + first, k_row, head, k_head) + columns[:, None] * k_row + width[None, :],
        mask=column_ok[:, None],
        other=0.0,
    )
    v = tl.load(
        tile_base(v_ptr, begin + first, v_row, head, v_head) + columns[:, None] * v_row + width[None, :],
        mask=column_ok[:, None],
        other=0.0,
    )
    q_ptrs = tile_base(q_ptr, begin, q_row, head, q_head) + rows[None, :] * q_row + width[:, None]
    grad_ptrs = tile_base(grad_out_ptr, begin, grad_row, head, grad_head) + rows[:, None] * grad_row + width[None, :]
    row_numbers = head.to(tl.int64) * total + begin + rows
    grad_k = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    grad_v = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    for start in range(0, length, BLOCK_M):
        row_ok = start + rows < length
        q = tl.load(q_ptrs, mask=row_ok[None, :], other=0.0)
        # Absent rows get log-sum-exp +∞, so their weights are 0; absent keys only spoil rows that are never stored.
        log_sums = load_log_sums(log_sum_exp_ptr + row_numbers + start, row_ok)
        weights = tl.exp2(tl.dot(k, q, input_precision=PRECISION) * (scale * LOG2_E) - log_sums[None, :])
        if SAMPLED:
            keep_keys = row_keys(seed_key, sequence, _SHARED_BY_HEADS, start + rows)
            attended = is_attended(keep_keys[None, :], (start + rows)[None, :], (first + columns)[:, None], keep_limit)
            weights = tl.where(attended, weights, 0.0)
        grad_out = tl.load(grad_ptrs, mask=row_ok[:, None], other=0.0)
        grad_weights = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
        dropped = weights
        if DROPOUT:
            dropout_keys = row_keys(seed_key, sequence, head.to(tl.uint32), start + rows)
            kept = is_kept(dropout_keys[None, :], (first + columns)[:, None], dropout_limit)
            dropped = tl.where(kept, weights * dropout_factor, 0.0)
            grad_weights = tl.where(kept, grad_weights * dropout_factor, 0.0)
        grad_v = tl.dot(dropped.to(grad_out.dtype), grad_out, grad_v, input_precision=PRECISION)
        delta = tl.load(delta_ptr + row_numbers + start, mask=row_ok, other=0.0)
        grad_scores = weights * (grad_weights - delta[None, :])
        grad_k = tl.dot(grad_scores.to(q.dtype), tl.trans(q), grad_k, input_precision=PRECISION)
        q_ptrs += BLOCK_M * q_row.to(tl.int64)
        grad_ptrs += BLOCK_M * grad_row.to(tl.int64)
    store_tile(grad_v_ptr, grad_v, begin + first, columns, column_ok, head, WIDTH)
    store_tile(grad_k_ptr, grad_k * scale, begin + first, columns, column_ok, head, WIDTH)


@triton.jit
def find_tile(offsets_ptr, sequences, BLOCK: tl.constexpr):
    """Sequence of this program, its first packed row and length, and the first row of the tile within it.

    Bisection for the last sequence i with offsets[i] // BLOCK + i ≤ program; the left side strictly increases with i.
    """
    program = tl.program_id(0)
    low = 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(offsets_ptr + middle) // BLOCK + middle <= program:
            low = middle
        else:
            high = middle
    begin = tl.load(offsets_ptr + low)
    length = tl.load(offsets_ptr + low + 1) - begin
    first = (program - (begin // BLOCK + low)) * BLOCK
    return low, begin, length, first


@triton.jit
def tile_base(pointer, row, row_stride, head, head_stride):
    """Address of the first value of a packed row's head, computed in 64 bits."""
    return pointer + row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride


@triton.jit
def store_tile(pointer, values, first_row, rows, row_ok, head, WIDTH: tl.constexpr):
    """Store [rows, WIDTH] of one head into a contiguous [T, H, WIDTH]."""
    row_stride = tl.num_programs(1) * WIDTH
    pointers = tile_base(pointer, first_row, row_stride, head, WIDTH)
    pointers = pointers + rows[:, None] * row_stride + tl.arange(0, WIDTH)[None, :]
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=row_ok[:, None])


@triton.jit
def load_log_sums(pointers, row_ok):
    """Log-sum-exp in base 2; +∞, which makes every weight 0, for absent rows and rows that attend to nothing."""
    log_sums = tl.load(pointers, mask=row_ok, other=float("inf"))
    return tl.where(log_sums == -float("inf"), float("inf"), log_sums) * LOG2_E


@triton.jit
def wrap_mul(x, y):
    """x·y modulo 2³², which the overflow checks of Triton's debug mode shall let pass."""
    return tl.mul(x, y, sanitize_overflow=False)


@triton.jit
def wrap_add(x, y):
    """x + y modulo 2³²."""
    return tl.add(x, y, sanitize_overflow=False)


@triton.jit
def mix(x):
    """The reference's hash of uint32."""
    x = wrap_mul(x ^ (x >> 16), _MULTIPLIER_0)
    x = wrap_mul(x ^ (x >> 15), _MULTIPLIER_1)
    return x ^ (x >> 15)


@triton.jit
def row_keys(seed_key, sequence, stream, rows):
    """Keys of rows for one stream (a head, or all heads): uint32, as reference.row_keys."""
    key = mix(wrap_add(seed_key.to(tl.uint32), sequence.to(tl.uint32)))
    key = mix(wrap_add(key, stream))
    return mix(wrap_add(rows.to(tl.uint32), key)) & 0xFFFFFFFE


@triton.jit
def is_kept(keys, columns, limit):
    """By the keys of rows and the numbers of columns, one of them [M, 1], the other [1, N]."""
    sums = wrap_add(keys, mix(columns.to(tl.uint32)) | 1)
    return wrap_mul(sums, sums).to(tl.int32, bitcast=True) < limit


@triton.jit
def is_attended(keys, rows, columns, limit):
    """Sampled attention: the first row always, oneself never, every other row by the hash."""
    return (is_kept(keys, columns, limit) | (columns == 0)) & (rows != columns)
