from __future__ import annotations

import pytest

from tests.cpu_paths import why_missing


@pytest.fixture(params=["portable", "avx2", "avx512", "amx"])
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that the CPU kernels are compiled for, forced; skipped where the machine lacks it."""
    isa: str = request.param
    if reason := why_missing(isa):
        pytest.skip(f"this machine lacks {isa}: {reason}")
    monkeypatch.setenv("M3_CPU_ISA", isa)
    return isa
