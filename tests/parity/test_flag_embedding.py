"""The official FlagEmbedding 1.4.2, in an environment of its own, and this package agree on the same folder.

`make test-parity` makes the environment and sets M3_PARITY_PYTHON to its interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3model import M3Model
from m3model.compat.flag_embedding import BGEM3FlagModel

sys.path.insert(0, str(Path(__file__).parents[1] / "m3model"))
from checkpoints import write_folder

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif("M3_PARITY_PYTHON" not in os.environ, reason="M3_PARITY_PYTHON is not set: make test-parity"),
]

TOLERANCE = 1e-4
MAX_LENGTH = 48
WEIGHTS = [1.0, 0.3, 0.7]
TEXTS = [
    "how do i compute the eigenvalue of a symmetric matrix",
    "the river",
    "",
    "a b c d e f g a b c",
    "Brücke über den Fluß; 东京的 city! भारत",
    "the river of the mountain " * 20,
    "what is north of the city where the river is, and what is south of the bridge?",
    "query: list and sort",
    "x",
]
PAIRS = [[TEXTS[0], TEXTS[3]], [TEXTS[1], TEXTS[5]], [TEXTS[6], TEXTS[4]], [TEXTS[1], TEXTS[1]], [TEXTS[6], TEXTS[1]]]
NAMES = {
    "dense": "dense",
    "sparse": "sparse",
    "colbert": "multi_vector",
    "sparse+dense": "dense+sparse",
    "colbert+sparse+dense": "all",
}

Oracle = dict[str, np.ndarray]


def ask_oracle(folder: Path, workplace: Path, **request: Any) -> Oracle:
    """What the official package computes."""
    question, answer = workplace / "request.json", workplace / "result.npz"
    defaults = {"texts": TEXTS, "pairs": PAIRS, "weights": WEIGHTS, "max_length": MAX_LENGTH, "pooling": "cls"}
    question.write_text(json.dumps({"folder": str(folder), **defaults, **request}))
    command = [os.environ["M3_PARITY_PYTHON"], str(Path(__file__).with_name("oracle.py")), str(question), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(answer) as arrays:
        return dict(arrays)


def near(ours: Any, theirs: np.ndarray, what: str) -> None:
    ours = np.asarray(ours, dtype=np.float64)
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    error = float((np.abs(ours - theirs) / np.maximum(1.0, np.abs(theirs))).max(initial=0.0))
    print(f"{what}: largest difference {error:.2e}")
    assert error < TOLERANCE, (what, error)


def compare_embeddings(model: M3Model, oracle: Oracle, texts: list[str] = TEXTS) -> None:
    out = model.encode(texts, max_length=MAX_LENGTH, batch_tokens=60)
    near(out.dense, oracle["dense"], "dense")
    assert out.sparse.offsets.diff().tolist() == oracle["entries"].tolist()
    assert out.sparse.token_ids.tolist() == oracle["ids"].tolist()
    near(out.sparse.weights, oracle["weights"], "token weights")
    assert out.multi_vector.offsets.diff().tolist() == oracle["row_counts"].tolist()
    near(out.multi_vector.rows, oracle["rows"], "multi-vectors")


@pytest.fixture(scope="module", params=["xlm-roberta", "bert"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    """A folder with random weights that transformers wrote, and the oracle's answers to it."""
    workplace = tmp_path_factory.mktemp(request.param)
    folder = write_folder(workplace / "m3", request.param)
    return folder, ask_oracle(folder, workplace)


@pytest.mark.filterwarnings("ignore:.*longer than")
def test_embeddings_and_scores_agree(original: tuple[Path, Oracle]) -> None:
    folder, oracle = original
    model = M3Model.from_pretrained(folder)
    compare_embeddings(model, oracle)
    pairs = [(TEXTS.index(query), TEXTS.index(passage)) for query, passage in PAIRS]
    scores = model.score(TEXTS, TEXTS, weights=tuple(WEIGHTS), pairs=pairs, max_length=MAX_LENGTH)
    full = model.score(TEXTS, TEXTS, weights=tuple(WEIGHTS), max_length=MAX_LENGTH)
    for theirs, ours in NAMES.items():
        near(scores[ours], oracle[f"single {theirs}"], f"{theirs} of pairs")
        near([full[ours][pair] for pair in pairs], oracle[f"single {theirs}"], f"{theirs} of the matrix")


@pytest.mark.filterwarnings("ignore:.*longer than")
def test_drop_in_gives_the_official_results(original: tuple[Path, Oracle]) -> None:
    folder, oracle = original
    limits = {"query_max_length": MAX_LENGTH, "passage_max_length": MAX_LENGTH}
    model = BGEM3FlagModel(folder, use_fp16=False, devices="cpu", **limits)
    out = model.encode(TEXTS, batch_size=4, return_dense=True, return_sparse=True, return_colbert_vecs=True)
    near(out["dense_vecs"], oracle["dense"], "dense_vecs")
    near(np.concatenate(out["colbert_vecs"]), oracle["rows"], "colbert_vecs")
    assert [len(row) for row in out["lexical_weights"]] == oracle["entries"].tolist()
    lexical = model.compute_lexical_matching_score(out["lexical_weights"], out["lexical_weights"])
    near(lexical, oracle["lexical"], "compute_lexical_matching_score")
    near(model.colbert_score(out["colbert_vecs"][0], out["colbert_vecs"][1]), oracle["colbert"], "colbert_score")
    tokens = model.convert_id_to_token(out["lexical_weights"][:1])
    expected = json.loads(str(oracle["tokens"]))
    assert tokens.keys() == expected.keys()
    near(list(tokens.values()), np.array([expected[token] for token in tokens]), "convert_id_to_token")
    pairs = [tuple(pair) for pair in PAIRS]
    single = [model.compute_score(pair, weights_for_different_modes=WEIGHTS) for pair in pairs]
    padded = model.compute_score(pairs, len(pairs), weights_for_different_modes=WEIGHTS, padding_as_zero=True)
    plain = model.compute_score(pairs, len(pairs), weights_for_different_modes=WEIGHTS)
    for name in NAMES:
        near([scores[name] for scores in single], oracle[f"single {name}"], f"compute_score of one pair: {name}")
        near(padded[name], oracle[f"batch {name}"], f"compute_score with padding: {name}")
        near(plain[name], oracle[f"single {name}"], f"compute_score without padding: {name}")


def test_flag_embedding_loads_what_save_pretrained_wrote(original: tuple[Path, Oracle], tmp_path: Path) -> None:
    folder, oracle = original
    M3Model.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    again = ask_oracle(tmp_path / "saved", tmp_path)
    assert again.keys() == oracle.keys()
    for name, expected in oracle.items():
        assert np.array_equal(again[name], expected), name


@pytest.mark.filterwarnings("ignore:.*longer than")
def test_embedded_backbone_agrees_with_the_real_vocabulary(embedded_folder: Path, tmp_path: Path) -> None:
    model = M3Model.from_pretrained(embedded_folder)
    texts = [*TEXTS, "Wie heißt der höchste Berg Österreichs?", "日本で一番高い山は富士山です。", "ما هي عاصمة مصر؟"]
    oracle = ask_oracle(embedded_folder, tmp_path, texts=["passage: " + text for text in texts], pooling="mean")
    compare_embeddings(model, oracle, texts)
