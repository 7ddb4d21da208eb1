"""Every shipped configuration compiles without spilled registers, within shared memory, onto tensor cores.

The facts of all configurations are recorded in benchmarks/results/gpu_static.json, each with the hash of what it was
compiled from; a stale one fails here. A few are compiled anew, and the CUDA C++ kernels are read again out of the
library, which is seconds; compiling everything (`m3 bench --static`) is minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from m3kernels import _library, compiled_facts, compiled_tables, machine_code, static_report
from m3kernels.compiled_facts import CompiledFacts, compile_kernel, triton_facts
from m3kernels.compiled_tables import Entry

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "gpu_static.json"
REMAKE = f"m3 bench --static --markdown docs/gpu_static.md --json > {RECORD.relative_to(ROOT)}"
PRODUCT_INSTRUCTION = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
ENTRIES = list(compiled_tables.entries())


@pytest.fixture(autouse=True, scope="module")
def kept_by_triton() -> Iterator[None]:
    with compiled_tables.triton_cache(ROOT / ".cache" / "triton"):
        yield


@cache
def record() -> dict[str, Any]:
    stored = compiled_tables.read_record(RECORD)
    if stored["triton"] != triton.__version__:
        pytest.skip(f"{RECORD.name} is of Triton {stored['triton']}, installed is {triton.__version__}")
    return stored


def recorded() -> dict[Entry, CompiledFacts]:
    held = record()["entries"]
    return {entry: held[entry.name][1] for entry in ENTRIES if entry.name in held}


def test_the_record_holds_every_shipped_configuration_as_it_is_now() -> None:
    hashes = {name: key for name, (key, _) in record()["entries"].items()}
    assert {entry.name: entry.hash for entry in ENTRIES} == hashes, f"stale: {REMAKE}"


def test_the_document_is_made_from_the_record() -> None:
    written = (ROOT / "docs" / "gpu_static.md").read_text()
    assert written == static_report.markdown(recorded(), record()["library"]), f"stale: {REMAKE}"


def test_no_configuration_has_problems() -> None:
    bad = {entry.name: compiled_tables.problems(facts, entry.dtype) for entry, facts in recorded().items()}
    assert not {name: reasons for name, reasons in bad.items() if reasons}


def test_cards_with_100_kib_are_served_within_their_99_kib_a_block() -> None:
    for architecture in (86, 89):
        sizes = {e.name: facts.shared_bytes for e, facts in recorded().items() if e.architecture == architecture}
        assert sizes and max(sizes.values()) <= 99 << 10, sizes


def test_16_bit_products_run_on_the_newest_tensor_cores_tf32_on_some_and_ieee_float32_on_none() -> None:
    for entry, own in recorded().items():
        used = [kind for kind in machine_code.TENSOR_CORE if own.loop_counts[kind]]
        if entry.dtype == "fp32" or not own.products:
            assert not used, (entry.name, used)
        elif entry.dtype == "tf32":  # of tiles below 64 rows only mma.sync takes the product
            assert len(used) == 1, (entry.name, used)
        else:
            assert used == [PRODUCT_INSTRUCTION[entry.architecture]], (entry.name, used)


def test_the_main_loop_holds_the_products_of_the_source_in_16_bits_without_one_too_many() -> None:
    """Warps beyond a tile's rows repeat its products. Small tf32 tiles put up with that."""
    for entry, own in recorded().items():
        if own.products and entry.dtype != "fp32":
            turns = own.loop_tensor_flops * own.num_warps / entry.block_flops
            assert turns == 1 or (entry.dtype == "tf32" and 1 < turns <= 2), (entry.name, turns)


def test_no_kernel_uses_atomics() -> None:
    assert not [entry.name for entry, facts in recorded().items() if facts.counts["atomic"]]


def test_configurations_compiled_now_equal_the_record() -> None:
    facts = recorded()
    plain = [entry for entry in ENTRIES if entry.dtype == "bf16" and not entry.options]
    some = list({(entry.op, entry.architecture, entry.kernel): entry for entry in reversed(plain)}.values())[::5]
    assert len(some) >= 6
    for entry, value in compiled_tables.compile_entries(some).items():
        assert value == facts[entry], entry.name


@pytest.mark.skipif(_library.CUDA_LIBRARY is None, reason="built without nvcc")
def test_cuda_kernels_of_the_library_do_not_spill_and_are_those_of_the_record() -> None:
    found = compiled_tables.library_entries()
    architectures = {name.split("/")[1] for name in found}
    if architectures != {f"sm_{number}" for number in compiled_tables.ARCHITECTURES}:
        pytest.skip(f"the library was built for other architectures: {sorted(architectures)}")
    assert not {name: compiled_tables.problems(facts, "-") for name, facts in found.items() if facts.spilled}
    assert set(found) == set(record()["library"]), f"stale: {REMAKE}"


