"""The launches bind: Triton's own argument binder specialises every kernel from real tensors and compiles it.

There is no GPU to launch on, so a driver that only names the architecture stands in for CUDA's, and kernels are warmed
up (bound, specialised, compiled) instead of launched. The ahead-of-time tables name argument types by hand; here they
come from the calls that the ops make.
"""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime import driver
from triton.runtime.jit import JITFunction

from m3kernels import _tiles
from m3kernels.attention import triton_kernels as attention
from m3kernels.maxsim import triton_kernels as maxsim
from tests.triton.named_device import NamedDevice

OFFSETS = torch.tensor([0, 5, 5, 40], dtype=torch.int32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Kernels compiled by the launches of a test, by name."""
    kernels: dict[str, Any] = {}
    run = JITFunction.run

    def warm_up(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        assert all(size > 0 for size in grid)
        kernels[self.__name__] = run(self, *arguments, grid=grid, warmup=True, **options)
        return kernels[self.__name__]

    monkeypatch.setattr(JITFunction, "run", warm_up)
    monkeypatch.setattr(driver, "_active", NamedDevice(90))
    return kernels


def gpu_code(kernel: Any) -> str:
    return str(kernel.asm["ttgir"])


def test_attention_launches(compiled: dict[str, Any]) -> None:
    fused = torch.randn(40, 3, 2, 64).bfloat16()
    q, k, v = fused.unbind(1)
    tiles = _tiles.for_architecture("attention", 90)
    options = attention.Options(0.125, 0.5, 0.1, 2**40, False)
    out, log_sum_exp = attention.forward(q, k, v, OFFSETS, options, tiles)
    attention.backward(out, q, k, v, out, log_sum_exp, OFFSETS, options, tiles)
    assert set(compiled) == {"forward_kernel", "backward_q_kernel", "backward_kv_kernel"}
    for kernel in compiled.values():
        # Asynchronous copies of 16 bytes need the alignment that the binder found in the tensors.
        assert "async_copy_global_to_local" in gpu_code(kernel)
        assert "warp_group_dot" in gpu_code(kernel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_maxsim_launches(compiled: dict[str, Any], dtype: torch.dtype) -> None:
    rows = (torch.randn(40, 64).to(dtype), torch.randn(40, 64).to(dtype), OFFSETS, OFFSETS)
    tiles = _tiles.for_architecture("maxsim", 90)
    floor = torch.tensor([True, False, True])
    pairs = torch.tensor([[0, 1], [2, 2]], dtype=torch.int32)
    scores, argmax = maxsim.forward(*rows, floor, True, True, False, tiles)
    maxsim.backward(scores, *rows, floor, argmax, True, False, tiles)
    listed = maxsim.pairs_forward(*rows, pairs, None, True, False, tiles)
    maxsim.pairs_backward(listed, *rows, pairs, None, True, False, tiles)
    names = ("forward", "sum", "pairs_forward", "backward_q", "backward_p")
    assert set(compiled) == {f"{name}_kernel" for name in names}
    on_tensor_cores = {name for name in names if "warp_group_dot" in gpu_code(compiled[f"{name}_kernel"])}
    assert on_tensor_cores == ({"forward", "pairs_forward", "backward_p"} if dtype == torch.bfloat16 else set())


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[tuple[str, ...]]]:
    """Sets of compile-time switches that the launches of a test turn on, by kernel; nothing is compiled."""
    found: dict[str, set[tuple[str, ...]]] = {}

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        on = tuple(name for name, value in options.items() if value is True and name.isupper())
        found.setdefault(self.__name__.removesuffix("_kernel"), set()).add(on)

    monkeypatch.setattr(JITFunction, "run", record)
    return found


def option_sets(module: ModuleType) -> dict[str, set[tuple[str, ...]]]:
    return {kernel: set(sets) for kernel, sets in module.OPTION_SETS.items()}


def test_attention_turns_on_the_recorded_sets_of_options_and_no_others(
    switches: dict[str, set[tuple[str, ...]]],
) -> None:
    rows = torch.randn(40, 2, 64)
    tiles = _tiles.for_architecture("attention", 80)
    for keep, dropout in itertools.product((None, 0.5), (0.0, 0.1)):
        options = attention.Options(0.125, keep, dropout, 1, False)
        out, log_sum_exp = attention.forward(rows, rows, rows, OFFSETS, options, tiles)
        attention.backward(out, rows, rows, rows, out, log_sum_exp, OFFSETS, options, tiles)
    assert switches == option_sets(attention)


def test_maxsim_turns_on_the_recorded_sets_of_options_and_no_others(switches: dict[str, set[tuple[str, ...]]]) -> None:
    rows = (torch.randn(40, 64), torch.randn(40, 64), OFFSETS, OFFSETS)
    tiles = _tiles.for_architecture("maxsim", 80)
    pairs = torch.tensor([[0, 1], [2, 2]], dtype=torch.int32)
    for floor, mean, save in itertools.product((None, torch.tensor([True, False, True])), (False, True), (False, True)):
        scores, argmax = maxsim.forward(*rows, floor, mean, save, False, tiles)
        maxsim.backward(scores, *rows, floor, argmax, mean, False, tiles)
        listed = maxsim.pairs_forward(*rows, pairs, floor, mean, False, tiles)
        maxsim.pairs_backward(listed, *rows, pairs, floor, mean, False, tiles)
    assert switches == option_sets(maxsim)


def test_a_call_takes_the_tile_of_its_options_where_the_table_has_one() -> None:
    plain, dropout = [128, 64, 4, 3], [128, 64, 8, 3]
    entries = {"forward": {"16bit": {"32": [64, 64, 4, 2], "64": plain, "64 dropout": dropout}}}
    table = _tiles.TileTable(90, entries)

    def found(width: int, *options: str) -> _tiles.Tile:
        return table.find("forward", torch.bfloat16, width, False, options)

    assert found(33, "DROPOUT") == found(64, "DROPOUT") == _tiles.Tile.from_list(dropout)
    assert found(64) == found(64, "SAMPLED") == found(64, "SAMPLED", "DROPOUT") == _tiles.Tile.from_list(plain)
    assert found(32, "DROPOUT") == _tiles.Tile.from_list([64, 64, 4, 2])


@pytest.mark.parametrize("op", ["attention", "maxsim"])
def test_tiles_for_options_name_sets_that_calls_turn_on(op: str) -> None:
    sets = {"attention": attention, "maxsim": maxsim}[op].OPTION_SETS
    for table in _tiles.load(op).values():
        for kernel, columns in table.entries.items():
            named = {_tiles.options_text(options) for options in sets[kernel]}
            for listed in columns.values():
                assert {key.partition(" ")[2] for key in listed} <= named
                assert {int(key.split()[0]) for key in listed} == set(_tiles.widths(listed))
