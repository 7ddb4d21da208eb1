"""Quantized models stay near the float32 model, come back from disk unchanged, and refuse what they cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from m3model import M3Model
from m3model.quantization import Quantization

KINDS: tuple[Quantization, ...] = ("int8", "bf16")
TEXTS = ["how do i compute the eigenvalue of a symmetric matrix", "river", "a bridge over the river north of the city"]
SENTENCES = [
    "BM25 ranks documents by the terms of the query.",
    "Die Hauptstadt von Norwegen ist Oslo.",
    "Как вычислить собственные значения матрицы?",
    "東京は日本の首都です。",
    "The quick brown fox jumps over the lazy dog, again and again, until the evening comes. " * 12,
    "¿Dónde está la biblioteca?",
]


@pytest.fixture
def fresh(folder: Path) -> M3Model:
    return M3Model.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_quantized_model_reloads_to_identical_outputs(
    fresh: M3Model, tmp_path: Path, kind: Quantization
) -> None:
    expected = fresh.quantize(kind).encode(TEXTS)
    fresh.save_pretrained(tmp_path / "q")
    again = M3Model.from_pretrained(tmp_path / "q")
    assert again.config.quantization == kind
    out = again.encode(TEXTS)
    assert np.array_equal(out.dense, expected.dense)
    assert torch.equal(out.sparse.weights, expected.sparse.weights)
    assert torch.equal(out.multi_vector.rows, expected.multi_vector.rows)
    again.save_pretrained(tmp_path / "r")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "qr")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_quantizing_at_load_is_quantizing_after_it(folder: Path, fresh: M3Model, kind: Quantization) -> None:
    at_load = M3Model.from_pretrained(folder, quantize=kind).encode(TEXTS)
    assert np.array_equal(at_load.dense, fresh.quantize(kind).encode(TEXTS).dense)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_vectors_of_the_embedded_backbone_keep_a_cosine_of_0_999(
    embedded_folder: Path, kind: Quantization
) -> None:
    model = M3Model.from_pretrained(embedded_folder)
    exact = model.encode(SENTENCES, sparse=False, multi_vector=False).dense
    near = model.quantize(kind).encode(SENTENCES, sparse=False, multi_vector=False).dense
    cosine = (exact * near).sum(1)
    assert cosine.min() >= 0.999, cosine


def test_int8_keeps_ndcg_across_languages(embedded_folder: Path) -> None:
    """All 1190 Chinese questions, all 240 Arabic paragraphs of XQuAD: dense vectors."""
    data = next((up / "shared/data" for up in Path(__file__).parents if (up / "shared/data").is_dir()), None)
    if data is None:
        pytest.skip("no ../shared/data beside the repository")

    def paragraphs(language: str) -> list[dict[str, Any]]:
        articles = json.loads((data / f"test/xquad/xquad.{language}.json").read_text())["data"]
        return [paragraph for article in articles for paragraph in article["paragraphs"]]

    pairs = [(part["question"], number) for number, whole in enumerate(paragraphs("zh")) for part in whole["qas"]]
    asked, relevant = map(list, zip(*pairs))
    passages = [paragraph["context"] for paragraph in paragraphs("ar")]
    model = M3Model.from_pretrained(embedded_folder)

    def ndcg() -> float:
        dense: dict[str, Any] = {"sparse": False, "multi_vector": False}
        scores = model.encode(asked, role="query", **dense).dense @ model.encode(passages, **dense).dense.T
        rank = 1 + (scores > scores[range(len(relevant)), relevant][:, None]).sum(1)
        return float(np.where(rank <= 10, 1 / np.log2(1 + rank), 0).mean())

    exact = ndcg()
    model.quantize("int8")
    assert 0.6 < exact < 1 and abs(ndcg() - exact) <= 0.005


def test_weights_take_a_quarter_and_half_of_the_memory(folder: Path) -> None:
    def file_bytes(model: M3Model) -> int:
        state = model.backbone.encoder.state_dict()
        return sum(tensor.nbytes for name, tensor in state.items() if name.endswith(("dense.weight", "query.weight")))

    exact = file_bytes(M3Model.from_pretrained(folder))
    assert file_bytes(M3Model.from_pretrained(folder, quantize="int8")) * 4 == exact
    assert file_bytes(M3Model.from_pretrained(folder, quantize="bf16")) * 2 == exact


def test_gradients_reach_the_heads_and_embeddings_of_a_quantized_model(fresh: M3Model) -> None:
    fresh.quantize("int8")
    out = fresh(*fresh.tokenize(TEXTS))
    out.multi_vector.rows.square().sum().backward()
    assert fresh.colbert_linear.bias.grad is not None
    fresh.zero_grad()
    fresh(*fresh.tokenize(TEXTS)).dense[:, 0].sum().backward()
    words = fresh.backbone.embeddings.word_embeddings.weight
    assert words.grad is not None and float(words.grad.abs().sum()) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_quantized_model_in_half_precision(
    folder: Path, tmp_path: Path, dtype: torch.dtype, kind: Quantization
) -> None:
    half = M3Model.from_pretrained(folder, dtype, quantize=kind)
    expected = half.encode(TEXTS).dense
    exact = M3Model.from_pretrained(folder).encode(TEXTS).dense
    # Rows of 64 random weights: 8 bits on both sides of every product leave 0.9989 in float32 too.
    least = 0.998 if kind == "int8" else 0.999
    assert ((expected * exact).sum(1) > least).all()
    half.save_pretrained(tmp_path / "q")
    assert np.array_equal(M3Model.from_pretrained(tmp_path / "q", dtype).encode(TEXTS).dense, expected)
    converted = M3Model.from_pretrained(folder, quantize=kind).to(dtype)
    assert {tensor.dtype for tensor in converted.parameters()} == {dtype}
    assert ((converted.encode(TEXTS).dense * exact).sum(1) > least).all()
    storage = {tensor.dtype for name, tensor in converted.named_buffers() if name.endswith("panels")}
    assert storage == {torch.int8 if kind == "int8" else torch.bfloat16}


@pytest.mark.parametrize("model_type", ["xlm-roberta", "bert"])
def test_transformers_refuses_codes_instead_of_taking_them_for_weights(tmp_path: Path, model_type: str) -> None:
    M3Model.from_pretrained(write_folder(tmp_path / "m", model_type)).quantize("int8").save_pretrained(tmp_path / "q")
    with pytest.raises(Exception, match=r"mismatch|size|shape|quantiz"):
        AutoModel.from_pretrained(tmp_path / "q")


def test_a_quantized_model_refuses_what_it_cannot_do(folder: Path, fresh: M3Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantization is 'int4'; accepted: int8, bf16"):
        fresh.quantize("int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quantize is 'int4'"):
        M3Model.from_pretrained(folder, quantize="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float64"):
        M3Model.from_pretrained(folder, torch.float64).quantize("int8")
    fresh.quantize("int8")
    with pytest.raises(ValueError, match="quantized as 'int8' already"):
        fresh.quantize("bf16")
    with pytest.raises(ValueError, match="quantized as 'int8' and cannot be trained"):
        fresh.train()
    assert not fresh.training
    fresh.save_pretrained(tmp_path / "q")
    with pytest.raises(ValueError, match="quantize is 'bf16'"):
        M3Model.from_pretrained(tmp_path / "q", quantize="bf16")


def test_damaged_codes_are_refused(fresh: M3Model, tmp_path: Path) -> None:
    fresh.quantize("int8").save_pretrained(tmp_path / "q")
    path = tmp_path / "q" / "model.safetensors"
    state = load_file(path)
    name = "encoder.layer.0.output.dense.weight"
    save_file({**state, name: state[name].float()}, path, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"output\.dense\.weight"):
        M3Model.from_pretrained(tmp_path / "q")
    save_file({key: tensor for key, tensor in state.items() if key != f"{name}_scale"}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing"):
        M3Model.from_pretrained(tmp_path / "q")
