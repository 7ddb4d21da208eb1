"""A SparseBatch survives scipy, dictionaries, FlagEmbedding's and Milvus' formats, and says what it refuses."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from m3kernels import SparseBatch
from m3kernels.sparse.batch import NO_ID

WEIGHTS = st.floats(2.0**-20, 1000, width=32)
DICTS = st.lists(st.dictionaries(st.integers(0, NO_ID - 1), WEIGHTS, max_size=6), max_size=5)


def same(a: SparseBatch, b: SparseBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.compact(), b.compact()))


@given(DICTS)
def test_milvus_dictionaries_come_back(dicts: list[dict[int, float]]) -> None:
    assert SparseBatch.from_dicts(dicts).to_dicts() == [dict(sorted(text.items())) for text in dicts]


@given(DICTS)
def test_flag_embedding_dictionaries_come_back_and_are_json(dicts: list[dict[int, float]]) -> None:
    batch = SparseBatch.from_dicts(dicts)
    lexical_weights = json.loads(json.dumps(batch.to_flag_embedding()))
    assert all(isinstance(token, str) for text in lexical_weights for token in text)
    assert same(SparseBatch.from_dicts(lexical_weights), batch)


def test_numpy_values_of_flag_embedding_are_taken() -> None:
    batch = SparseBatch.from_dicts([{"7": np.float16(0.5), "3": np.float32(0.25)}])
    assert batch.to_dicts() == [{3: 0.25, 7: 0.5}]


@given(DICTS)
def test_scipy_comes_back(dicts: list[dict[int, float]]) -> None:
    batch = SparseBatch.from_dicts(dicts)
    matrix = batch.to_scipy(NO_ID)
    assert matrix.shape == (len(dicts), NO_ID)
    assert same(SparseBatch.from_scipy(matrix), batch)
    assert same(SparseBatch.from_scipy(matrix.tocoo()), batch)


def test_scipy_entries_may_be_unsorted_repeated_or_zero() -> None:
    places = ([0, 0, 0, 1, 1], [5, 2, 5, 1, 3])
    matrix = sparse.coo_array(([1.0, 2.0, 0.5, 0.0, -1.0], places), shape=(2, 9))
    assert SparseBatch.from_scipy(matrix).to_dicts() == [{2: 2.0, 5: 1.5}, {}]


def test_capacity_beyond_the_entries_is_not_converted() -> None:
    batch = SparseBatch.from_dicts([{4: 1.0}, {2: 0.5}])
    padded = SparseBatch(
        torch.cat([batch.token_ids, torch.full((3,), NO_ID, dtype=torch.int32)]),
        torch.cat([batch.weights, torch.zeros(3)]),
        batch.offsets,
    )
    assert padded.to_dicts() == batch.to_dicts()
    assert (padded.to_scipy(9) != batch.to_scipy(9)).nnz == 0
    assert padded.compact().token_ids.shape == (2,)


def test_nan_weights_are_kept_and_zero_weights_left_out() -> None:
    (text,) = SparseBatch.from_dicts([{1: math.nan, 2: 0.0, 3: -1.0, 4: 1.0}]).to_dicts()
    assert list(text) == [1, 4]
    assert math.isnan(text[1])


@pytest.mark.parametrize("token", ["x", -1, NO_ID, 1.5, None])
def test_ids_that_are_no_token_ids_are_named(token: object) -> None:
    with pytest.raises(ValueError, match=r"dicts\[1\] has the token id"):
        SparseBatch.from_dicts([{}, {token: 1.0}])  # type: ignore[dict-item]


def test_an_id_given_as_number_and_as_string_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dicts\[0\] has the token id 7 twice"):
        SparseBatch.from_dicts([{7: 1.0, "7": 2.0}])  # type: ignore[dict-item]


def test_a_vocabulary_too_small_for_the_ids_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary is 9, but token id 9 occurs"):
        SparseBatch.from_dicts([{9: 1.0}]).to_scipy(9)
