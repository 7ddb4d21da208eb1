"""The M3-Embedding model, its trainer, retrieval and evaluation, built on m3kernels."""

from m3model.config import M3Config
from m3model.embeddings import EncodedTexts, M3Embeddings, MultiVectors
from m3model.model import M3Model

__all__ = ["EncodedTexts", "M3Config", "M3Embeddings", "M3Model", "MultiVectors"]
