"""PTX types as numpy types: registers hold unsigned words, instructions view them as what their type suffix says."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Lanes = NDArray[Any]
"""One value for each lane of a wave."""

UNSIGNED: dict[int, np.dtype[Any]] = {bits: np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)}
_SIGNED: dict[int, np.dtype[Any]] = {bits: np.dtype(f"i{bits // 8}") for bits in UNSIGNED}
_FLOAT: dict[int, np.dtype[Any]] = {bits: np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)}


@functools.cache
def bits_of(ptx_type: str) -> int:
    """Width of "b32", "f16x2", "bf16", ...; predicates have none (0)."""
    if ptx_type == "pred":
        return 0
    if ptx_type.endswith("x2"):
        return 32
    return int("".join(c for c in ptx_type if c.isdigit()) or 0)


@functools.cache
def numpy_type(ptx_type: str) -> np.dtype[Any]:
    """The numpy type that an instruction of this type computes in; bfloat16 stays a 16-bit word.

    Raises:
        NotImplementedError: a type that has none.
    """
    if ptx_type == "pred":
        return np.dtype(bool)
    if ptx_type in ("bf16", "bf16x2", "f16x2", "tf32"):
        return UNSIGNED[bits_of(ptx_type) if ptx_type != "tf32" else 32]
    kinds: dict[str, dict[int, np.dtype[Any]]] = {"u": UNSIGNED, "b": UNSIGNED, "s": _SIGNED, "f": _FLOAT}
    kind, width = kinds.get(ptx_type[0]), bits_of(ptx_type)
    if kind is None or width not in kind:
        raise NotImplementedError(f"PTX type .{ptx_type}")
    return kind[width]


def bfloat16_to_float32(words: Lanes) -> Lanes:
    """Exact."""
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: Lanes) -> Lanes:
    """To nearest even, overflow to infinity; every NaN becomes 0x7FFF, as the GPU's conversion gives."""
    words = np.ascontiguousarray(values, np.float32).view(np.uint32)
    odd = (words >> np.uint32(16)) & np.uint32(1)
    rounded = ((words + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def to_tf32(words: Lanes) -> Lanes:
    """What a tensor core reads of a float32 word in .tf32: it leaves out the 13 low bits of the fraction."""
    return (words & np.uint32(0xFFFFE000)).view(np.float32)


def round_to_tf32(words: Lanes) -> Lanes:
    """cvt.rna.tf32: to nearest, ties away from zero."""
    finite = (words & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    return np.where(finite, words + np.uint32(0x1000), words) & np.uint32(0xFFFFE000)


def flush_subnormals(values: Lanes) -> Lanes:
    """.ftz: subnormal float32 become zeros of the same sign."""
    tiny = np.abs(values) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), values), values)
