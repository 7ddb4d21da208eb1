"""What the simulator raises."""

from __future__ import annotations


class Fault(RuntimeError):
    """The program did what is undefined or an error on a GPU: a bad address, a race, a divergent barrier, ..."""


class PtxError(ValueError):
    """Text that is not PTX as nvcc and Triton write it."""
