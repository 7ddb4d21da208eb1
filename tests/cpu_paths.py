"""The instruction sets of the CPU kernels: which of them this machine runs, and how a test takes one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from m3kernels import _library

ISAS = ("portable", "avx2", "avx512", "avx512vnni", "amx")


@contextmanager
def on_path(isa: str) -> Iterator[None]:
    """Within it, the CPU kernels use this instruction set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("M3_CPU_ISA", isa)
        yield


def why_missing(isa: str) -> str:
    """Why the kernels do not run on this instruction set here; empty where they do."""
    kernel = _library.cpu_kernel("cpu_isa")
    if kernel is None:
        return "the compiled CPU kernels are missing"
    with on_path(isa):
        try:
            assert kernel() == isa
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return ""


HERE = tuple(isa for isa in ISAS if not why_missing(isa))
