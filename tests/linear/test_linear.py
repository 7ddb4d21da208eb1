"""linear, layer_norm and embed_tokens equal their references in value and gradient, on every CPU path and dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import m3kernels
from m3kernels import embed_tokens, layer_norm, linear, offsets_from_lengths, pack_linear
from m3kernels.linear import PackedLinear, reference
from m3kernels.linear.ops import LEAST_PACKED_ROWS
from tests.cpu_paths import HERE, on_path

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STORAGE = (*DTYPES, torch.int8)


needs_amx = pytest.mark.skipif("amx" not in HERE, reason="no AMX here")


@pytest.fixture(params=HERE)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with on_path(request.param):
        yield request.param


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def product_tolerance(depth: int, dtype: torch.dtype) -> float:
    """Of sums of `depth` products of standard normal numbers with weights of deviation depth ** -0.5, in float32.

    Partial sums of at most about 5 take a rounding each, which add up like a random walk; then one rounding to `dtype`.
    """
    return 5 * (4 * depth**0.5 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps)


def arguments(rows: int, depth: int, columns: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "x": normal(rows, depth, dtype=dtype),
        "weight": (normal(columns, depth) * depth**-0.5).to(dtype),
        "bias": normal(columns, dtype=dtype),
        "residual": normal(rows, columns, dtype=dtype, seed=1),
    }


def spread(x: Tensor) -> float:
    """At least the span of values that the 8-bit codes of each row cover."""
    return float(x.max().clamp(min=0) - x.min().clamp(max=0))


SIZES = [(1, 1, 1), (3, 5, 7), (32, 16, 33), (193, 100, 31), (64, 513, 48), (7, 1100, 130), (400, 64, 1200)]
SIZES += [(2101, 40, 70), (48, 2500, 40)]


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.usefixtures("isa")
def test_packed_linear_equals_the_reference(storage: torch.dtype, size: tuple[int, int, int], gelu: bool) -> None:
    a = arguments(*size)
    packed = pack_linear(a["weight"], storage)
    out = linear(a["x"], packed, a["bias"], activation="gelu" if gelu else None, residual=a["residual"])
    # For int8 the reference quantizes the same float32 rows; the sums of codes are exact in both.
    wide = {name: tensor.double() for name, tensor in a.items()}
    expected = reference.linear_packed(wide["x"], packed, wide["bias"], gelu, wide["residual"])
    tolerance = product_tolerance(size[1], torch.float32)
    if storage == torch.int8:
        # A code whose exact value lies halfway between two may fall either way: one step of one row and weight.
        tolerance += spread(a["x"]) / 255 * float(a["weight"].abs().max())
    torch.testing.assert_close(out, expected.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa")
def test_linear_with_plain_weights_equals_the_float64_reference(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    a = arguments(*size, dtype)
    out = linear(a["x"], a["weight"], a["bias"], activation="gelu", residual=a["residual"])
    wide = {name: tensor.double() for name, tensor in a.items()}
    expected = reference.linear(wide["x"], wide["weight"], wide["bias"], True, wide["residual"])
    assert out.dtype == dtype
    tolerance = product_tolerance(size[1], dtype)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@settings(max_examples=80)
@given(
    isa=st.sampled_from(HERE),
    rows=st.integers(0, 230),
    depth=st.integers(1, 140),
    columns=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    storage=st.sampled_from((*STORAGE, None)),
    with_bias=st.booleans(),
    gelu=st.booleans(),
    with_residual=st.booleans(),
)
def test_linear_on_random_sizes(
    isa: str,
    rows: int,
    depth: int,
    columns: int,
    dtype: torch.dtype,
    storage: torch.dtype | None,
    with_bias: bool,
    gelu: bool,
    with_residual: bool,
) -> None:
    a = arguments(rows, depth, columns, dtype)
    bias, residual = a["bias"] if with_bias else None, a["residual"] if with_residual else None
    weight = a["weight"] if storage is None else pack_linear(a["weight"], storage)
    with on_path(isa):
        out = linear(a["x"], weight, bias, activation="gelu" if gelu else None, residual=residual)
    if isinstance(weight, PackedLinear):
        expected = reference.linear_packed(a["x"], weight, bias, gelu, residual)
    else:
        expected = reference.linear(a["x"], weight, bias, gelu, residual)
    step = 0.0
    if storage == torch.int8 and rows:
        step = spread(a["x"]) / 255 * float(a["weight"].abs().max())
    tolerance = product_tolerance(depth, dtype) + step
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("isa")
def test_int8_result_of_a_row_does_not_depend_on_the_other_rows() -> None:
    a = arguments(200, 96, 260)
    packed = pack_linear(a["weight"], torch.int8)
    together = linear(a["x"], packed, a["bias"])
    for begin, end in ((0, 1), (1, 8), (8, 200)):
        assert torch.equal(linear(a["x"][begin:end], packed, a["bias"]), together[begin:end])


@settings(max_examples=30)
@given(
    rows=st.integers(1, 100),
    depth=st.integers(1, 300),
    columns=st.integers(1, 100),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from([None, "gelu"]),
)
def test_int8_is_the_same_on_every_path(
    rows: int, depth: int, columns: int, dtype: torch.dtype, activation: Literal["gelu"] | None
) -> None:
    a = arguments(rows, depth, columns, dtype)
    packed = pack_linear(a["weight"], torch.int8)
    results = []
    for isa in HERE:
        if isa != "portable":  # which rounds a multiply-add twice
            with on_path(isa):
                results.append(linear(a["x"], packed, a["bias"], activation=activation, residual=a["residual"]))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("isa")
def test_gelu_is_exact_over_its_whole_range() -> None:
    u = torch.cat([torch.linspace(-15, 15, 60001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 40.0, -40.0])])
    # One column and weight 1: the product is u itself.
    out = linear(u[:, None], pack_linear(torch.ones(1, 1)), activation="gelu")[:, 0]
    # torch's own double GELU is no oracle here: 1 + erf cancels for negative numbers.
    expected = u.double() * torch.special.erfc(-u.double() * 0.5**0.5) / 2
    # The exponent, up to 104, is rounded to float32 before 2^x is taken.
    error = (out.double() - expected).abs() / expected.abs().clamp(min=1e-20)
    assert float(error.max()) < 1e-5
    near = expected.abs() > 1e-3
    assert float(error[near].max()) < 10 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("storage", [None, *STORAGE])
@pytest.mark.usefixtures("isa")
def test_one_bad_row_stays_alone(storage: torch.dtype | None) -> None:
    a = arguments(40, 24, 40)
    weight = a["weight"] if storage is None else pack_linear(a["weight"], storage)
    clean = linear(a["x"], weight, a["bias"])
    x = a["x"].clone()
    x[5, 3], x[9, 20] = torch.nan, torch.inf
    out = linear(x, weight, a["bias"])
    assert not torch.isfinite(out[[5, 9]]).any()
    others = [row for row in range(40) if row not in (5, 9)]
    assert torch.equal(out[others], clean[others])


@needs_amx
@pytest.mark.parametrize("storage", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_do_the_same_on_tiles_as_without(dtype: torch.dtype, storage: torch.dtype | None) -> None:
    a = arguments(300, 70, 90, dtype)
    a["x"][[5, 6, 40], [3, 69, 0]] = torch.tensor([torch.inf, torch.nan, -torch.inf]).to(dtype)
    a["x"][200:, 7] = torch.inf
    a["weight"][[10, 80], [4, 60]] = torch.tensor([torch.nan, torch.inf]).to(dtype)
    weight = a["weight"] if storage is None else pack_linear(a["weight"], storage)
    results = {}
    for isa in ("avx512", "amx"):
        with on_path(isa):
            results[isa] = linear(a["x"], weight)
    tolerance = product_tolerance(70, dtype)
    torch.testing.assert_close(results["amx"], results["avx512"], atol=tolerance, rtol=tolerance, equal_nan=True)


def worst_error(x: Tensor, weight: Tensor | PackedLinear, isa: str) -> float:
    """Largest error of a sum in units of the sum of its products' magnitudes."""
    stored = weight.unpack() if isinstance(weight, PackedLinear) else weight
    exact = x.double() @ stored.double().t()
    with on_path(isa):
        out = linear(x, weight)
    assert bool(torch.isfinite(out).all())
    # Each product and each number may be off by 2^-126, where bfloat16 ends.
    lost = 2.0**-125 * (x.shape[1] + x.double().abs().sum(1)[:, None] + stored.double().abs().sum(1))
    error = ((out.double() - exact).abs() - lost).clamp(min=0)
    return float((error / (x.double().abs() @ stored.double().abs().t()).clamp(min=1e-300)).max())


