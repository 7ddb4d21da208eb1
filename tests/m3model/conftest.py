"""Model folders shared by the tests of a session."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import write_folder

from m3model import M3Model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An XLM-RoBERTa folder that tests read and do not change."""
    return write_folder(tmp_path_factory.mktemp("tiny") / "m3")


@pytest.fixture(scope="session")
def model(folder: Path) -> M3Model:
    return M3Model.from_pretrained(folder)
