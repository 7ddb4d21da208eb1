"""The whole model on an NVIDIA GPU gives the embeddings that it gives on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.device
TEXTS = ["What is BGE M3?", "BM25 ranks documents by the terms of the query.", "", "tea " * 700]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_embeddings_equal_those_of_the_cpu(embedded_folder: Path, dtype: torch.dtype) -> None:
    from m3model import M3Model

    expected = M3Model.from_pretrained(str(embedded_folder)).encode(TEXTS)
    actual = M3Model.from_pretrained(str(embedded_folder), device="cuda", dtype=dtype).encode(TEXTS)
    allowed = 1e-4 if dtype == torch.float32 else 24 * torch.finfo(dtype).eps  # two roundings in each of twelve layers
    for ours, theirs in ((actual.dense, expected.dense), (actual.multi_vector.rows, expected.multi_vector.rows)):
        error = (torch.as_tensor(ours).cpu().float() - torch.as_tensor(theirs).float()).norm(dim=-1)
        assert float(error.max()) <= allowed, float(error.max())
