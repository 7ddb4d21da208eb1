"""The recorded counts (docs/gpu_counts.md) are those of the present kernels, and keep what the kernels promise."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import ptx_counts
from benchmarks.gpu_peaks import GPUS


@pytest.fixture(scope="module")
def counts() -> list[ptx_counts.Count]:
    recorded = ptx_counts.read_counts()
    if recorded is None:
        pytest.skip("the counts are of other sources, tiles or another Triton; run python -m benchmarks.ptx_counts")
    return recorded


@pytest.mark.parametrize("architecture", list(ptx_counts.ARCHITECTURES))
def test_counts_made_now_equal_the_record(counts: list[ptx_counts.Count], architecture: int) -> None:
    now = list(ptx_counts.attention_counts("bf16", architecture))
    assert now == [c for c in counts if (c.op, c.architecture, c.arithmetic) == ("attention", architecture, "bf16")]


def test_every_kernel_and_arithmetic_is_counted(counts: list[ptx_counts.Count]) -> None:
    triton = {(c.op, c.kernel, c.architecture, c.arithmetic) for c in counts if c.op in ("attention", "maxsim")}
    kernels = [("attention", name) for name in ("forward", "backward_q", "backward_kv")]
    kernels += [("maxsim", name) for name in ("forward", "sum", "backward_q", "backward_p", "pairs_forward")]
    wanted = [(number, each) for number, arithmetics in ptx_counts.ARCHITECTURES.items() for each in arithmetics]
    assert triton == {(*kernel, *one) for kernel in kernels for one in wanted}
    cuda = {c.kernel.partition("<")[0] for c in counts if c.op not in ("attention", "maxsim")}
    assert cuda == {
        "token_weights", "winners", "offsets", "gather", "invert_rows", "embed_gradient", "sum_parts", "scores",
        "gradient", "sum_splits", "pack", "unpack",
    }  # fmt: skip


def test_no_product_is_computed_in_vain(counts: list[ptx_counts.Count]) -> None:
    """At full tiles; backward_p multiplies by one-hot rows and says so."""
    for c in counts:
        if c.op == "attention" or (c.op == "maxsim" and c.kernel in ("forward", "pairs_forward")):
            assert c.tensor_flops + c.float_flops <= 1.05 * c.minimum_flops, c


def test_products_on_tensor_cores_meet_no_bank_conflicts(counts: list[ptx_counts.Count]) -> None:
    """On sm_90 only attention in 16 bits: wgmma takes tf32 operands with K innermost alone, so that Triton turns tiles
    round in shared memory, and MaxSim's passage tiles share banks (docs/gpu_counts.md says how much)."""
    for c in counts:
        if c.tensor_flops and (c.architecture == 80 or (c.op, c.arithmetic) == ("attention", "bf16")):
            assert c.bank_conflicts <= 0.06 * c.shared_phases, c


def test_sectors_are_used(counts: list[ptx_counts.Count]) -> None:
    """Tiles read whole rows: at least nine tenths of every sector; but tf32 on sm_90 is copied word by word."""
    for c in counts:
        if c.op in ("attention", "maxsim", "packing") and (c.architecture, c.arithmetic) != (90, "tf32"):
            assert c.wanted_bytes >= 0.9 * (c.load_bytes + c.store_bytes), c


def test_a_lower_bound_is_the_slowest_of_its_three_parts() -> None:
    h100 = next(gpu for gpu in GPUS if gpu.name == "H100")
    assert h100.seconds(989.5e12, "16bit", 0, 0) == h100.seconds(494.7e12, "tf32", 0, 0) == 1
    assert h100.seconds(1e12, "16bit", 67e12, 3350e9 / 2) == 1
    assert h100.seconds(0, "16bit", 0, 3350e9) == 1
