"""Every entry of every tile table compiles without spilled registers, within shared memory, onto tensor cores.

The facts of all entries are recorded in benchmarks/results/static; a stale record (other source, tiles or Triton) is
not trusted: then everything is compiled here, which takes minutes. A few entries are always compiled anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from m3kernels import compiled_tables
from m3kernels.compiled_facts import CompiledFacts, compile_facts

ROOT = Path(__file__).parents[2]
OPS = ("attention", "maxsim")
ARCHITECTURES = (80, 90, 100)
PRODUCT_INSTRUCTION = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}


@pytest.fixture(autouse=True, scope="module")
def triton_cache() -> Iterator[None]:
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(ROOT / ".cache" / "triton")
    yield
    if before is None:
        del os.environ["TRITON_CACHE_DIR"]
    else:
        os.environ["TRITON_CACHE_DIR"] = before


def record(op: str) -> Path:
    return ROOT / "benchmarks" / "results" / "static" / f"{op}.json"


@cache
def all_facts(op: str) -> dict[str, CompiledFacts]:
    recorded = compiled_tables.read_record(op, record(op))
    return recorded or compiled_tables.compile_entries(compiled_tables.entries(op))


@pytest.mark.parametrize("op", OPS)
def test_tables_cover_the_architectures(op: str) -> None:
    assert {entry.architecture for entry in compiled_tables.entries(op)} == set(ARCHITECTURES)
    assert set(all_facts(op)) == {entry.name for entry in compiled_tables.entries(op)}


@pytest.mark.parametrize("op", OPS)
def test_no_entry_spills_or_exceeds_shared_memory(op: str) -> None:
    bad = {name: facts for name, facts in all_facts(op).items() if facts.spilled or not facts.fits}
    assert not bad


@pytest.mark.parametrize("op", OPS)
def test_the_table_of_sm_80_fits_the_smaller_shared_memory_of_the_devices_that_share_it(op: str) -> None:
    sizes = {name: facts.shared_bytes for name, facts in all_facts(op).items() if facts.architecture == 80}
    assert max(sizes.values()) <= 99 << 10, sizes


@pytest.mark.parametrize("op", OPS)
def test_every_16_bit_product_runs_on_the_tensor_cores_of_its_architecture(op: str) -> None:
    for name, facts in all_facts(op).items():
        if "/16bit/" not in name or facts.products == 0:
            continue
        used = PRODUCT_INSTRUCTION[facts.architecture]
        assert facts.fma_products == 0 and facts.counts[used] > 0, (name, facts)
        others = [other for other in PRODUCT_INSTRUCTION.values() if other != used]
        assert not any(facts.counts[other] for other in others), (name, facts)


@pytest.mark.parametrize("op", OPS)
def test_tf32_runs_on_tensor_cores_and_float32_never_does(op: str) -> None:
    for name, facts in all_facts(op).items():
        on_tensor_cores = sum(facts.counts[instruction] for instruction in PRODUCT_INSTRUCTION.values())
        if "/tf32/" in name and facts.products:
            assert facts.fma_products == 0 and on_tensor_cores > 0, (name, facts)
        if "/float32/" in name:
            assert on_tensor_cores == 0, (name, facts)


@pytest.mark.parametrize("op", OPS)
def test_no_kernel_uses_atomics(op: str) -> None:
    assert not any(facts.counts["atomic"] for facts in all_facts(op).values())


@pytest.mark.parametrize("op", OPS)
def test_entries_compiled_now_equal_the_record(op: str) -> None:
    recorded = compiled_tables.read_record(op, record(op))
    if recorded is None:
        pytest.skip(f"{record(op)} is stale; make it anew with python -m m3kernels.compiled_tables {op} {record(op)}")
    of_16_bit = [entry for entry in compiled_tables.entries(op) if entry.arithmetic == "16bit"]
    by_kernel = {(entry.architecture, entry.kernel): entry for entry in reversed(of_16_bit)}
    some = list(by_kernel.values())[::3]
    for name, facts in compiled_tables.compile_entries(some).items():
        assert facts == recorded[name], name


@triton.jit
def planted_product(a_ptr, b_ptr, out_ptr, K, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, 64)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, 64):
        a = tl.load(a_ptr + m[:, None] * K + start + k[None, :])
        b = tl.load(b_ptr + n[None, :] * K + start + k[:, None])
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    tl.atomic_add(out_ptr + m[:, None] * BLOCK_N + n[None, :], sums)


def planted(dtype: str, block: int, num_warps: int, num_stages: int = 2) -> CompiledFacts:
    signature = {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "out_ptr": "*fp32", "K": "i32"}
    constants = {"PRECISION": "ieee", "BLOCK_M": block, "BLOCK_N": block}
    return compile_facts(
        planted_product,
        {**signature, **dict.fromkeys(constants, "constexpr")},
        constants,
        80,
        aligned=("a_ptr", "b_ptr", "out_ptr", "K"),
        num_warps=num_warps,
        num_stages=num_stages,
    )


def test_the_tool_sees_spills() -> None:
    # 256 x 256 float32 sums over 128 threads are 512 registers a thread, of which 255 exist.
    assert planted("bf16", 256, num_warps=4).spilled
    assert not planted("bf16", 64, num_warps=4).spilled


def test_the_tool_sees_too_much_shared_memory() -> None:
    # Four stages of two 256 x 64 tiles of 2 bytes are 256 KiB; some Triton versions refuse in compilation already.
    assert not planted("bf16", 256, num_warps=8, num_stages=6).fits
    assert planted("bf16", 64, num_warps=4).fits


def test_the_tool_sees_products_off_the_tensor_cores_and_atomics() -> None:
    plain, on_tensor_cores = planted("fp32", 32, num_warps=4), planted("bf16", 32, num_warps=4)
    assert plain.products == 1 and plain.fma_products > 0 and plain.counts["mma.sync"] == 0
    assert on_tensor_cores.products == 1 and on_tensor_cores.fma_products == 0 and on_tensor_cores.counts["mma.sync"]
    assert plain.counts["atomic"] and on_tensor_cores.counts["atomic"]
