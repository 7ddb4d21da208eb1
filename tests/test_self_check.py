"""What `m3 doctor` knows of a library: its GPU architectures; and that it checks every op."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from m3kernels import build_info
from m3kernels.fatbin import cuda_architectures
from m3kernels.self_check import self_check


def fat_binary(entries: list[tuple[int, int]]) -> bytes:
    parts = [
        struct.pack("<HHIQIIHHI", kind, 0x101, 64, 40, 0, 0, 0, 8, arch) + bytes(28 + 40) for kind, arch in entries
    ]
    body = b"".join(part.ljust(104, b"\0") for part in parts)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_architectures_are_read_out_of_all_fat_binaries(tmp_path: Path) -> None:
    path = tmp_path / "library.so"
    path.write_bytes(b"\x7fELF" * 9 + fat_binary([(2, 80), (2, 90)]) + b"other" + fat_binary([(2, 100), (1, 100)]))
    assert cuda_architectures(path) == ("compute_100", "sm_80", "sm_90", "sm_100")


@pytest.mark.parametrize("content", [b"", b"\x7fELF", struct.pack("<I", 0xBA55ED50), fat_binary([(2, 80)])[:30]])
def test_a_file_without_whole_fat_binaries_has_no_architectures(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "library.so").write_bytes(content)
    assert cuda_architectures(tmp_path / "library.so") == ()


def test_the_built_cuda_library_holds_code_for_its_architectures() -> None:
    build = build_info()
    if build.cuda_library is None:
        pytest.skip("the CUDA library was not built here")
    assert build.cuda_architectures and build.cuda_architectures[0].startswith("compute_")


def test_every_op_is_checked_and_right() -> None:
    checks = self_check(("cpu",))
    assert all(check.passed for check in checks), checks
    ops = {name.removeprefix("m3::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("m3::")}
    stems = {name.removesuffix("_backward").removesuffix("_forward").removesuffix("_varlen") for name in ops}
    assert stems <= {check.op.removesuffix("_varlen") for check in checks}
