"""encode: order, independence of batching, the three representations against their formulas, scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import tiny_tokenizer, write_folder
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from m3kernels import SparseBatch
from m3model import M3Config, M3Embeddings, M3Model, encoding, tokenizer
from m3model.encoding import plan_batches
from m3model.model import INITIAL_TOKEN_WEIGHT
from m3model.scoring import SCORE_NAMES

LONG = "the city of the north " * 9
TEXTS = ["how do i compute the eigenvalue", "", "a", "river river river city", LONG, "x y z", ""]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def one_by_one(model: M3Model, texts: list[str]) -> list[tuple[Tensor, dict[int, float], Tensor]]:
    """The official formulas (flag_embedding's modeling.py), text by text, without any packing."""
    results = []
    for text in texts:
        ids, offsets = model.tokenize([text])
        hidden = model.backbone(ids, offsets).detach()
        dense = torch.nn.functional.normalize(hidden[0], dim=0)
        weights = torch.relu(model.sparse_linear(hidden))[:, 0].tolist()
        lexical: dict[int, float] = {}
        for token, weight in zip(ids.tolist(), weights):
            if token not in model.config.ignored_token_ids and weight > 0:
                lexical[token] = max(lexical.get(token, 0.0), weight)
        rows = torch.nn.functional.normalize(model.colbert_linear(hidden[1:]), dim=1).detach()
        results.append((dense, lexical, rows))
    return results


def test_encode_gives_the_three_representations_in_the_order_of_the_texts(model: M3Model) -> None:
    out = model.encode(TEXTS, batch_tokens=12)
    assert isinstance(out.dense, np.ndarray) and out.dense.dtype == np.float32 and len(out) == len(TEXTS)
    bounds = out.multi_vector.offsets.tolist()
    for number, (dense, lexical, rows) in enumerate(one_by_one(model, TEXTS)):
        np.testing.assert_allclose(out.dense[number], dense.numpy(), **TOLERANCE)
        assert out.sparse.to_dicts()[number] == pytest.approx(dict(sorted(lexical.items())), rel=1e-5)
        torch.testing.assert_close(out.multi_vector.rows[bounds[number] : bounds[number + 1]], rows, **TOLERANCE)


@pytest.mark.parametrize("batch_tokens", [1, 7, 40, 100000])
def test_results_do_not_depend_on_the_batch(model: M3Model, batch_tokens: int) -> None:
    expected = model.encode(TEXTS)
    out = model.encode(TEXTS, batch_tokens=batch_tokens)
    np.testing.assert_allclose(out.dense, expected.dense, **TOLERANCE)
    assert torch.equal(out.sparse.token_ids, expected.sparse.token_ids)
    torch.testing.assert_close(out.sparse.weights, expected.sparse.weights, **TOLERANCE)
    assert torch.equal(out.multi_vector.offsets, expected.multi_vector.offsets)
    torch.testing.assert_close(out.multi_vector.rows, expected.multi_vector.rows, **TOLERANCE)


def test_texts_beyond_one_block_are_joined_in_order(model: M3Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model.encode(TEXTS)
    monkeypatch.setattr(encoding, "BLOCK", 3)
    out = model.encode(TEXTS)
    np.testing.assert_allclose(out.dense, expected.dense, **TOLERANCE)
    assert out.sparse.to_dicts()[4].keys() == expected.sparse.to_dicts()[4].keys()
    torch.testing.assert_close(out.multi_vector.rows, expected.multi_vector.rows, **TOLERANCE)


def test_tokenizing_in_parts_changes_nothing(model: M3Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, offsets = model.tokenize(TEXTS)
    monkeypatch.setattr(tokenizer, "PART_CHARACTERS", 20)
    again, again_offsets = model.tokenize(TEXTS)
    assert torch.equal(ids, again) and torch.equal(offsets, again_offsets)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 60))
def test_batches_hold_every_text_once_and_no_more_rows_than_allowed(lengths: list[int], batch_tokens: int) -> None:
    batches = plan_batches(lengths, batch_tokens)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[number] for number in batch) <= batch_tokens
    order = [lengths[number] for batch in batches for number in batch]
    assert order == sorted(order, reverse=True)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 120))
def test_batches_are_as_few_as_can_be_and_as_equal(lengths: list[int], batch_tokens: int) -> None:
    def cut(limit: int) -> list[int]:
        sums = [0]
        for length in sorted(lengths, reverse=True):
            sums = [*sums, length] if sums[-1] + length > limit else [*sums[:-1], sums[-1] + length]
        return sums

    sums = [sum(lengths[number] for number in batch) for batch in plan_batches(lengths, batch_tokens)]
    assert len(sums) == len(cut(batch_tokens))
    assert max(sums) == 1 or len(cut(max(sums) - 1)) > len(sums) or max(sums) == max(lengths)


