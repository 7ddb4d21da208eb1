"""Arithmetic, comparison, conversion and data movement within a thread (PTX ISA, "Instruction Set").

fma computes in the next wider type and rounds once more, which differs from a true fma only in double rounding (about
one result in 2²⁹ for float32). ex2, lg2, sin and the like are numpy's, more exact than a GPU's approximations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.simulator.formats import (
    UNSIGNED,
    Lanes,
    bfloat16_to_float32,
    bits_of,
    float32_to_bfloat16,
    flush_subnormals,
    numpy_type,
    round_to_tf32,
)
from tests.ptx.simulator.machine import Active, Execute, Wave
from tests.ptx.simulator.memory import LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW
from tests.ptx.simulator.operands import source, target, write
from tests.ptx.simulator.parser import Instruction, Kernel

Decoder = Callable[[Instruction, Kernel], Execute]
WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAMETER_WINDOW}


def _unsupported(instruction: Instruction) -> NotImplementedError:
    return NotImplementedError(f"the simulator does not know {instruction.text!r}")


def _elementwise(function: Callable[..., Any], arity: int) -> Decoder:
    """destination = function(sources), all of the last suffix's type; .ftz flushes what goes in and comes out."""

    def decode(instruction: Instruction, kernel: Kernel) -> Execute:
        ptx_type = instruction.type
        if ptx_type.startswith("bf16") or ptx_type == "f16x2" or "sat" in instruction.modifiers:
            raise _unsupported(instruction)
        sources = [source(kernel, operand, ptx_type) for operand in instruction.operands[1 : arity + 1]]
        dtype = numpy_type(ptx_type)
        chosen = function(instruction) if getattr(function, "by_instruction", False) else function
        flush = "ftz" in instruction.modifiers
        if isinstance(chosen, np.ufunc) and not flush:
            out = target(kernel, instruction.operands[0], ptx_type)

            def run(wave: Wave, active: Active) -> None:
                chosen(*(read(wave) for read in sources), out=out(wave), where=active.where)

            return run
        put = write(kernel, instruction.operands[0], ptx_type)

        def compute(wave: Wave, active: Active) -> None:
            values = [read(wave) for read in sources]
            result = np.asarray(chosen(*map(flush_subnormals, values) if flush else values)).astype(dtype, copy=False)
            put(wave, active, flush_subnormals(result) if flush else result)

        return compute

    return decode


def _choose(function: Callable[[Instruction], Callable[..., Any]]) -> Callable[..., Any]:
    """Marks a function that picks the operation by the instruction's suffixes."""
    function.by_instruction = True  # type: ignore[attr-defined]
    return function


@_choose
def _maximum(instruction: Instruction) -> Callable[..., Any]:
    """Without .NaN a number wins over a NaN."""
    return np.maximum if "NaN" in instruction.modifiers or instruction.type[0] != "f" else np.fmax


@_choose
def _minimum(instruction: Instruction) -> Callable[..., Any]:
    return np.minimum if "NaN" in instruction.modifiers or instruction.type[0] != "f" else np.fmin


def _divide(x: Any, y: Any) -> Any:
    """Integers truncate towards zero; division by zero gives all ones, which is what CUDA documents as undefined."""
    x, y = np.asarray(x), np.asarray(y)
    if x.dtype.kind == "f":
        return x / y
    safe = np.where(y == 0, np.ones_like(y), y)
    quotient = x // safe
    if x.dtype.kind == "i":
        quotient = quotient + ((quotient * safe != x) & ((x < 0) != (safe < 0))).astype(x.dtype)
    return np.where(y == 0, ~np.zeros_like(quotient), quotient)


def _remainder(x: Any, y: Any) -> Any:
    return np.fmod(x, np.where(np.asarray(y) == 0, np.ones_like(y), y))


def _fused(x: Any, y: Any, z: Any) -> Any:
    narrow = np.result_type(x, y, z)
    wide = np.float64 if narrow.itemsize < 8 else np.longdouble
    return (np.asarray(x).astype(wide) * y + z).astype(narrow)


def _population(x: Any) -> Any:
    return np.bitwise_count(x)


def _leading_zeros(x: Any) -> Any:
    width = np.asarray(x).dtype.itemsize * 8
    _, exponent = np.frexp(np.asarray(x).astype(np.longdouble))
    return width - np.where(np.asarray(x) == 0, 0, exponent)