@needs_amx
@pytest.mark.parametrize("storage", [None, *DTYPES])
@pytest.mark.parametrize("depth", [16, 300, 1100])
@pytest.mark.parametrize("scales", [(0, 0), (-40, 40), (100, -60), (-100, 20), (-120, 120), (120, -30), (-110, 110)])
def test_split_sums_are_as_near_as_fma(scales: tuple[int, int], depth: int, storage: torch.dtype | None) -> None:
    x, weight = normal(64, depth) * 2.0 ** scales[0], normal(48, depth) * 2.0 ** scales[1]
    if storage == torch.float16:
        weight = normal(48, depth)
    _compare_with_fma(x, weight if storage is None else pack_linear(weight, storage))


@needs_amx
@pytest.mark.parametrize("span", [3, 20, 60])
def test_split_sums_of_mixed_magnitudes_are_as_near_as_fma(span: int) -> None:
    exponents = torch.randint(-span, span + 1, (64 + 48, 500), generator=torch.Generator().manual_seed(span))
    values = normal(64 + 48, 500) * 2.0**exponents
    _compare_with_fma(values[:64], values[64:].contiguous())
    # Products of one magnitude: what is small in x is large in the weights.
    opposite = 2.0 ** exponents[0]
    _compare_with_fma(normal(64, 500) * opposite, normal(48, 500, seed=5) / opposite)