def stream_of(texts: list[str], reached: list[int]) -> Iterator[str]:
    for number, text in enumerate(texts):
        reached.append(number)
        yield text


@pytest.mark.parametrize("window_characters", [1, 30, 100000])
def test_a_stream_gives_what_encode_gives_window_by_window(model: M3Model, window_characters: int) -> None:
    expected = model.encode(TEXTS)
    reached: list[int] = []
    parts = model.encode_stream(stream_of(TEXTS, reached), window_characters=window_characters)
    assert not reached, "nothing is read before it is asked for"
    parts = list(parts)
    out = M3Embeddings.concatenate(parts)
    assert len(out) == len(TEXTS) and (len(parts) > 1) == (window_characters < 100000)
    np.testing.assert_allclose(out.dense, expected.dense, **TOLERANCE)
    assert [ids.keys() for ids in out.sparse.to_dicts()] == [ids.keys() for ids in expected.sparse.to_dicts()]
    torch.testing.assert_close(out.multi_vector.rows, expected.multi_vector.rows, **TOLERANCE)


def test_a_stream_reads_one_window_ahead_and_no_further(model: M3Model) -> None:
    reached: list[int] = []
    parts = model.encode_stream(stream_of(["river"] * 1000, reached), window_characters=50)
    for number, part in enumerate(parts):
        assert len(part) == 10 and len(reached) <= 10 * (number + 2)
        if number == 3:
            break
    assert len(reached) < 1000


def test_a_stream_leaves_the_model_in_training_mode_between_windows(folder: Path) -> None:
    model = M3Model.from_pretrained(folder)
    expected = model.encode(["river"]).dense[0]
    model.train()
    for part in model.encode_stream(["river"] * 6, window_characters=10):
        np.testing.assert_allclose(part.dense, np.stack([expected] * len(part)), **TOLERANCE)
        assert model.training


def test_an_empty_stream_has_no_window_and_bad_texts_are_named(model: M3Model) -> None:
    assert list(model.encode_stream([])) == []
    with pytest.raises(TypeError, match=r"texts\[1\] must be a string, got int"):
        list(model.encode_stream(["a", 1]))
    with pytest.raises(TypeError, match="iterable of strings, got str"):
        model.encode_stream("a")
    with pytest.raises(ValueError, match="window_characters is 0"):
        model.encode_stream(["a"], window_characters=0)
    with pytest.raises(ValueError, match="batch_tokens is 0"):
        model.encode_stream(["a"], batch_tokens=0)


def test_texts_that_a_stream_cuts_are_counted_once_at_its_end(model: M3Model) -> None:
    with pytest.warns(UserWarning, match="3 texts are longer than 8 tokens") as caught:
        list(model.encode_stream([LONG] * 3, window_characters=10, max_length=8))
    assert len(caught) == 1 and caught[0].filename == __file__


def test_only_what_is_asked_for_is_computed(model: M3Model) -> None:
    out = model.encode(TEXTS, dense=False, multi_vector=False)
    assert out.dense is None and out.multi_vector is None and len(out) == len(TEXTS)
    out = model.encode(TEXTS, sparse=False, multi_vector=False)
    assert out.sparse is None and out.multi_vector is None and out.dense.shape == (len(TEXTS), 64)


def test_multi_vectors_may_be_kept_in_half_the_space(model: M3Model) -> None:
    exact = model.encode(TEXTS).multi_vector.rows
    half = model.encode(TEXTS, multi_vector_dtype=torch.float16).multi_vector.rows
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), exact, atol=2**-11, rtol=2**-11)


def test_prefixes_are_put_before_texts_of_their_role(tmp_path: Path) -> None:
    section = {"pooling": "mean", "query_prefix": "query: ", "passage_prefix": "passage: "}
    model = M3Model.from_pretrained(write_folder(tmp_path / "m", section=section))
    plain = M3Model.from_pretrained(write_folder(tmp_path / "p"))
    for role in ("query", "passage"):
        ids, offsets = model.tokenize(["the river", "x"], role=role)
        expected, expected_offsets = plain.tokenize([f"{role}: the river", f"{role}: x"])
        assert torch.equal(ids, expected) and torch.equal(offsets, expected_offsets)
        hidden = model.backbone(ids, offsets).detach()[: offsets[1]]
        dense = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        np.testing.assert_allclose(model.encode(["the river"], role=role).dense[0], dense.numpy(), **TOLERANCE)


def test_encode_ignores_training_mode_and_leaves_it_on(folder: Path) -> None:
    model = M3Model.from_pretrained(folder)
    expected = model.encode(TEXTS).dense
    model.train()
    np.testing.assert_array_equal(model.encode(TEXTS).dense, expected)
    assert model.training and model.backbone.training


def test_progress_bar_goes_to_stderr_and_says_tokens_per_second(
    model: M3Model, capfd: pytest.CaptureFixture[str]
) -> None:
    model.encode(TEXTS, progress=True)
    captured = capfd.readouterr()
    assert captured.out == "" and f"{len(TEXTS)}/{len(TEXTS)} texts" in captured.err and "tokens/s" in captured.err