def _shift(instruction: Instruction, kernel: Kernel) -> Execute:
    """shl and shr: amounts beyond the width shift everything out."""
    ptx_type, left = instruction.type, instruction.opcode == "shl"
    dtype = numpy_type(ptx_type)
    bits = bits_of(ptx_type)
    value, amount = source(kernel, instruction.operands[1], ptx_type), source(kernel, instruction.operands[2], "u32")
    put = write(kernel, instruction.operands[0], ptx_type)

    def run(wave: Wave, active: Active) -> None:
        x, n = value(wave), amount(wave)
        if np.ndim(n) == 0 and n < bits:
            put(wave, active, np.left_shift(x, dtype.type(n)) if left else np.right_shift(x, dtype.type(n)))
            return
        within = np.minimum(n, bits - 1).astype(dtype)
        shifted = np.left_shift(x, within) if left else np.right_shift(x, within)
        fill = np.right_shift(x, dtype.type(bits - 1)) if dtype.kind == "i" and not left else dtype.type(0)
        put(wave, active, np.where(n >= bits, fill, shifted))

    return run


def _multiply(instruction: Instruction, kernel: Kernel) -> Execute:
    """mul and mad: .lo and .hi halves of the product, or .wide; on floats mul alone."""
    ptx_type = instruction.type
    if ptx_type[0] == "f":
        return _elementwise(np.multiply, 2)(instruction, kernel)
    bits, add = bits_of(ptx_type), instruction.opcode == "mad"
    x, y = (source(kernel, operand, ptx_type) for operand in instruction.operands[1:3])
    wide_type = f"{ptx_type[0]}{2 * bits}"
    result_type = wide_type if "wide" in instruction.modifiers else ptx_type
    z = source(kernel, instruction.operands[3], result_type) if add else None
    put = write(kernel, instruction.operands[0], result_type)
    high = "hi" in instruction.modifiers
    if bits == 64:
        wide: Any = object if high else numpy_type(ptx_type)
    else:
        wide = numpy_type(wide_type) if high or "wide" in instruction.modifiers else numpy_type(ptx_type)

    def run(wave: Wave, active: Active) -> None:
        product = np.asarray(x(wave)).astype(wide, copy=False) * np.asarray(y(wave)).astype(wide, copy=False)
        if high:
            product = (product >> bits).astype(numpy_type(ptx_type))
        put(wave, active, product if z is None else product + z(wave))

    return run


_COMPARE: dict[str, Callable[..., Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _set_predicate(instruction: Instruction, kernel: Kernel) -> Execute:
    """setp: comparisons are false for NaN, those with a trailing u are true; num and nan ask for it."""
    ptx_type, word = instruction.type, instruction.modifiers[0]
    if ptx_type.startswith("bf16") or "|" in str(instruction.operands[0]):
        raise _unsupported(instruction)
    x, y = (source(kernel, operand, ptx_type) for operand in instruction.operands[1:3])
    floating = ptx_type[0] == "f"
    put = write(kernel, instruction.operands[0], "pred")
    combine = next((m for m in instruction.modifiers if m in ("and", "or", "xor")), None)
    joined: dict[str, Callable[..., Any]] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    other = source(kernel, instruction.operands[3], "pred") if combine else None
    unordered = floating and word not in _COMPARE and word not in ("num", "nan")
    if word not in ("num", "nan") and word.removesuffix("u") not in _COMPARE:
        raise _unsupported(instruction)
    plain = _COMPARE.get(word if not unordered else word.removesuffix("u"))

    def run(wave: Wave, active: Active) -> None:
        a, b = x(wave), y(wave)
        if plain is None:
            nan = np.isnan(a) | np.isnan(b)
            value: Any = nan if word == "nan" else ~nan
        else:
            value = plain(a, b)
            if floating and word == "ne":
                value = value & ~(np.isnan(a) | np.isnan(b))
            elif unordered:
                value = value | np.isnan(a) | np.isnan(b)
        if combine is not None and other is not None:
            value = joined[combine](value, other(wave))
        put(wave, active, value)

    return run


def _select(instruction: Instruction, kernel: Kernel) -> Execute:
    ptx_type = f"b{bits_of(instruction.type)}"
    a, b = (source(kernel, operand, ptx_type) for operand in instruction.operands[1:3])
    choice = source(kernel, instruction.operands[3], "pred")
    put = write(kernel, instruction.operands[0], ptx_type)
    return lambda wave, active: put(wave, active, np.where(choice(wave), a(wave), b(wave)))


def _move(instruction: Instruction, kernel: Kernel) -> Execute:
    """mov, also between a register and the parts of a vector."""
    ptx_type, (to, origin) = instruction.type, instruction.operands
    if ptx_type != "pred":
        ptx_type = f"b{bits_of(ptx_type)}"
    if isinstance(to, tuple):
        part = bits_of(ptx_type) // len(to)
        whole = source(kernel, origin, ptx_type)
        puts = [write(kernel, name, f"b{part}") for name in to]

        def unpack(wave: Wave, active: Active) -> None:
            word = whole(wave)
            for number, put in enumerate(puts):
                put(wave, active, (word >> word.dtype.type(part * number)).astype(UNSIGNED[part]))

        return unpack
    put_one = write(kernel, to, ptx_type)
    if isinstance(origin, tuple):
        part, dtype = bits_of(ptx_type) // len(origin), UNSIGNED[bits_of(ptx_type)]
        parts = [source(kernel, name, f"b{part}") for name in origin]

        def pack(wave: Wave, active: Active) -> None:
            word = np.zeros(wave.lanes, dtype)
            for number, read in enumerate(parts):
                word |= np.asarray(read(wave)).astype(dtype) << dtype.type(part * number)
            put_one(wave, active, word)

        return pack
    read_one = source(kernel, origin, ptx_type)
    return lambda wave, active: put_one(wave, active, read_one(wave))


def _convert_address(instruction: Instruction, kernel: Kernel) -> Execute:
    """cvta: between an address within a space and a generic one, which lies in that space's window."""
    space = next((m.partition("::")[0] for m in instruction.modifiers if m != "to" and m[0] not in "u"), "")
    window = np.uint64(WINDOWS.get(space, 0))
    into_space = "to" in instruction.modifiers
    read, put = source(kernel, instruction.operands[1], "u64"), write(kernel, instruction.operands[0], "u64")
    return lambda wave, active: put(wave, active, read(wave) - window if into_space else read(wave) + window)


_ROUND: dict[str, Callable[[Any], Any]] = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}


def _convert(instruction: Instruction, kernel: Kernel) -> Execute:
    """cvt: floats round to nearest even, floats to integers as the suffix says and saturate, NaN becomes 0."""
    to, origin = instruction.modifiers[-2:]
    modes = set(instruction.modifiers[:-2])
    if modes - {"rn", "rna", "ftz", *_ROUND} or ("sat" in modes):
        raise _unsupported(instruction)
    put = write(kernel, instruction.operands[0], to if to != "tf32" else "b32")
    if to in ("bf16x2", "f16x2"):
        high, low = (source(kernel, operand, "f32") for operand in instruction.operands[1:3])
        narrow = float32_to_bfloat16 if to == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)

        def pack(wave: Wave, active: Active) -> None:
            upper, lower = (np.broadcast_to(narrow(np.asarray(x(wave))), wave.lanes) for x in (high, low))
            put(wave, active, upper.astype(np.uint32) << np.uint32(16) | lower)

        return pack
    read = source(kernel, instruction.operands[1], origin)
    change = _conversion(to, origin, modes, instruction)
    return lambda wave, active: put(wave, active, change(np.asarray(read(wave))))


