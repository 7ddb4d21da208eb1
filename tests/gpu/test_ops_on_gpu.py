"""Every op on an NVIDIA GPU: values and gradients, repeatability, CUDA graphs, streams, several devices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import m3kernels
from tests.gpu.cases import CASES, DEVICE, DTYPES, Case, errors, leaves_on, truth, value_and_gradients

each_op = pytest.mark.parametrize("name", list(CASES))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_dtype
@each_op
def test_values_and_gradients_equal_the_float64_reference(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]()
    actual = value_and_gradients(case.make(DEVICE), leaves_on(case, DEVICE, dtype))
    found = errors(actual, truth(case, dtype))
    # Similarities that differ by less than a float32 sum rounds may swap winners, which moves a few gradient rows.
    allowed = max(case.bound(dtype), 1e-3) if "maxsim" in name else case.bound(dtype)
    assert max(found) <= allowed, (found, allowed)


@each_op
def test_float64_takes_the_reference(name: str) -> None:
    case = CASES[name]()
    actual = value_and_gradients(case.make(DEVICE), leaves_on(case, DEVICE, torch.float64))
    assert max(errors(actual, truth(case, torch.float64))) <= 1e-12


@each_op
def test_a_second_run_gives_the_same_bits(name: str) -> None:
    case = CASES[name]()
    leaves = leaves_on(case, DEVICE, torch.bfloat16)
    function = case.make(DEVICE)
    first, second = (value_and_gradients(function, leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("op", ["attention", "maxsim", "sparse_embed"])
def test_an_empty_batch_gives_empty_results(op: str) -> None:
    none = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    rows = torch.zeros(0, 64, device=DEVICE)
    ids = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    if op == "attention":
        q = torch.zeros(0, 2, 64, device=DEVICE)
        assert m3kernels.flash_attention_varlen(q, q, q, none).shape == (0, 2, 64)
    elif op == "maxsim":
        assert m3kernels.maxsim(rows, rows, none, none).shape == (0, 0)
    else:
        weight, bias = torch.zeros(64, device=DEVICE), torch.zeros(1, device=DEVICE)
        assert m3kernels.sparse_embed(rows, weight, bias, ids, none).weights.shape == (0,)


def test_strided_heads_of_a_fused_projection_are_read_in_place() -> None:
    fused = torch.randn(40, 3, 2, 32, device=DEVICE)
    offsets = torch.tensor([0, 13, 40], dtype=torch.int32, device=DEVICE)
    q, k, v = fused.unbind(1)
    expected = m3kernels.flash_attention_varlen(q.contiguous(), k.contiguous(), v.contiguous(), offsets)
    assert torch.equal(m3kernels.flash_attention_varlen(q, k, v, offsets), expected)


def test_tf32_is_within_its_rounding() -> None:
    """Ten bits of mantissa: products are off by 2**-11 of each factor, as with 16-bit inputs of that width."""
    case = CASES["attention of width 64"]()
    q, k, v = (x.to(DEVICE) for x in case.leaves)
    offsets = torch.tensor([0, q.shape[0]], dtype=torch.int32, device=DEVICE)
    out = m3kernels.flash_attention_varlen(q, k, v, offsets, allow_tf32=True)
    exact = m3kernels.flash_attention_varlen(*(x.double().cpu() for x in (q, k, v)), offsets.cpu())
    assert errors([out], [exact])[0] <= 8 * 2**-11


@pytest.mark.device
@each_op
def test_forward_and_backward_are_captured_in_a_graph_that_sees_new_values(name: str) -> None:
    case = CASES[name]()
    function, leaves = case.make(DEVICE), leaves_on(case, DEVICE, torch.bfloat16)
    value_and_gradients(function, leaves)  # compiles, which capture forbids
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradients(function, leaves)
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(leaf.flip(0))
    graph.replay()
    expected = value_and_gradients(function, leaves)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected))


@pytest.mark.device
@each_op
def test_the_op_runs_on_the_current_stream(name: str) -> None:
    """The inputs arrive late on a stream of their own: whoever launches elsewhere reads zeros."""
    case = CASES[name]()
    function, values = case.make(DEVICE), leaves_on(case, DEVICE, torch.bfloat16)
    expected = value_and_gradients(function, values)
    late = [torch.zeros_like(x).requires_grad_() for x in values]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            for leaf, value in zip(late, values):
                leaf.copy_(value)
        actual = value_and_gradients(function, late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


@pytest.mark.device
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
@each_op
def test_tensors_of_a_device_that_is_not_the_current_one(name: str) -> None:
    case = CASES[name]()
    expected = value_and_gradients(case.make("cuda:0"), leaves_on(case, "cuda:0", torch.bfloat16))
    with torch.cuda.device(0):
        actual = value_and_gradients(case.make("cuda:1"), leaves_on(case, "cuda:1", torch.bfloat16))
    assert all(x.device == torch.device("cuda:1") for x in actual)
    if torch.cuda.get_device_capability(0) == torch.cuda.get_device_capability(1):
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(actual, expected))


@pytest.mark.device
def test_no_op_waits_for_the_host() -> None:
    """Offsets stay on the device: any synchronisation raises."""
    prepared: list[tuple[Case, object, list[Tensor]]] = []
    for make in CASES.values():
        case = make()
        function, leaves = case.make(DEVICE), leaves_on(case, DEVICE, torch.bfloat16)
        value_and_gradients(function, leaves)
        prepared.append((case, function, leaves))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _, function, leaves in prepared:
            value = function(*leaves)  # type: ignore[operator]
            torch.autograd.grad(value, leaves, torch.ones_like(value))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.device
def test_a_function_of_several_ops_compiles_into_one_graph() -> None:
    offsets = torch.tensor([0, 30, 30, 47], dtype=torch.int32, device=DEVICE)
    ids = torch.arange(47, dtype=torch.int32, device=DEVICE) % 9

    def step(hidden: Tensor) -> Tensor:
        heads = hidden.reshape(47, 2, 32)
        attended = m3kernels.flash_attention_varlen(heads, heads, heads, offsets).flatten(1)
        late = m3kernels.maxsim(attended, attended, offsets, offsets)
        weight, bias = hidden.new_ones(64), hidden.new_zeros(1)
        lexical = m3kernels.sparse_embed(attended, weight, bias, ids, offsets)
        return late.sum() + m3kernels.sparse_scores(lexical, lexical).sum()

    hidden = torch.randn(47, 64, device=DEVICE, requires_grad=True)
    (expected,) = torch.autograd.grad(step(hidden), hidden)
    (actual,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(hidden), hidden)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