def test_forward_carries_gradients_to_every_parameter(folder: Path) -> None:
    model = M3Model.from_pretrained(folder)
    out = model(*model.tokenize(TEXTS))
    total = out.dense[:, 0].sum() + out.sparse.weights.sum() + out.multi_vector.rows[:, 0].sum()
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_forward_compiles_into_one_graph(model: M3Model) -> None:
    ids, offsets = model.tokenize(TEXTS)

    def run(ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = model(ids, offsets)
        return out.dense, out.sparse.weights, out.multi_vector.rows

    with torch.no_grad():
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(ids, offsets)
        for ours, expected in zip(compiled, run(ids, offsets)):
            torch.testing.assert_close(ours, expected)


def test_scores_follow_their_formulas(model: M3Model) -> None:
    queries, passages = TEXTS[:3], TEXTS[3:6]
    weights = (1.0, 0.3, 0.7)
    scores = model.score(queries, passages, weights=weights)
    assert tuple(scores) == SCORE_NAMES
    for row, (query_dense, query_lexical, query_rows) in enumerate(one_by_one(model, queries)):
        for column, (dense, lexical, rows) in enumerate(one_by_one(model, passages)):
            d = float(query_dense @ dense)
            s = sum(weight * lexical.get(token, 0.0) for token, weight in query_lexical.items())
            m = float((query_rows @ rows.T).max(1).values.mean())
            expected = (d, s, m, (d + 0.3 * s) / 1.3, (d + 0.3 * s + 0.7 * m) / 2.0)
            ours = [float(scores[name][row, column]) for name in SCORE_NAMES]
            # The lexical score is above 10 here, where float32 has steps of 1e-6: its bound is relative.
            within = [pytest.approx(score, abs=1e-5) for score in expected]
            within[1] = pytest.approx(s, abs=1e-5, rel=1e-6)
            assert ours == within


def test_scores_of_pairs_are_entries_of_the_matrix(model: M3Model) -> None:
    pairs = [(2, 0), (0, 1), (0, 1), (1, 2)]
    every = model.score(TEXTS[:3], TEXTS[3:6])
    listed = model.score(TEXTS[:3], TEXTS[3:6], pairs=pairs)
    for name in SCORE_NAMES:
        expected = torch.stack([every[name][pair] for pair in pairs])
        torch.testing.assert_close(listed[name], expected, atol=1e-5, rtol=1e-5)
    assert all(scores.shape == (0,) for scores in model.score(["a"], ["b"], pairs=[]).values())


def test_embeddings_can_be_selected_and_joined_again(model: M3Model) -> None:
    out = model.encode(TEXTS)
    parts = [out.select([0, 1, 2]), out.select(slice(3, None))]
    joined = M3Embeddings.concatenate(parts)
    np.testing.assert_array_equal(joined.dense, out.dense)
    assert joined.sparse.to_dicts() == out.sparse.to_dicts()
    assert torch.equal(joined.multi_vector.rows, out.multi_vector.rows)
    assert torch.equal(joined.multi_vector.offsets, out.multi_vector.offsets)
    turned = out.select([4, 0])
    assert turned.sparse.to_dicts() == [out.sparse.to_dicts()[4], out.sparse.to_dicts()[0]]
    np.testing.assert_array_equal(turned.dense, out.dense[[4, 0]])
    with pytest.raises(ValueError, match="1 of 2 parts have sparse"):
        M3Embeddings.concatenate([out, M3Embeddings(out.dense, None, out.multi_vector)])


def test_selection_keeps_gradients(folder: Path) -> None:
    model = M3Model.from_pretrained(folder)
    out = model(*model.tokenize(TEXTS)).select([3])
    assert isinstance(out.sparse, SparseBatch)
    (out.dense.sum() + out.sparse.weights.sum() + out.multi_vector.rows.sum()).backward()
    assert model.backbone.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_a_model_made_from_a_configuration_has_working_fresh_heads() -> None:
    size = tiny_tokenizer("bert")[0].get_vocab_size()
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": size}
    model = M3Model(M3Config("bert", hidden_size=16, multi_vector_dim=8, pad_token_id=0, **sizes)).eval()
    ids = torch.tensor([2, 9, 10, 3, 2, 9, 3], dtype=torch.int32)
    out = model(ids, torch.tensor([0, 4, 7], dtype=torch.int32))
    assert out.multi_vector.rows.shape == (5, 8)
    identity = model.colbert_linear.weight @ model.colbert_linear.weight.T
    torch.testing.assert_close(identity, torch.eye(8), atol=1e-6, rtol=0)
    assert out.sparse.to_dicts()[0] == pytest.approx({9: INITIAL_TOKEN_WEIGHT, 10: INITIAL_TOKEN_WEIGHT})
