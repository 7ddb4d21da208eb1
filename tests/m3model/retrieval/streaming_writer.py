"""An encoder and indexes for the tests of ingest_stream; as a program, adds documents and prints their ids.

python streaming_writer.py ENGINE FOLDER
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embeddings import random_embeddings

from m3model import EncodedTexts
from m3model.retrieval import ExactIndex
from m3model.retrieval.milvus import MilvusIndex
from m3model.retrieval.streaming import ingest_stream


class Encoder:
    """Vectors that depend on the document alone; counts what it encoded."""

    def __init__(self) -> None:
        self.encoded: list[int] = []

    def __call__(self, contents: Sequence[Mapping[str, Any]]) -> EncodedTexts:
        self.encoded += [content["n"] for content in contents]
        parts = [random_embeddings(1, seed=content["n"] * 2 + content.get("version", 0)) for content in contents]
        return type(parts[0]).concatenate(parts)


def open_index(engine: str, folder: Path) -> tuple[ExactIndex | MilvusIndex, str | None]:
    if engine == "milvus":
        return MilvusIndex(folder / "index.db", width=32, row_width=16), None
    path = folder / "index"
    return ExactIndex.load(path) if path.exists() else ExactIndex(), str(path)


def documents(count: int, version: int = 0) -> list[tuple[str, dict[str, int]]]:
    return [(f"d{n}", {"n": n, "version": version}) for n in range(count)]


if __name__ == "__main__":
    engine, place = sys.argv[1:]
    index, path = open_index(engine, Path(place))
    stream = ((f"d{n}", {"n": n}) for n in itertools.count())
    for acknowledged in ingest_stream(index, stream, Encoder(), folder=path, block=8):
        print(*acknowledged, flush=True)
