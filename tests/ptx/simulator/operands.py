"""Operands as functions of a wave: sources give values (an array over the lanes, or one number), targets take them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.simulator.faults import PtxError
from tests.ptx.simulator.formats import UNSIGNED, Lanes, bits_of, numpy_type
from tests.ptx.simulator.machine import Active, Wave
from tests.ptx.simulator.parser import Kernel, Operand

Source = Callable[[Wave], Any]
Target = Callable[[Wave], Lanes]
Write = Callable[[Wave, Active, Any], None]


def source(kernel: Kernel, operand: Operand, ptx_type: str) -> Source:
    """Values of a register, special register, number or symbol, seen as a PTX type; wider registers are cut off."""
    dtype = numpy_type(ptx_type)
    if isinstance(operand, tuple):
        raise PtxError(f"vector {operand} where one value is read")
    negated = operand.startswith("!")
    name = operand.lstrip("!")
    register = kernel.register(name)
    if register is None:
        value = constant(kernel, operand, dtype)
        if isinstance(value, str):
            return lambda wave: wave.special[value].astype(dtype, copy=False)
        return lambda wave: value
    slot = register.slot
    if dtype.kind == "b":
        return (lambda wave: ~wave.registers[slot]) if negated else (lambda wave: wave.registers[slot])
    if register.bits == 8 * dtype.itemsize:
        return lambda wave: wave.registers[slot].view(dtype)
    word = UNSIGNED[8 * dtype.itemsize]
    return lambda wave: wave.registers[slot].astype(word).view(dtype)


def constant(kernel: Kernel, operand: str, dtype: np.dtype[Any]) -> Any:
    """A number of this type, the address of a symbol, or the name of a special register."""
    if operand.startswith("%"):
        return operand
    if dtype.kind == "b":
        return np.bool_(int(operand))
    if match := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]+)", operand):
        word = np.array(int(match[1], 16), UNSIGNED[32 if operand[1] in "fF" else 64])
        number = word.view(np.float32 if operand[1] in "fF" else np.float64)
        return number.astype(dtype)[()] if dtype.kind == "f" else word.astype(dtype)[()]
    address = symbol_address(kernel, operand)
    if address is None:
        if dtype.kind == "f" and re.fullmatch(r"-?\d+\.\d*", operand):
            return dtype.type(float(operand))
        try:
            address = int(re.sub(r"[uU]$", "", operand), 0)
        except ValueError:
            raise PtxError(f"operand {operand!r}") from None
    bits = 8 * dtype.itemsize
    return np.array(address & ((1 << bits) - 1), UNSIGNED[bits]).view(dtype)[()]


def symbol_address(kernel: Kernel, name: str) -> int | None:
    """Where a variable or parameter lies within its space."""
    if name in kernel.dynamic_shared:
        return -(-kernel.shared_bytes // 16) * 16
    for space in (kernel.shared, kernel.local):
        if name in space:
            return space[name]
    for parameter in kernel.parameters:
        if parameter.name == name:
            return parameter.offset
    return None


def target(kernel: Kernel, operand: Operand, ptx_type: str) -> Target:
    """The register as an array to compute into (`out` of numpy's functions); it must be as wide as the type."""
    register = kernel.register(str(operand))
    dtype = numpy_type(ptx_type)
    if register is None or register.bits != (0 if dtype.kind == "b" else 8 * dtype.itemsize):
        raise PtxError(f"destination {operand} of type .{ptx_type}")
    slot = register.slot
    return lambda wave: wave.registers[slot].view(dtype)


def write(kernel: Kernel, operand: Operand, ptx_type: str) -> Write:
    """Puts values into the acting lanes of a register; narrower values are extended by their sign or zeros."""
    if operand == "_":
        return lambda wave, active, values: None
    register = kernel.register(str(operand))
    if register is None:
        raise PtxError(f"destination {operand}")
    slot, bits = register.slot, register.bits
    dtype = numpy_type(ptx_type)
    narrow = 8 * dtype.itemsize < bits
    wide = np.dtype(f"i{bits // 8}" if dtype.kind == "i" else f"u{bits // 8}") if narrow else dtype

    def put(wave: Wave, active: Active, values: Any) -> None:
        if narrow:
            values = np.asarray(values).view(dtype).astype(wide)
        np.copyto(wave.registers[slot].view(wide), values, where=active.where)

    return put


Address = Callable[[Wave, Active], Lanes]


def address(kernel: Kernel, operand: Operand) -> Address:
    """int64 addresses of the acting lanes for "[base + offset]"."""
    match = re.fullmatch(r"\[\s*([%\w$.@]+)\s*(?:\+\s*(-?\w+))?\s*\]", str(operand))
    if match is None:
        raise PtxError(f"address {operand}")
    offset = int(match[2], 0) if match[2] else 0
    register = kernel.register(match[1])
    if register is None:
        base = symbol_address(kernel, match[1])
        fixed = offset + (base if base is not None else int(match[1], 0))
        return lambda wave, active: np.full(active.count, fixed, np.int64)
    slot = register.slot

    def compute(wave: Wave, active: Active) -> Lanes:
        base = wave.registers[slot]
        return (base if active.full else base[active.numbers]).astype(np.int64) + offset

    return compute


def width(ptx_type: str) -> int:
    """Bytes of a type in memory."""
    return bits_of(ptx_type) // 8
