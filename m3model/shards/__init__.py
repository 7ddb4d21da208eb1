"""Encoding of collections larger than memory into files, and reading them."""

from m3model.shards.reading import EncodedShards
from m3model.shards.writing import ShardReport, encode_shards

__all__ = ["EncodedShards", "ShardReport", "encode_shards"]
