"""Indexes over M3Embeddings and their search."""

from m3model.retrieval.exact import ExactIndex
from m3model.retrieval.fingerprint import fingerprint, same_model
from m3model.retrieval.interface import HEADS, Head, Hit, Ranking, SearchIndex

__all__ = ["HEADS", "ExactIndex", "Head", "Hit", "Ranking", "SearchIndex", "fingerprint", "same_model"]
