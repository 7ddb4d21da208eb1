"""`official=True` gives the loss of FlagEmbedding 1.4.2's own training class, and its gradients, on the same folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m3model import M3Model
from m3model.training import m3_loss

sys.path.insert(0, str(Path(__file__).parents[1] / "m3model"))
from checkpoints import write_folder

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif("M3_PARITY_PYTHON" not in os.environ, reason="M3_PARITY_PYTHON is not set: make test-parity"),
]

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
TEMPERATURE = 0.5
QUERIES = ["the river", "how do i sort a list", "what is north of the city", "matrix"]
LONG = [f"{'the bridge of ' * (number % 4)}{text}" for number, text in enumerate(QUERIES * 2)]
SHORT = ["bhf", "7 ?", "東", "z 1"]
PASSAGES = [text for number in range(4) for text in (LONG[number], SHORT[number], LONG[number + 4])]
TEACHER = [[2.0, 0.5, -1.0], [0.3, 0.9, 0.1], [1.0, 1.0, -2.0], [0.0, 0.7, 0.2]]
CASES: dict[str, dict[str, Any]] = {
    "distilled": {"unified": True, "self_distill": True},
    "plain": {"unified": True, "self_distill": False},
    "dense": {"unified": False, "self_distill": False},
    "kl_div": {"unified": True, "self_distill": True, "kd_loss_type": "kl_div", "teacher_scores": TEACHER},
    "m3_kd_loss": {"unified": True, "self_distill": True, "kd_loss_type": "m3_kd_loss", "teacher_scores": TEACHER},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Multi-vectors are centred: with maxima of both signs, padding that counts as zero changes the scores."""
    path = write_folder(tmp_path_factory.mktemp("training") / "m3", max_length=128)
    model = M3Model.from_pretrained(path).eval()
    with torch.no_grad():
        hidden = model.backbone(*model.tokenize(QUERIES + PASSAGES))
        head = {"weight": 3 * model.colbert_linear.weight, "bias": -3 * model.colbert_linear.weight @ hidden.mean(0)}
    torch.save(head, path / "colbert_linear.pt")
    return path


@pytest.fixture(scope="module")
def oracle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    model = M3Model.from_pretrained(folder)
    sides = {}
    for side, texts in (("queries", QUERIES), ("passages", PASSAGES)):
        ids, offsets = model.tokenize(texts)
        sides[side] = [part.tolist() for part in ids.split(offsets.diff().tolist())]
    workplace = tmp_path_factory.mktemp("oracle")
    question, answer = workplace / "request.json", workplace / "result.npz"
    request = {"folder": str(folder), **sides, "temperature": TEMPERATURE, "cases": CASES}
    question.write_text(json.dumps(request))
    script = str(Path(__file__).with_name("training_oracle.py"))
    command = [os.environ["M3_PARITY_PYTHON"], script, str(question), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(answer) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_agree(name: str, folder: Path, oracle: dict[str, np.ndarray]) -> None:
    case = CASES[name]
    model = M3Model.from_pretrained(folder).eval()
    heads = {"sparse": case["unified"], "multi_vector": case["unified"]}
    teacher = torch.tensor(case["teacher_scores"]) if "teacher_scores" in case else None
    sides = model(*model.tokenize(QUERIES), **heads), model(*model.tokenize(PASSAGES), **heads)
    settings: dict[str, Any] = {
        "temperature": TEMPERATURE,
        "self_distill": case["self_distill"],
        "teacher_scores": teacher,
        "teacher_loss": case.get("kd_loss_type", "kl_div"),
    }
    loss = m3_loss(*sides, **settings, official=True)
    if case["unified"]:
        paper = m3_loss(*sides, **settings)
        difference = abs(float((paper.total - loss.total).detach()))
        assert difference > 100 * LOSS_TOLERANCE, f"{name} cannot tell official from the paper: {difference:.1e}"
    loss.total.backward()
    theirs = float(oracle[f"{name} loss"])
    print(f"{name}: loss {loss.total.item():.7f}, official {theirs:.7f}")
    assert abs(loss.total.item() - theirs) <= LOSS_TOLERANCE * max(1.0, abs(theirs))
    ours = {
        "colbert_linear.weight": model.colbert_linear.weight,
        "sparse_linear.weight": model.sparse_linear.weight,
        "model.embeddings.word_embeddings.weight": model.backbone.embeddings.word_embeddings.weight,
        "model.encoder.layer.0.output.dense.weight": model.backbone.encoder.layer[0].output.dense.weight,
        "model.encoder.layer.1.attention.output.LayerNorm.weight": (
            model.backbone.encoder.layer[1].attention.output.LayerNorm.weight
        ),
    }
    for parameter_name, parameter in ours.items():
        key = f"{name} gradient {parameter_name}"
        if key not in oracle:
            assert not case["unified"] and parameter.grad is None, key
            continue
        expected = oracle[key]
        scale = float(np.abs(expected).max())
        assert scale > 0, key
        error = float(np.abs(parameter.grad.numpy() - expected).max()) / scale
        print(f"{key}: largest difference {error:.2e}")
        assert error <= GRADIENT_TOLERANCE, (key, error)
