"""What texts and tensors the model refuses, and what it makes of odd ones."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_folder

from m3model import M3Config, M3Model
from m3model.scoring import score_embeddings


def test_an_empty_list_gives_empty_results(model: M3Model) -> None:
    out = model.encode([])
    assert out.dense.shape == (0, 64) and out.dense.dtype == np.float32
    assert out.sparse.offsets.tolist() == [0] and out.sparse.to_dicts() == []
    assert out.multi_vector.rows.shape == (0, 64) and out.multi_vector.offsets.tolist() == [0]
    ids, offsets = model.tokenize([])
    assert ids.shape == (0,) and ids.dtype == torch.int32 and offsets.tolist() == [0]
    scores = model.score([], ["a river"])
    assert all(matrix.shape == (0, 1) for matrix in scores.values())
    forward = model(ids, offsets)
    assert forward.dense.shape == (0, 64) and forward.multi_vector.rows.shape == (0, 64)


def test_an_empty_text_has_cls_and_eos_only(model: M3Model) -> None:
    ids, offsets = model.tokenize([""])
    assert ids.tolist() == [0, 2] and offsets.tolist() == [0, 2]
    out = model.encode([""])
    assert np.linalg.norm(out.dense[0]) == pytest.approx(1.0, abs=1e-5)
    assert out.sparse.to_dicts() == [{}] and out.multi_vector.offsets.tolist() == [0, 1]


def test_a_text_of_100000_tokens_is_cut_with_one_warning(model: M3Model) -> None:
    long = " ".join(["river city"] * 50_000)
    with pytest.warns(UserWarning) as seen:
        ids, offsets = model.tokenize([long, "a", long], max_length=256)
    assert len(seen) == 1 and offsets.tolist() == [0, 256, 259, 515]
    assert str(seen[0].message) == ("2 texts are longer than 256 tokens and cut there (the longest has 100002)")
    assert seen[0].filename == __file__
    assert ids[0] == 0 and ids[255] == 2
    with pytest.warns(UserWarning, match="1 text is longer than 256 tokens") as seen:
        out = model.encode([long], max_length=256)
    assert len(seen) == 1 and seen[0].filename == __file__
    assert out.multi_vector.rows.shape[0] == 255


def test_texts_are_cut_at_what_the_position_table_serves(tmp_path: Path) -> None:
    model = M3Model.from_pretrained(write_folder(tmp_path / "m", "bert", max_length=16))
    with pytest.warns(UserWarning, match="longer than 16 tokens"):
        out = model.encode(["river city " * 20])
    assert out.multi_vector.rows.shape[0] == 15


def test_texts_that_fit_are_not_warned_about(model: M3Model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids, _ = model.tokenize(["river city"], max_length=4)
    assert len(ids) == 4


def test_lone_surrogates_become_the_replacement_character(model: M3Model) -> None:
    ids = model.tokenize(["river \ud83d city", "\udc00", "\ud83d\ude00"])[0]
    assert torch.equal(ids, model.tokenize(["river \ufffd city", "\ufffd", "\U0001f600"])[0])
    assert np.isfinite(model.encode(["\udfff" * 10]).dense).all()


def test_nul_bytes_and_control_characters_are_encoded(model: M3Model) -> None:
    out = model.encode(["river\x00city", "\x00", "\x01\x02\x7f"])
    assert np.isfinite(out.dense).all()
    _, offsets = model.tokenize(["river\x00city", "river"])
    assert offsets[1] > offsets[2] - offsets[1]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "texts must be a list of strings, got str"),
        (b"bytes", "texts must be a list of strings, got bytes"),
        (None, "texts must be a list of strings, got NoneType"),
        ({"a": 1}, "texts must be a list of strings, got dict"),
        (["a", None], r"texts\[1\] must be a string, got NoneType"),
        (["a", "b", 3], r"texts\[2\] must be a string, got int"),
        ([float("nan")], r"texts\[0\] must be a string, got float"),
        ([b"a"], r"texts\[0\] must be a string, got bytes"),
        ([["a"]], r"texts\[0\] must be a string, got list"),
    ],
)
def test_what_is_no_list_of_strings_is_refused(model: M3Model, texts: Any, message: str) -> None:
    for call in (model.encode, model.tokenize, lambda given: model.score(given, ["a"])):
        with pytest.raises(TypeError, match=message):
            call(texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 2}, "max_length is 2; accepted: a whole number above the 2 special tokens"),
        ({"max_length": -5}, "max_length is -5"),
        ({"max_length": 10.0}, "max_length is 10.0"),
        ({"batch_tokens": 0}, "batch_tokens is 0; accepted: a whole number of at least 1"),
        ({"role": "document"}, "role is 'document'; accepted: query, passage"),
        ({"dense": False, "sparse": False, "multi_vector": False}, "are all False; accepted: at least one True"),
        ({"multi_vector_dtype": torch.int8}, r"multi_vector_dtype is torch\.int8"),
    ],
)
def test_arguments_of_encode_are_checked(model: M3Model, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.encode(["a"], **arguments)


IDS = torch.tensor([0, 9, 2, 0, 2], dtype=torch.int32)
OFFSETS = torch.tensor([0, 3, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("ids", "offsets", "error", "message"),
    [
        (IDS.long(), OFFSETS, TypeError, r"token_ids has dtype torch\.int64; accepted: int32"),
        (IDS, OFFSETS.long(), TypeError, r"offsets has dtype torch\.int64; accepted: int32"),
        (IDS.float(), OFFSETS, TypeError, r"token_ids has dtype torch\.float32"),
        (IDS[None], OFFSETS, ValueError, "token_ids must have 1 dimensions"),
        (IDS.tolist(), OFFSETS, TypeError, "token_ids must be a tensor, got list"),
        (IDS, OFFSETS[:0], ValueError, r"offsets must have N \+ 1 entries"),
        (IDS, torch.tensor([0, 4, 3, 5], dtype=torch.int32), ValueError, "offsets decreases from 4 to 3"),
        (IDS, torch.tensor([0, 3], dtype=torch.int32), ValueError, "offsets ends at 3, but there are 5 rows"),
        (IDS, torch.tensor([1, 5], dtype=torch.int32), ValueError, r"offsets\[0\] is 1"),
        (IDS, torch.tensor([0, 3, 3, 5], dtype=torch.int32), ValueError, "text 1 has no token"),
        (IDS - 1, OFFSETS, ValueError, "token_ids run from -1 to 8; the vocabulary has 0 to"),
        (IDS + 100000, OFFSETS, ValueError, "token_ids run from 100000 to 100009"),
        (IDS.to("meta"), OFFSETS, ValueError, "token_ids is on meta, but the model is on cpu"),
        (IDS, OFFSETS.to("meta"), ValueError, "offsets is on meta, but the other arguments are on cpu"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    model: M3Model, ids: Any, offsets: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model(ids, offsets)


def test_a_text_longer_than_the_position_table_is_refused_by_forward(tmp_path: Path) -> None:
    model = M3Model.from_pretrained(write_folder(tmp_path / "m", max_length=4))
    with pytest.raises(ValueError, match="text 0 has 5 tokens; the model serves 4"):
        model(IDS, OFFSETS[::2].contiguous())


def test_a_model_without_tokenizer_says_so(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
    bare = M3Model(M3Config(hidden_size=16, multi_vector_dim=16, max_position_embeddings=12, **sizes))
    for call in (bare.encode, bare.tokenize, lambda _texts: bare.save_pretrained(tmp_path / "m")):
        with pytest.raises(ValueError, match="the model has no tokenizer"):
            call(["a"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 0.0, 1.0), (1.0, -0.1, 1.0), (float("nan"), 1.0, 1.0)])
def test_weights_are_checked(model: M3Model, weights: Any) -> None:
    with pytest.raises(ValueError, match="accepted: three numbers of at least 0 for dense, sparse and multi-vector"):
        model.score(["a"], ["b"], weights=weights)


@pytest.mark.parametrize("pairs", [[(0, 1)], [(-1, 0)], [(1, 0)]])
def test_pairs_out_of_range_are_refused(model: M3Model, pairs: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match=r"pairs run from .* accepted: queries 0 to 0, passages 0 to 0"):
        model.score(["a"], ["b"], pairs=pairs)


def test_scores_need_all_three_representations(model: M3Model) -> None:
    full, part = model.encode(["a"]), model.encode(["a"], sparse=False, multi_vector=False)
    with pytest.raises(ValueError, match="passages have no sparse, multi_vector"):
        score_embeddings(full, part)
