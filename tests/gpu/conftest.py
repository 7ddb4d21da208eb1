"""The tests of this folder need an NVIDIA GPU; in a dry run they take the interpreter instead."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.cases import DRY_RUN

if DRY_RUN:
    from benchmarks import gpu_dry_run

    gpu_dry_run.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu" not in item.path.as_posix():
            continue
        item.add_marker(pytest.mark.gpu)
        if DRY_RUN:
            if item.get_closest_marker("device"):
                item.add_marker(pytest.mark.skip(reason="dry run: needs a real device"))
        elif not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