def _conversion(to: str, origin: str, modes: set[str], instruction: Instruction) -> Callable[[Lanes], Lanes]:
    if to == "tf32":
        return lambda x: round_to_tf32(x.view(np.uint32))
    if to == "bf16":
        if origin != "f32":
            raise _unsupported(instruction)
        return float32_to_bfloat16
    dtype = numpy_type(to)
    if origin == "bf16":
        return lambda x: bfloat16_to_float32(x).astype(dtype)
    if origin[0] == "f" and to[0] in "su":
        rounding = next((_ROUND[mode] for mode in modes if mode in _ROUND), None)
        if rounding is None:
            raise _unsupported(instruction)
        limits = np.iinfo(dtype)
        chosen = rounding

        def to_integer(x: Lanes) -> Lanes:
            whole = chosen(np.nan_to_num(x.astype(np.longdouble), nan=0.0, posinf=np.inf, neginf=-np.inf))
            inside = np.clip(whole, limits.min, limits.max)
            return np.where(whole >= limits.max, dtype.type(limits.max), inside.astype(dtype))

        return to_integer
    if "rzi" in modes or "rni" in modes or "rmi" in modes or "rpi" in modes:
        rounding = next(_ROUND[mode] for mode in modes if mode in _ROUND)
        return lambda x: rounding(x).astype(dtype)
    return lambda x: x.astype(dtype)


def _bit_field_extract(instruction: Instruction, kernel: Kernel) -> Execute:
    ptx_type = instruction.type
    value = source(kernel, instruction.operands[1], ptx_type)
    start, length = (source(kernel, operand, "u32") for operand in instruction.operands[2:4])
    put = write(kernel, instruction.operands[0], ptx_type)
    bits, dtype = bits_of(ptx_type), numpy_type(ptx_type)

    def run(wave: Wave, active: Active) -> None:
        at, count = np.minimum(start(wave) & 255, bits), np.minimum(length(wave) & 255, bits)
        word = np.broadcast_to(np.asarray(value(wave)), wave.lanes)
        wide = word.view(UNSIGNED[bits]).astype(object) if bits == 64 else word.view(UNSIGNED[bits]).astype(np.int64)
        field = (wide >> at.astype(np.int64)) & ((1 << count.astype(np.int64)) - 1)
        if dtype.kind == "i":
            sign = np.minimum(at.astype(np.int64) + np.maximum(count.astype(np.int64), 1) - 1, bits - 1)
            negative = ((wide >> sign) & 1).astype(bool) & (count > 0)
            field = np.where(negative, field | (-1 << (sign - at.astype(np.int64) + 1)), field)
        put(wave, active, field.astype(dtype))

    return run