def test_facts_are_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M3_CACHE_DIR", str(tmp_path))
    entry = next(entry for entry in ENTRIES if entry.kernel == "sum")
    done: list[int] = []
    first = compiled_tables.compile_entries([entry], compiled_tables.cache_folder(), done.append)
    (file,) = (tmp_path / "static").iterdir()
    monkeypatch.setattr(compiled_tables, "facts_of", None)
    assert compiled_tables.compile_entries([entry], compiled_tables.cache_folder(), done.append) == first
    assert done == [0, 1, 1]
    file.write_text("{")  # half a file of another writer is compiled anew, not believed
    with pytest.raises(TypeError):
        compiled_tables.compile_entries([entry], compiled_tables.cache_folder())


def test_the_hash_follows_the_source_and_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    before = compiled_facts.configuration_hash(planted_product, {"BLOCK_M": 32})
    assert compiled_facts.configuration_hash(planted_product, {"BLOCK_M": 64}) != before
    monkeypatch.setattr(compiled_facts, "_source", lambda kernel: "")
    assert compiled_facts.configuration_hash(planted_product, {"BLOCK_M": 32}) != before


@triton.jit
def called(x):
    return x + PLANTED


PLANTED = tl.constexpr(3)


@triton.jit
def calling(x_ptr):
    """Documentation that compiles to nothing."""
    # A comment, too.
    tl.store(x_ptr, called(tl.load(x_ptr)))


def test_the_hash_covers_called_functions_and_constants_but_no_comments() -> None:
    source = compiled_facts._source(calling)
    assert "x + PLANTED" in source and "PLANTED=3" in source
    assert "ocumentation" not in source and "comment" not in source


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
    compiled = compile_kernel(
        planted_product,
        {**signature, **dict.fromkeys(constants, "constexpr")},
        constants,
        80,
        aligned=("a_ptr", "b_ptr", "out_ptr", "K"),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return triton_facts(compiled)


def test_the_tool_sees_spills() -> None:
    # 256 x 256 float32 sums over 128 threads are 512 registers a thread, of which 255 exist.
    assert planted("bf16", 256, num_warps=4).spilled
    assert not planted("bf16", 64, num_warps=4).spilled


def test_the_tool_sees_too_much_shared_memory() -> None:
    # Four stages of two 256 x 64 tiles of 2 bytes are 256 KiB; some Triton versions refuse in compilation already.
    assert not planted("bf16", 256, num_warps=8, num_stages=6).fits
    assert planted("bf16", 64, num_warps=4).fits


def test_the_tool_sees_wgmma_products_that_wait_for_each_other() -> None:
    """A second stage leaves products in flight while the next A is written to their registers."""
    shipped = next(entry for entry in ENTRIES if entry.name == "maxsim/sm_90/backward_p/tf32/1024/plain")
    block = shipped.tile[:-1]
    facts = [compiled_tables.facts_of(replace(shipped, tile=(*block, stages))) for stages in (1, 2)]
    assert [one.serialized_products > 0 for one in facts] == [False, True]
    assert any("wait for each other" in problem for problem in compiled_tables.problems(facts[1], "tf32"))


def test_the_shape_of_a_tcgen05_product_is_the_constant_that_its_descriptor_got_last() -> None:
    def listing(*code: str) -> str:
        return "".join(f"        /*{16 * i:04x}*/                   {line} ;\n" for i, line in enumerate(code))

    first, second, product = (
        "UMOV UR35, 0x8100490",
        "UMOV UR35, 0x4200910",
        "UTCHMMA gdesc[UR4], tmem[UR6], idesc[UR35]",
    )
    assert machine_code._parse(listing(first, product))[0][-1] == "UTCHMMA.128x64x16"
    assert machine_code._parse(listing(first, second, product))[0][-1] == "UTCHMMA.64x128x8"
    assert machine_code.tensor_flops(["UTCHMMA.128x64x16"], num_warps=8) == 2 * 128 * 64 * 16 // 8
    for unknown in ("UIADD3 UR35, UR35, UR2", "@P0 UMOV UR35, 0x8100490"):
        code, _ = machine_code._parse(listing(first, unknown, product))
        assert code[-1] == "UTCHMMA.unknown" and machine_code.tensor_flops(code, num_warps=8) == 0


def test_tensor_memory_limits_the_blocks_of_a_multiprocessor() -> None:
    facts = recorded()[next(entry for entry in ENTRIES if entry.name == "maxsim/sm_100/pairs_forward/bf16/32/plain")]
    alone = replace(facts, tensor_columns=512)
    assert alone.blocks_per_multiprocessor == 1 < replace(facts, tensor_columns=0).blocks_per_multiprocessor


def test_the_tool_sees_products_off_the_tensor_cores_and_atomics() -> None:
    plain, on_tensor_cores = planted("fp32", 32, num_warps=4), planted("bf16", 32, num_warps=4)
    assert plain.products == 1 and plain.fma_products > 0 and plain.counts["mma.sync"] == 0
    assert on_tensor_cores.products == 1 and on_tensor_cores.fma_products == 0 and on_tensor_cores.counts["mma.sync"]
    assert plain.counts["atomic"] and on_tensor_cores.counts["atomic"]
