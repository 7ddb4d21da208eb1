"""Passages that lie in a memory-mapped file and are larger than memory should be: scored window by window.

The kernels read passages where they are, so a mapped file (torch.from_file, numpy.memmap) needs no copy; but every page
that was read stays resident as long as memory allows. So a mapping of more than WINDOW_BYTES is scored in windows, and
each window's pages leave the process when it is done: they remain in the system's page cache, nothing is lost.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

WINDOW_BYTES = 256 << 20
# From <sys/mman.h>. DONTNEED drops a shared mapping's pages from the process only; a private mapping may have changed
# pages that exist nowhere else, which PAGEOUT keeps.
_MADV_DONTNEED, _MADV_PAGEOUT = 4, 21


def windows(rows: Tensor, offsets: Tensor) -> Iterator[tuple[int, int]]:
    """Runs of passages [first, last) to score one after another; what a run has touched of a mapped file is released
    when the next one is asked for. One run with everything where `rows` is no large mapping of a file."""
    count = offsets.shape[0] - 1
    advice = _release_advice(rows)
    if advice is None:
        yield 0, count
        return
    row_bytes = rows.stride(0) * rows.element_size()
    bounds = offsets.numpy()
    first = 0
    while first < count:
        last = max(first + 1, int(bounds.searchsorted(bounds[first] + WINDOW_BYTES // row_bytes, side="right")) - 1)
        yield first, last
        _release(
            rows.data_ptr() + int(bounds[first]) * row_bytes, rows.data_ptr() + int(bounds[last]) * row_bytes, advice
        )
        first = last


def _release_advice(rows: Tensor) -> int | None:
    """How to release pages of `rows`: None unless they are more than a window of a mapped file."""
    if sys.platform != "linux" or not rows.is_contiguous() or rows.nbytes <= WINDOW_BYTES:
        return None
    address = rows.data_ptr()
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, permissions, _, _, inode, *_ = line.split()
            begin, end = (int(x, 16) for x in span.split("-"))
            if begin <= address < end:
                if inode == "0":
                    return None
                return _MADV_DONTNEED if permissions[3] == "s" else _MADV_PAGEOUT
    return None


def _release(begin: int, end: int, advice: int) -> None:
    """Release the pages that lie wholly within [begin, end); a system that does not know the advice keeps them."""
    begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    end = end // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)


def shifted_offsets(offsets: Tensor, first: int, last: int) -> Tensor:
    """Offsets of passages [first, last), starting at 0."""
    part = offsets[first : last + 1]
    return part - part[0] if first else part


def window_rows(rows: Tensor, offsets: Tensor, first: int, last: int) -> Tensor:
    """Rows of passages [first, last), without a copy."""
    return rows[int(offsets[first]) : int(offsets[last])]


def window_floor(zero_floor: Tensor | None, first: int, last: int) -> Tensor | None:
    """Entries of `zero_floor` for passages [first, last)."""
    return None if zero_floor is None else zero_floor[first:last]


def join(scores: list[Tensor]) -> Tensor:
    """Scores [Nq, Np] of consecutive windows."""
    return scores[0] if len(scores) == 1 else torch.cat(scores, dim=1)
