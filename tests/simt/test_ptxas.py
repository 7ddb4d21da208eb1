"""What ptxas says of every kernel, from the logs that setup.py keeps: no spills on any of the GPUs built for."""

from __future__ import annotations

import re

import pytest

from m3kernels import _library
from tests.simt.emulated import ROOT

LOGS = sorted((ROOT / "build" / "nvcc").glob("*.cu.o.log"))
ENTRY = re.compile(
    r"Compiling entry function '(\S+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads",
    re.DOTALL,
)

pytestmark = pytest.mark.skipif(
    _library.CUDA_LIBRARY is None or not LOGS, reason="no ptxas logs in build/nvcc: built without nvcc or elsewhere"
)


@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_kernels_compile_for_every_architecture_without_spills(source: object) -> None:
    log = ROOT / "build" / "nvcc" / f"{source.name}.o.log"  # type: ignore[attr-defined]
    entries = ENTRY.findall(log.read_text())
    architectures = {architecture for _, architecture, *_ in entries}
    assert {"sm_80", "sm_90", "sm_100"} <= architectures
    spilling = [entry for entry in entries if entry[2:] != ("0", "0", "0")]
    assert not spilling
    kernels = {name for name, *_ in entries}
    assert len(entries) == len(kernels) * len(architectures)
