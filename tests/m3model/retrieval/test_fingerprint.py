"""Fingerprints tell models apart and bear rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import change_config, write_folder
from random_texts import random_texts

from m3model import M3Model
from m3model.retrieval import ExactIndex, fingerprint, same_model


def test_a_model_keeps_its_fingerprint_in_every_dtype(model: M3Model, folder: Path) -> None:
    mark = fingerprint(model)
    assert fingerprint(model) == mark
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert same_model(mark, fingerprint(M3Model.from_pretrained(folder, dtype=dtype))), dtype


@pytest.mark.parametrize("change", ["encoder", "sparse_linear", "colbert_linear", "pooling", "width"])
def test_another_model_has_another_fingerprint(model: M3Model, folder: Path, tmp_path: Path, change: str) -> None:
    if change == "pooling":
        other_folder = write_folder(tmp_path / "other", section={"multi_vector_dim": 64, "pooling": "mean"})
        change_config(other_folder, m3={"pooling": "mean"})
        (other_folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        other = M3Model.from_pretrained(other_folder)
    elif change == "width":
        other = M3Model.from_pretrained(write_folder(tmp_path / "other", hidden=32))
    else:
        other = M3Model.from_pretrained(folder)
        with torch.no_grad():
            if change == "encoder":
                other.backbone.encoder.layer[0].output.dense.weight.mul_(1.5)
            else:
                weight = getattr(other, change).weight
                weight.add_(0.3 * weight.std() * torch.randn_like(weight))
    assert not same_model(fingerprint(model), fingerprint(other))


def test_an_index_refuses_another_model(model: M3Model, tmp_path: Path) -> None:
    mark = fingerprint(model)
    index = ExactIndex(mark, {"model": "models/first"})
    index.add(["a"], random_texts(1, 0))
    index.check_model(mark)
    with pytest.raises(ValueError, match=r"not the one that made the index .*models/first"):
        index.check_model(fingerprint(M3Model.from_pretrained(write_folder(tmp_path / "other", seed=4))))
