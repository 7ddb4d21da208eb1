"""Memory checks for Triton kernels under the interpreter; install after corrected_interpreter.

`install()` makes every launch raise MemoryFault for
  - a load, store or atomic outside every tensor argument (the plain interpreter reads raw memory or dies),
  - two programs storing to one element, or one loading what another stores, without atomics: a GPU orders neither,
and fills masked-off lanes of loads that name no `other` with NaN or garbage, which on a GPU they are; the plain
interpreter gives 0 there. tl.device_assert is switched on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from triton.runtime import interpreter


class MemoryFault(RuntimeError):
    """A kernel touched memory in a way that is undefined on a GPU."""


class Launch:
    """Byte extents of the tensors of one launch, and for each byte which programs read, wrote or updated it."""

    NOBODY, SEVERAL = 0, -1

    def __init__(self, kernel: str, extents: list[tuple[int, int]]) -> None:
        self.kernel = kernel
        # Tensors may overlap (views of one storage): one merged extent serves them all.
        merged: list[tuple[int, int]] = []
        for start, end in sorted(extents):
            if merged and start < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], end))
            else:
                merged.append((start, end))
        self.starts = np.array([start for start, _ in merged], np.int64)
        self.ends = np.array([end for _, end in merged], np.int64)
        sizes = self.ends - self.starts
        self.places = np.cumsum(sizes) - sizes
        self.programs = {kind: np.zeros(int(sizes.sum()), np.int32) for kind in ("load", "store", "atomic")}

    def touch(self, kind: str, pointers: Any, mask: Any, size: int) -> None:
        """Check and record one access by the program that runs."""
        addresses = np.asarray(pointers)[np.broadcast_to(mask, np.shape(pointers)).astype(bool)].astype(np.int64)
        if not addresses.size:
            return
        program = interpreter.interpreter_builder.grid_idx
        extent = np.searchsorted(self.starts, addresses, side="right") - 1
        inside = (extent >= 0) & (addresses + size <= self.ends[extent])
        if not inside.all():
            raise MemoryFault(
                f"{self.kernel}: {kind} out of bounds in program {program},"
                f" {np.count_nonzero(~inside)} of {inside.size} lanes, first lane {np.flatnonzero(~inside)[0]}"
            )
        places = addresses - self.starts[extent] + self.places[extent]
        x_count, y_count, _ = interpreter.interpreter_builder.grid_dim
        x, y, z = program
        number = 1 + x + x_count * (y + y_count * z)
        for other, others in self.programs.items():
            if "store" not in (kind, other):
                continue
            met = others[places]
            if ((met != self.NOBODY) & (met != number)).any():
                raise MemoryFault(f"{self.kernel}: a {kind} of program {program} meets a {other} of another program")
        met = self.programs[kind][places]
        self.programs[kind][places] = np.where((met == self.NOBODY) | (met == number), number, self.SEVERAL)


_launch: Launch | None = None


@functools.cache
def install() -> None:
    """Check every launch of this process from now on."""
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    executor._init_args_hst = _recording_arguments(executor._init_args_hst)
    executor.__call__ = _checked_call(executor.__call__)
    builder.create_masked_load = _checked_load(builder.create_masked_load)
    builder.create_masked_store = _checked_store(builder.create_masked_store)
    builder.create_atomic_rmw = _checked_atomic(builder.create_atomic_rmw)


def _tensors(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "data_ptr"):
        yield interpreter._unwrap_tensor(value)


def _recording_arguments(original: Callable[..., Any]) -> Callable[..., Any]:
    def init_args(self: Any, arguments: Any, options: Any) -> Any:
        global _launch
        on_host, host_options = original(self, arguments, options)
        extents = []
        for tensor in _tensors([*on_host, *host_options.values()]):
            if tensor.numel():
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
                extents.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))
        _launch = Launch(getattr(self.fn, "__name__", "kernel"), extents)
        return on_host, host_options

    return init_args


def _checked_call(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        global _launch
        interpreter.interpreter_builder.options.__dict__["debug"] = True
        try:
            return original(self, *arguments, **options)
        finally:
            _launch = None

    return call


def _element_size(pointers: Any) -> int:
    return int(interpreter._get_np_dtype(pointers.get_element_ty()).itemsize)


def _touch(kind: str, pointers: Any, mask: Any) -> None:
    if _launch is not None:
        _launch.touch(kind, pointers.data, mask.data, _element_size(pointers))


def _poison(pointers: Any) -> Any:
    dtype = interpreter._get_np_dtype(pointers.get_element_ty())
    if dtype.kind == "f":
        value: Any = np.nan
    elif dtype == np.uint16:  # bfloat16 is kept so; these bits are a NaN
        value = 0x7FFF
    else:
        value = np.iinfo(dtype).max // 3 if dtype.kind in "iu" else True
    return interpreter.TensorHandle(np.full(np.shape(pointers.data), value, dtype), pointers.get_element_ty())


def _checked_load(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_masked_load(self: Any, pointers: Any, mask: Any, other: Any, *options: Any) -> Any:
        _touch("load", pointers, mask)
        return original(self, pointers, mask, _poison(pointers) if other is None else other, *options)

    return create_masked_load


def _checked_store(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> Any:
        _touch("store", pointers, mask)
        return original(self, pointers, value, mask, *options)

    return create_masked_store


def _checked_atomic(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_atomic_rmw(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> Any:
        _touch("atomic", pointers, mask)
        return original(self, operation, pointers, value, mask, *options)

    return create_atomic_rmw
