from __future__ import annotations

import pytest

from m3kernels import _library


@pytest.fixture(params=["portable", "avx2", "avx512", "amx"])
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that the CPU kernels are compiled for, forced; skipped where the machine lacks it."""
    kernel = _library.cpu_kernel("cpu_isa")
    assert kernel is not None
    isa: str = request.param
    monkeypatch.setenv("M3_CPU_ISA", isa)
    try:
        assert kernel() == isa
    except RuntimeError:
        pytest.skip(f"this machine has no {isa}")
    return isa
