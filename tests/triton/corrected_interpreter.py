"""Triton's interpreter (TRITON_INTERPRET=1), corrected where 3.7.1 computes bfloat16 wrongly.

The interpreter keeps bfloat16 as uint16 and silently multiplies those integers in tl.dot and in arithmetic, and it
rounds float32 to bfloat16 towards zero. It also multiplies float32 exactly where tf32 is asked for. After `install()`
tl.dot widens its inputs, or cuts them to tf32 as tensor cores do, casts go through torch (nearest even), and any other
arithmetic on bfloat16 raises, because kernels are meant to convert to float32 first.
It also calls device functions without patching the language anew each time, which took most of a test's time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

TORCH_DTYPES = {
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
BITS = {16: (np.int16, torch.int16), 32: (np.int32, torch.int32), 64: (np.int64, torch.int64)}


@functools.cache
def install() -> None:
    """Correct the interpreter of this process, once."""
    builder = interpreter.InterpreterBuilder
    interpreter._convert_float = functools.partial(_convert_float, interpreter._convert_float)
    builder.create_dot = _widening_dot(builder.create_dot)
    builder.cast_impl = _widening_cast(builder.cast_impl)
    for name in ("binary_op", "unary_op", "ternary_op"):
        setattr(builder, name, _refuse_bfloat16(getattr(builder, name)))
    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        operation.apply_impl = _refuse_bfloat16_reduction(operation.apply_impl)
    interpreter.InterpretedFunction.__call__ = _call_device_function


def _convert_float(original: Callable[..., Any], data: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source not in TORCH_DTYPES or target not in TORCH_DTYPES:
        return original(data, source, target, rounding)
    signed = BITS[source.primitive_bitwidth][0]
    values = torch.from_numpy(np.ascontiguousarray(data).view(signed).copy()).view(TORCH_DTYPES[source])
    width = target.primitive_bitwidth
    bits = values.to(TORCH_DTYPES[target]).view(BITS[width][1]).numpy()
    return bits.view(f"uint{width}").reshape(np.shape(data))


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    if not _is_bfloat16(handle):
        return handle
    bits = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None)
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _widening_dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, sums: Any, precision: Any, *options: Any) -> Any:
        a, b = _widen(a), _widen(b)
        if precision == ir.INPUT_PRECISION.TF32:
            a, b = _cut_to_tf32(a), _cut_to_tf32(b)
        return original(self, a, b, sums, precision, *options)

    return create_dot


def _cut_to_tf32(handle: Any) -> Any:
    """A float32 operand without the 13 low bits of its fraction, which mma.sync leaves out."""
    if handle.dtype.scalar != tl.float32:
        return handle
    bits = np.ascontiguousarray(handle.data).view(np.uint32) & np.uint32(0xFFFFE000)
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _widening_cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if _is_bfloat16(source) and target.scalar != tl.bfloat16:
            wide = _widen(source)
            return wide if target.scalar == tl.float32 else original(self, wide, target)
        if target.scalar == tl.bfloat16 and source.dtype.scalar not in (tl.bfloat16, tl.float32):
            source = original(self, source, tl.float32)
        return original(self, source, target)

    return cast_impl


def _refuse_bfloat16(original: Callable[..., Any]) -> Callable[..., Any]:
    def operation(self: Any, *arguments: Any) -> Any:
        if any(_is_bfloat16(argument) for argument in arguments):
            raise TypeError("arithmetic on bfloat16; convert to float32 first")
        return original(self, *arguments)

    return operation


def _refuse_bfloat16_reduction(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_impl(self: Any, inputs: Any) -> Any:
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        if any(tensor.dtype.scalar == tl.bfloat16 for tensor in tensors):
            raise TypeError("reduction or scan of bfloat16; convert to float32 first")
        return original(self, inputs)

    return apply_impl


_patched_for_good: set[int] = set()


def _call_device_function(self: Any, *arguments: Any, **options: Any) -> Any:
    """A launch patches triton.language for its duration; a device function's module may see triton.language.core."""
    modules = {id(module) for module in self.fn.__globals__.values() if module is tl.core}
    if not modules <= _patched_for_good:
        interpreter._patch_lang(self.fn)  # the interpreter never takes this one back
        _patched_for_good.update(modules)
    try:
        return self.rewrite()(*arguments, **options)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error
