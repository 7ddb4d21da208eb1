"""The FlagEmbedding interface: its names and shapes, and none of the faults of FlagEmbedding 1.4.2's inference."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_folder

from m3model import M3Model
from m3model.compat.flag_embedding import BGEM3FlagModel

TEXTS = ["how do i compute the eigenvalue", "the river", "", "a b c the of in", "city city of the river"]
EVERY = {"return_dense": True, "return_sparse": True, "return_colbert_vecs": True}


@pytest.fixture(scope="module")
def drop_in(folder: Path) -> BGEM3FlagModel:
    return BGEM3FlagModel(folder, devices="cpu")


def forward_calls(model: BGEM3FlagModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of texts of each forward pass."""
    calls: list[int] = []
    original = M3Model.forward

    def counted(self: M3Model, token_ids: torch.Tensor, offsets: torch.Tensor, *rest: Any, **options: Any) -> Any:
        calls.append(len(offsets) - 1)
        return original(self, token_ids, offsets, *rest, **options)

    monkeypatch.setattr(M3Model, "forward", counted)
    return calls


def test_encode_has_the_three_keys_and_forms(drop_in: BGEM3FlagModel) -> None:
    out = drop_in.encode(TEXTS, **EVERY)
    assert list(out) == ["dense_vecs", "lexical_weights", "colbert_vecs"]
    assert out["dense_vecs"].shape == (5, 64) and out["dense_vecs"].dtype == np.float32
    assert [type(entries) for entries in out["lexical_weights"]] == [dict] * 5
    ids, offsets = drop_in.models[0].tokenize(TEXTS)
    assert [len(rows) for rows in out["colbert_vecs"]] == (offsets.diff() - 1).tolist()
    assert set(out["lexical_weights"][1]) <= {str(token) for token in ids[offsets[1] : offsets[2]].tolist()}


def test_a_single_text_gives_the_unlisted_forms(drop_in: BGEM3FlagModel) -> None:
    listed, single = drop_in.encode([TEXTS[0]], **EVERY), drop_in.encode(TEXTS[0], **EVERY)
    np.testing.assert_array_equal(single["dense_vecs"], listed["dense_vecs"][0])
    assert single["lexical_weights"] == listed["lexical_weights"][0]
    np.testing.assert_array_equal(single["colbert_vecs"], listed["colbert_vecs"][0])


def test_what_is_not_asked_for_is_none(drop_in: BGEM3FlagModel) -> None:
    out = drop_in.encode(TEXTS)
    assert out["dense_vecs"] is not None and out["lexical_weights"] is None and out["colbert_vecs"] is None
    nothing = drop_in.encode(TEXTS, return_dense=False)
    assert set(nothing.values()) == {None} and len(nothing) == 3


def test_an_empty_list_is_encoded_to_empty_results(drop_in: BGEM3FlagModel) -> None:
    out = drop_in.encode([], **EVERY)
    assert out["dense_vecs"].shape == (0, 64) and out["lexical_weights"] == [] and out["colbert_vecs"] == []
    assert drop_in.compute_score([]) == {name: [] for name in drop_in.compute_score((TEXTS[0], TEXTS[1]))}


