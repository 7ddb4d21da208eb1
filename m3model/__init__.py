"""The M3-Embedding model, its trainer, retrieval and evaluation, built on m3kernels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from m3model.config import M3Config
    from m3model.embeddings import EncodedTexts, M3Embeddings, MultiVectors
    from m3model.model import M3Model

__all__ = ["EncodedTexts", "M3Config", "M3Embeddings", "M3Model", "MultiVectors"]

_HOME = {
    "EncodedTexts": "embeddings",
    "M3Config": "config",
    "M3Embeddings": "embeddings",
    "M3Model": "model",
    "MultiVectors": "embeddings",
}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used, so that `m3 --help` does not wait for torch."""
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"m3model.{_HOME[name]}"), name)
        globals()[name] = value
        return value
