"""Kernels of M3-Embedding as torch ops: variable-length attention, MaxSim, and the sparse head with its scores.

Every op works on packed rows and offsets (see m3kernels.packing), forward and backward, on CPU and GPU, and has its
plain PyTorch meaning beside it in `m3kernels.<op>.reference`.
"""

from m3kernels._version import __version__
from m3kernels.attention import flash_attention, flash_attention_varlen, varlen_attn
from m3kernels.build_info import BuildInfo, build_info
from m3kernels.linear import PackedLinear, embed_tokens, layer_norm, linear, pack_linear
from m3kernels.maxsim import QuantizedRows, maxsim, maxsim_pairs, maxsim_topk, quantize_rows
from m3kernels.packing import offsets_from_lengths, pack, unpack
from m3kernels.sparse import SparseBatch, SparseIndex, sparse_embed, sparse_pool, sparse_scores

__all__ = [
    "BuildInfo",
    "PackedLinear",
    "QuantizedRows",
    "SparseBatch",
    "SparseIndex",
    "__version__",
    "build_info",
    "embed_tokens",
    "flash_attention",
    "flash_attention_varlen",
    "layer_norm",
    "linear",
    "maxsim",
    "maxsim_pairs",
    "maxsim_topk",
    "offsets_from_lengths",
    "pack",
    "pack_linear",
    "quantize_rows",
    "sparse_embed",
    "sparse_pool",
    "sparse_scores",
    "unpack",
    "varlen_attn",
]