def _compare_with_fma(x: Tensor, weight: Tensor | PackedLinear) -> None:
    tiles, fma = worst_error(x, weight, "amx"), worst_error(x, weight, "avx512")
    assert tiles <= max(2 * fma, 2.0**-23), f"error {tiles:.2g}, of FMA {fma:.2g}"


@needs_amx
def test_rows_and_weights_of_tiny_numbers_keep_their_precision() -> None:
    x, weight = normal(40, 100), normal(50, 100)
    x[7] *= 1e-37
    weight[9] *= 1e-36
    for isa in ("avx512", "amx"):
        with on_path(isa):
            out = linear(x, weight)
        exact = x.double() @ weight.double().t()
        scale = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1)
        error = (out.double() - exact).abs() / scale
        error[7, 9] = 0  # of 1e-73 nothing is left
        assert float(error.max()) < 1e-6, isa


def test_int8_of_a_zero_row_and_a_zero_weight_row_is_the_bias() -> None:
    a = arguments(3, 20, 5)
    a["x"][1] = 0
    a["weight"][2] = 0
    out = linear(a["x"], pack_linear(a["weight"], torch.int8), a["bias"])
    assert torch.equal(out[1], a["bias"])
    assert torch.equal(out[:, 2], a["bias"][2].expand(3))


