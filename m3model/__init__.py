"""The M3-Embedding model, its trainer, retrieval and evaluation, built on m3kernels."""
