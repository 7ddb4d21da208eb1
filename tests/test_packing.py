"""Packed rows and offsets: to and from padded tensors, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3kernels import offsets_from_lengths, pack, unpack
from m3kernels.packing import sequence_of_row

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=6)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool)


def offsets_of(lengths: list[int]) -> torch.Tensor:
    return offsets_from_lengths(torch.tensor(lengths))


@given(LENGTHS, st.sampled_from(DTYPES), st.integers(0, 3))
def test_unpack_then_pack_gives_the_rows_back(lengths: list[int], dtype: torch.dtype, slack: int) -> None:
    offsets = offsets_of(lengths)
    rows = torch.randint(0, 2, (sum(lengths), 3)).to(dtype)
    padded = unpack(rows, offsets, max(lengths) + slack)
    assert padded.shape == (len(lengths), max(lengths) + slack, 3)
    for sequence, length in enumerate(lengths):
        torch.testing.assert_close(padded[sequence, :length], rows[offsets[sequence] : offsets[sequence + 1]])
        assert not padded[sequence, length:].any()
    torch.testing.assert_close(pack(padded, offsets), rows)


@given(LENGTHS)
def test_gradients_of_pack_and_unpack_are_each_other(lengths: list[int]) -> None:
    offsets = offsets_of(lengths)
    rows = torch.randn(sum(lengths), 2, dtype=torch.float64, requires_grad=True)
    padded = torch.randn(len(lengths), max(lengths) + 1, 2, dtype=torch.float64, requires_grad=True)
    factor = torch.randn_like(padded)
    (grad,) = torch.autograd.grad((unpack(rows, offsets, max(lengths) + 1) * factor).sum(), rows)
    torch.testing.assert_close(grad, pack(factor, offsets))
    factor = torch.randn_like(rows)
    (grad,) = torch.autograd.grad((pack(padded, offsets) * factor).sum(), padded)
    torch.testing.assert_close(grad, unpack(factor, offsets, max(lengths) + 1))


def test_sequence_of_row_skips_empty_sequences() -> None:
    offsets = torch.tensor([0, 0, 2, 2, 3, 3], dtype=torch.int32)
    assert sequence_of_row(offsets, 3).tolist() == [1, 1, 3]


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 3], r"offsets\[0\] is 1"),
        ([0, 3, 2], "decreases from 3 to 2 at entry 2"),
        ([0, 2, 3], "ends at 3, but there are 4 rows"),
    ],
)
def test_offsets_that_do_not_describe_the_rows_are_refused(offsets: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack(torch.zeros(4, 2), torch.tensor(offsets, dtype=torch.int32), 4)


def test_a_sequence_longer_than_the_padded_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sequence of 3 rows.*at most 2"):
        unpack(torch.zeros(3, 1), torch.tensor([0, 3], dtype=torch.int32), 2)
    with pytest.raises(ValueError, match=r"sequence of 3 rows.*at most 2"):
        pack(torch.zeros(1, 2, 1), torch.tensor([0, 3], dtype=torch.int32))


def test_wrong_types_are_named() -> None:
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(TypeError, match=r"offsets has dtype torch\.int64"):
        pack(torch.zeros(1, 1), offsets.long())
    with pytest.raises(TypeError, match="rows must be a tensor of a floating"):
        unpack([1, 2], offsets)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="offsets has 2 entries; accepted: 4"):
        pack(torch.zeros(3, 1), offsets)
    with pytest.raises(ValueError, match="lengths run from -1 to 2"):
        offsets_from_lengths(torch.tensor([-1, 2]))
    with pytest.raises(TypeError, match="lengths must be an int32 or int64 tensor"):
        offsets_from_lengths(torch.tensor([0.5]))
