"""Encoding with M3Model: `python -m pytest benchmarks/bench_encode.py`.

benchmarks/results/encode.csv comes from `python -m benchmarks.report_encode`, which interleaves the peers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import encode_cases, sparse_texts

pytestmark = pytest.mark.skipif(
    not sparse_texts.available(), reason="no ../shared/data: real lengths are measured only"
)


@pytest.mark.parametrize("kind", ["queries", "paragraphs", "documents", "mixed"])
@pytest.mark.parametrize(("name", "layers"), [("bge-m3", 2), ("embedded", 12)])
def test_encode(benchmark: Callable[..., Any], name: str, layers: int, kind: str) -> None:
    from m3model import M3Model

    folder = encode_cases.model_folder(name, encode_cases.shape_of(name, layers))
    model = M3Model.from_pretrained(folder)
    texts = encode_cases.texts(kind, 1500, folder)
    benchmark(lambda: model.encode(texts))
