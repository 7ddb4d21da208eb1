"""Which GPU architectures a library holds code for, read out of the file, without CUDA and without loading it.

nvcc puts fat binaries into the library, little endian:

    container   u32 magic 0xBA55ED50, u16 version, u16 header bytes, u64 bytes of the entries behind the header
    entry       u16 kind (1 PTX, 2 machine code), u16, u32 header bytes, u64 bytes, 2 × u32, 2 × u16, u32 architecture …
"""

from __future__ import annotations

import struct
from pathlib import Path

__all__ = ["cuda_architectures"]

_MAGIC = struct.pack("<I", 0xBA55ED50)
_CONTAINER = struct.Struct("<IHHQ")
_ENTRY = struct.Struct("<HHIQIIHHI")
_PREFIX = {1: "compute", 2: "sm"}


def cuda_architectures(library: Path) -> tuple[str, ...]:
    """Names such as sm_80 (machine code) and compute_100 (PTX, for later cards), sorted; empty if there are none."""
    data = library.read_bytes()
    found: set[tuple[int, int]] = set()
    at = data.find(_MAGIC)
    while at >= 0 and at + _CONTAINER.size <= len(data):
        _, _, header, size = _CONTAINER.unpack_from(data, at)
        entry, end = at + header, at + header + size
        while entry + _ENTRY.size <= min(end, len(data)):
            kind, _, entry_header, entry_size, *_, architecture = _ENTRY.unpack_from(data, entry)
            if kind not in _PREFIX or not entry_header:
                break
            found.add((architecture, kind))
            entry += entry_header + entry_size
        at = data.find(_MAGIC, at + 4)
    return tuple(f"{_PREFIX[kind]}_{architecture}" for architecture, kind in sorted(found, key=lambda one: one[::-1]))