def _lookup(instruction: Instruction, kernel: Kernel) -> Execute:
    """lop3: any function of three bits, given as its truth table."""
    a, b, c = (source(kernel, operand, "b32") for operand in instruction.operands[1:4])
    table = int(str(instruction.operands[4]), 0)
    put = write(kernel, instruction.operands[0], "b32")

    def run(wave: Wave, active: Active) -> None:
        x, y, z = (np.broadcast_to(np.asarray(read(wave)), wave.lanes) for read in (a, b, c))
        result = np.zeros(wave.lanes, np.uint32)
        for entry in range(8):
            if table >> entry & 1:
                result |= (x if entry & 4 else ~x) & (y if entry & 2 else ~y) & (z if entry & 1 else ~z)
        put(wave, active, result)

    return run


def _permute(instruction: Instruction, kernel: Kernel) -> Execute:
    """prmt: four bytes chosen from the eight of two words; bit 3 of a choice repeats the byte's sign."""
    if instruction.modifiers != ("b32",):
        raise _unsupported(instruction)
    a, b, choice = (source(kernel, operand, "b32") for operand in instruction.operands[1:4])
    put = write(kernel, instruction.operands[0], "b32")

    def run(wave: Wave, active: Active) -> None:
        words = [np.broadcast_to(np.asarray(read(wave)), wave.lanes).astype(np.uint64) for read in (a, b, choice)]
        both, result = words[0] | words[1] << np.uint64(32), np.zeros(wave.lanes, np.uint32)
        for place in range(4):
            pick = (words[2] >> np.uint64(4 * place)) & np.uint64(15)
            byte = (both >> ((pick & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            signs = np.where(byte >= 128, np.uint64(255), np.uint64(0))
            byte = np.where(pick >= 8, signs, byte)
            result |= (byte << np.uint64(8 * place)).astype(np.uint32)
        put(wave, active, result)

    return run


def _count_bits(function: Callable[..., Any]) -> Decoder:
    def decode(instruction: Instruction, kernel: Kernel) -> Execute:
        read, put = (
            source(kernel, instruction.operands[1], instruction.type),
            write(kernel, instruction.operands[0], "u32"),
        )
        return lambda wave, active: put(wave, active, np.asarray(function(read(wave))).astype(np.uint32))

    return decode


def _nothing(instruction: Instruction, kernel: Kernel) -> Execute:
    """Fences and prefetches: memory is sequentially consistent here."""
    return lambda wave, active: None


DECODERS: dict[str, Decoder] = {
    "add": _elementwise(np.add, 2),
    "sub": _elementwise(np.subtract, 2),
    "and": _elementwise(np.bitwise_and, 2),
    "or": _elementwise(np.bitwise_or, 2),
    "xor": _elementwise(np.bitwise_xor, 2),
    "max": _elementwise(_maximum, 2),
    "min": _elementwise(_minimum, 2),
    "div": _elementwise(_divide, 2),
    "rem": _elementwise(_remainder, 2),
    "fma": _elementwise(_fused, 3),
    "neg": _elementwise(np.negative, 1),
    "abs": _elementwise(np.abs, 1),
    "not": _elementwise(np.invert, 1),
    "ex2": _elementwise(np.exp2, 1),
    "lg2": _elementwise(np.log2, 1),
    "rcp": _elementwise(np.reciprocal, 1),
    "sqrt": _elementwise(np.sqrt, 1),
    "rsqrt": _elementwise(lambda x: 1 / np.sqrt(x), 1),
    "tanh": _elementwise(np.tanh, 1),
    "sin": _elementwise(np.sin, 1),
    "cos": _elementwise(np.cos, 1),
    "copysign": _elementwise(lambda sign, x: np.copysign(x, sign), 2),
    "shl": _shift,
    "shr": _shift,
    "mul": _multiply,
    "mad": _multiply,
    "setp": _set_predicate,
    "selp": _select,
    "mov": _move,
    "cvta": _convert_address,
    "cvt": _convert,
    "bfe": _bit_field_extract,
    "lop3": _lookup,
    "prmt": _permute,
    "popc": _count_bits(_population),
    "clz": _count_bits(_leading_zeros),
    "membar": _nothing,
    "prefetch": _nothing,
}