def test_int8_survives_the_largest_codes_at_the_greatest_depth() -> None:
    depth = 131072
    weight = torch.tensor([1.0, 0.0]).repeat(depth // 2)  # a pair's whole range in one code
    packed = pack_linear(-weight.expand(3, -1), torch.int8)
    x = torch.stack([torch.ones(depth), -torch.ones(depth)])
    expected = torch.tensor([[-1.0], [1.0]]).expand(2, 3) * depth / 2
    torch.testing.assert_close(linear(x, packed), expected)
    alternating = torch.tensor([1.0, -1.0]).repeat(depth // 2)
    both = pack_linear(alternating.expand(3, -1), torch.int8)
    torch.testing.assert_close(linear(torch.stack([alternating, -alternating]), both), -2 * expected)


@pytest.mark.parametrize("storage", STORAGE)
def test_unpack_gives_the_weights_back(storage: torch.dtype) -> None:
    weight = normal(37, 50)
    packed = pack_linear(weight, storage)
    unpacked = packed.unpack().float()
    if storage == torch.int8:
        assert packed.scales is not None
        assert bool(((unpacked - weight).abs() <= packed.scales[:, None] * 0.5001).all())
    else:
        assert torch.equal(unpacked, weight.to(storage).float())


def test_rows_at_a_distance_are_read_in_place() -> None:
    a = arguments(50, 24, 40)
    wide = normal(50, 60)
    wide[:, 10:34] = a["x"]
    assert torch.equal(linear(wide[:, 10:34], a["weight"]), linear(a["x"], a["weight"]))
    assert torch.equal(linear(a["x"].t().contiguous().t(), a["weight"]), linear(a["x"], a["weight"]))


def gradients(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    direction = normal(*out.shape, seed=9).to(out.dtype)
    return list(torch.autograd.grad((out * direction).sum(), leaves))


@pytest.mark.parametrize("rows", [LEAST_PACKED_ROWS - 1, LEAST_PACKED_ROWS + 30])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradients_of_linear_equal_the_float64_reference(activation: str | None, rows: int) -> None:
    a = list(arguments(rows, 40, 50).values())

    def layer(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return linear(x, weight, bias, activation=activation, residual=residual)  # type: ignore[arg-type]

    expected = gradients(
        lambda x, w, b, r: reference.linear(x, w, b, activation is not None, r), [tensor.double() for tensor in a]
    )
    for grad, reference_grad in zip(gradients(layer, a), expected):
        tolerance = product_tolerance(max(rows, 50), torch.float32) * float(reference_grad.abs().max())
        torch.testing.assert_close(grad.double(), reference_grad, atol=tolerance, rtol=0)


@pytest.mark.parametrize("storage", STORAGE)
def test_gradients_through_packed_weights_are_those_of_the_weights_they_stand_for(storage: torch.dtype) -> None:
    a = arguments(35, 40, 50)
    packed = pack_linear(a["weight"], storage)
    leaves = [a["x"], a["bias"], a["residual"]]
    grads = gradients(lambda x, b, r: linear(x, packed, b, activation="gelu", residual=r), leaves)
    stored = packed.unpack().float()
    expected = gradients(lambda x, b, r: reference.linear(x, stored, b, True, r), leaves)
    for grad, reference_grad in zip(grads, expected):
        torch.testing.assert_close(grad, reference_grad, atol=1e-5, rtol=1e-5)


@settings(max_examples=30)
@given(
    rows=st.integers(0, 40),
    width=st.sampled_from([1, 7, 8, 33, 384, 1024, 5001]),
    dtype=st.sampled_from(DTYPES),
    with_residual=st.booleans(),
)
def test_layer_norm_equals_the_reference(rows: int, width: int, dtype: torch.dtype, with_residual: bool) -> None:
    x, residual = normal(rows, width, dtype=dtype) * 3 + 5, normal(rows, width, dtype=dtype, seed=2)
    weight, bias = normal(width, dtype=dtype), normal(width, dtype=dtype, seed=3)
    added = residual if with_residual else None
    out = layer_norm(x, weight, bias, added, eps=1e-5)
    expected = reference.layer_norm(
        x.double(), weight.double(), bias.double(), None if added is None else added.double(), 1e-5
    )
    # The mean is about 5 in deviations of 3: of each element a few float32 roundings, one of the result's dtype.
    scale = max(float(expected.abs().max()), 1.0) if rows else 1.0
    tolerance = scale * (32 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=0)


@pytest.mark.usefixtures("isa")
def test_layer_norm_does_not_cancel_far_from_zero() -> None:
    x = normal(4, 384) + 1000
    out = layer_norm(x, torch.ones(384), torch.zeros(384))
    expected = reference.layer_norm(x.double(), torch.ones(384).double(), torch.zeros(384).double(), None, 1e-5)
    # The mean of 384 numbers near 1000 is off by a few roundings of 1000, which shift all deviations of size 1 alike.
    torch.testing.assert_close(out.double(), expected, atol=4 * 1000 * torch.finfo(torch.float32).eps, rtol=0)


def test_gradients_of_layer_norm_equal_the_float64_reference() -> None:
    leaves = [normal(13, 48), normal(48), normal(48, seed=1), normal(13, 48, seed=2)]
    grads = gradients(lambda x, w, b, r: layer_norm(x, w, b, r), leaves)
    expected = gradients(lambda x, w, b, r: reference.layer_norm(x, w, b, r, 1e-5), [leaf.double() for leaf in leaves])
    for grad, reference_grad in zip(grads, expected):
        tolerance = 64 * torch.finfo(torch.float32).eps * float(reference_grad.abs().max())
        torch.testing.assert_close(grad.double(), reference_grad, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa")
def test_embed_tokens_equals_the_float64_reference(dtype: torch.dtype) -> None:
    offsets = offsets_from_lengths(torch.tensor([0, 3, 0, 70, 1, 0]))
    ids = torch.randint(0, 30, (74,), dtype=torch.int32)
    tables = [normal(30, 20), normal(75, 20), normal(20), normal(20, seed=1), normal(20, seed=2)]
    out = embed_tokens(ids, offsets, *(table.to(dtype) for table in tables), first_position=2)
    wide = [table.to(dtype).double() for table in tables]
    expected = reference.embed_tokens(ids, offsets, wide[0], wide[1], wide[2], wide[3], wide[4], 2, 1e-5)
    scale = float(expected.abs().max())
    tolerance = scale * (32 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=0)


def test_float64_goes_through_the_reference() -> None:
    a = {name: tensor.double() for name, tensor in arguments(40, 20, 30).items()}
    assert torch.equal(
        linear(a["x"], a["weight"], a["bias"]), reference.linear(a["x"], a["weight"], a["bias"], False, None)
    )
    assert m3kernels.layer_norm(a["x"], a["x"][0], a["x"][1]).dtype == torch.float64