def test_every_text_is_computed_once(drop_in: BGEM3FlagModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = forward_calls(drop_in, monkeypatch)
    drop_in.encode(TEXTS[0])
    assert calls == [1]
    drop_in.encode(TEXTS)
    assert calls == [1, 5]


def test_scores_encode_each_distinct_text_once(drop_in: BGEM3FlagModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = forward_calls(drop_in, monkeypatch)
    drop_in.compute_score([(TEXTS[0], passage) for passage in TEXTS[1:]])
    assert calls == [1, 4]


def test_an_error_of_the_model_comes_through_as_it_is(drop_in: BGEM3FlagModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def failing(*_arguments: object, **_options: object) -> None:
        calls.append(1)
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(M3Model, "forward", failing)
    with pytest.raises(RuntimeError, match="device-side assert"):
        drop_in.encode(TEXTS)
    assert len(calls) == 1


def test_lexical_weights_can_be_written_as_json(drop_in: BGEM3FlagModel) -> None:
    weights = drop_in.encode(TEXTS, **EVERY)["lexical_weights"]
    assert json.loads(json.dumps(weights)) == weights


def test_multi_vectors_of_a_text_hold_no_other_text_in_memory(drop_in: BGEM3FlagModel) -> None:
    rows = drop_in.encode(TEXTS, **EVERY)["colbert_vecs"][1]
    owner = rows if rows.base is None else rows.base
    assert owner.nbytes == rows.nbytes and rows.flags.c_contiguous


def test_weights_are_not_rounded_to_float16_on_a_cpu(drop_in: BGEM3FlagModel, model: M3Model) -> None:
    assert drop_in.models[0].dtype == torch.float32
    np.testing.assert_array_equal(drop_in.encode(TEXTS)["dense_vecs"], model.encode(TEXTS).dense)


def test_missing_heads_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"sparse_linear\.pt and no colbert_linear\.pt"):
        BGEM3FlagModel(write_folder(tmp_path / "m", heads=False), devices="cpu")


def test_cut_texts_are_warned_about(drop_in: BGEM3FlagModel) -> None:
    with pytest.warns(UserWarning, match="1 text is longer than 512 tokens"):
        drop_in.encode(["the river " * 400])


def test_scores_do_not_depend_on_the_batch_unless_asked(drop_in: BGEM3FlagModel) -> None:
    pairs = [(TEXTS[0], passage) for passage in (TEXTS[1], TEXTS[3], "the river of the city " * 10)]
    together = drop_in.compute_score(pairs)
    alone = [drop_in.compute_score(pair) for pair in pairs]
    for name, scores in together.items():
        assert scores == pytest.approx([single[name] for single in alone], abs=1e-5)
        assert all(isinstance(score, float) for score in scores)
    rows = [drop_in.encode(text, **EVERY)["colbert_vecs"] for text in (TEXTS[0], TEXTS[1])]
    floor = np.maximum((rows[0] @ rows[1].T).max(1), 0).mean()
    padded = drop_in.compute_score(pairs, padding_as_zero=True)
    assert padded["colbert"][0] == pytest.approx(floor, abs=1e-5)
    assert padded["dense"] == pytest.approx(together["dense"], abs=1e-6)


def test_score_names_and_weights(drop_in: BGEM3FlagModel) -> None:
    scores = drop_in.compute_score((TEXTS[0], TEXTS[3]), weights_for_different_modes=[0.5, 0.25, 2.0])
    assert list(scores) == ["colbert", "sparse", "dense", "sparse+dense", "colbert+sparse+dense"]
    pair = 0.25 * scores["sparse"] + 0.5 * scores["dense"]
    assert scores["sparse+dense"] == pytest.approx(pair / 0.75, abs=1e-6)
    assert scores["colbert+sparse+dense"] == pytest.approx((2 * scores["colbert"] + pair) / 2.75, abs=1e-6)


def test_lexical_scores_of_dictionaries_and_lists(drop_in: BGEM3FlagModel) -> None:
    first, second = {"7": 0.5, "9": 2.0}, {"9": 0.25, "11": 4.0}
    assert drop_in.compute_lexical_matching_score(first, second) == 0.5
    matrix = drop_in.compute_lexical_matching_score([first, second, {}], [second])
    assert matrix.tolist() == [[0.5], [0.0625 + 16.0], [0.0]]
    assert drop_in.compute_lexical_matching_score({"▁the": np.float16(0.5)}, {"▁the": 3}) == 1.5
    with pytest.raises(ValueError, match="must both be dictionaries or both be lists"):
        drop_in.compute_lexical_matching_score(first, [second])


def test_tokens_that_decode_alike_keep_both_weights(drop_in: BGEM3FlagModel) -> None:
    vocabulary = drop_in.models[0].tokenizer.backend.get_vocab()
    weights = {str(vocabulary["▁the"]): 0.5, str(vocabulary["the"]): 0.25, str(vocabulary["▁river"]): 1.0}
    assert drop_in.convert_id_to_token(weights) == {"▁the": 0.5, "the": 0.25, "river": 1.0}
    assert drop_in.convert_id_to_token([weights, {}])[1] == {}


def test_instructions_are_formatted_for_their_role(folder: Path, drop_in: BGEM3FlagModel) -> None:
    model = BGEM3FlagModel(
        folder,
        devices="cpu",
        query_instruction_for_retrieval="what is",
        query_instruction_format="{}\\n{}",
        passage_instruction_for_retrieval="the",
    )
    queries, corpus = model.encode_queries(TEXTS)["dense_vecs"], model.encode_corpus(TEXTS)["dense_vecs"]
    np.testing.assert_array_equal(queries, drop_in.encode([f"what is\n{text}" for text in TEXTS])["dense_vecs"])
    np.testing.assert_array_equal(corpus, drop_in.encode([f"the{text}" for text in TEXTS])["dense_vecs"])
    np.testing.assert_array_equal(model.encode(TEXTS)["dense_vecs"], drop_in.encode(TEXTS)["dense_vecs"])


def test_pooling_normalization_and_truncation(folder: Path, model: M3Model) -> None:
    ids, offsets = model.tokenize(TEXTS[:1])
    hidden = model.backbone(ids, offsets).detach()
    raw = BGEM3FlagModel(folder, devices="cpu", normalize_embeddings=False, pooling_method="mean")
    out = raw.encode(TEXTS[0], **EVERY)
    np.testing.assert_allclose(out["dense_vecs"], hidden.mean(0).numpy(), atol=1e-5)
    np.testing.assert_allclose(out["colbert_vecs"], model.colbert_linear(hidden[1:]).detach().numpy(), atol=1e-5)
    short = BGEM3FlagModel(folder, devices="cpu", truncate_dim=16).encode(TEXTS[0], **EVERY)
    expected = torch.nn.functional.normalize(hidden[0, :16], dim=0).numpy()
    np.testing.assert_allclose(short["dense_vecs"], expected, atol=1e-5)
    assert short["colbert_vecs"].shape[1] == 16
    np.testing.assert_allclose(np.linalg.norm(short["colbert_vecs"], axis=1), 1.0, atol=1e-5)


def test_several_devices_share_the_texts(folder: Path, drop_in: BGEM3FlagModel) -> None:
    shared = BGEM3FlagModel(folder, devices=["cpu", "cpu"]).encode(TEXTS, **EVERY)
    expected = drop_in.encode(TEXTS, **EVERY)
    np.testing.assert_allclose(shared["dense_vecs"], expected["dense_vecs"], atol=2e-6)
    assert [entries.keys() for entries in shared["lexical_weights"]] == [
        entries.keys() for entries in expected["lexical_weights"]
    ]
    for ours, theirs in zip(shared["colbert_vecs"], expected["colbert_vecs"]):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_several_threads_may_use_one_model(drop_in: BGEM3FlagModel) -> None:
    expected = [drop_in.encode(text)["dense_vecs"] for text in TEXTS]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            results = list(threads.map(lambda text: drop_in.encode(text)["dense_vecs"], TEXTS * 10))
    finally:
        sys.setswitchinterval(interval)
    for number, result in enumerate(results):
        np.testing.assert_allclose(result, expected[number % len(TEXTS)], atol=2e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pooling_method": "last_token"}, ValueError, "pooling_method is 'last_token'; accepted: cls, mean"),
        ({"colbert_dim": 32}, ValueError, "colbert_dim is 32, but the folder's head makes 64"),
        ({"truncate_dim": 65}, ValueError, "truncate_dim is 65; accepted: 1 to 64"),
        ({"devices": []}, ValueError, "devices is empty"),
        ({"unknown": 1}, TypeError, "unknown"),
    ],
)
def test_arguments_are_checked(folder: Path, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BGEM3FlagModel(folder, **{"devices": "cpu", **arguments})


def test_what_is_no_pair_is_refused(drop_in: BGEM3FlagModel) -> None:
    with pytest.raises(TypeError, match=r"sentence_pairs\[1\] is 'b'; accepted: a pair of two strings"):
        drop_in.compute_score([("a", "b"), "b"])
    with pytest.raises(ValueError, match="batch_size is 0; accepted: at least 1"):
        drop_in.encode(TEXTS, batch_size=0)
