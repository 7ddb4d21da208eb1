"""The PTX that Triton and nvcc make of every GPU kernel, executed on the CPU, equals the reference.

sm_80's of all kernels, and sm_90's of Triton's, with wgmma. A choice of dtypes, widths and options; `python -m
benchmarks.ptx_counts` runs all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests.ptx import cases
from tests.ptx.cuda_launches import needs_nvcc


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """torch.empty gives NaN, so that an element nobody writes, or one read before, shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("arithmetic", "width", "options", "architecture"),
    [
        ("bf16", 32, "plain", 80),
        ("fp16", 32, "sampled+dropout", 80),
        ("fp32", 32, "sampled+dropout", 80),
        ("tf32", 32, "plain", 80),
        ("bf16", 64, "sampled", 80),
        ("fp16", 128, "dropout", 80),
        ("bf16", 32, "sampled+dropout", 90),
        ("fp16", 64, "plain", 90),
        ("tf32", 64, "plain", 90),
        ("bf16", 128, "plain", 90),
    ],
)
def test_attention(arithmetic: str, width: int, options: str, architecture: int) -> None:
    outcome = cases.run_attention(arithmetic, width, options, architecture=architecture)
    outcome.check()
    names = [launch.kernel for launch in outcome.launches]
    assert names == ["forward_kernel", "backward_q_kernel", "backward_kv_kernel"]
    for launch in outcome.launches:
        assert (launch.counters.tensor_flops > 0) == (arithmetic != "fp32")
        assert launch.counters.atomics == 0
        assert ("wgmma" in launch.counters.opcodes) == (architecture == 90)


def test_attention_without_a_single_attended_row() -> None:
    """A sequence of one row under sampling attends to nothing: −∞ and zeros, no NaN."""
    outcome = cases.run_attention("bf16", 32, "sampled", lengths=(1, 40), heads=1)
    outcome.check()


@pytest.mark.parametrize(
    ("arithmetic", "width", "architecture"),
    [("bf16", 72, 80), ("fp16", 64, 80), ("fp32", 64, 80), ("tf32", 64, 80), ("bf16", 72, 90), ("tf32", 72, 90)],
)
def test_maxsim(arithmetic: str, width: int, architecture: int) -> None:
    """On sm_90 with query rows for three turns of the gradient of passages, whose products stay in flight."""
    outcome = cases.run_maxsim(
        arithmetic,
        width,
        mean=arithmetic != "fp16",
        floor=arithmetic != "tf32",
        query_lengths=(5, 0, 40) if architecture == 80 else (5, 0, 150),
        architecture=architecture,
    )
    outcome.check()
    kernels = {launch.kernel for launch in outcome.launches}
    assert kernels == {f"{name}_kernel" for name in ("forward", "sum", "backward_q", "backward_p", "pairs_forward")}


@needs_nvcc
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sparse(dtype: torch.dtype) -> None:
    launches = cases.run_sparse(dtype)
    kernels = {launch.kernel.partition("<")[0].removesuffix("_kernel") for launch in launches}
    assert kernels == {
        "winners", "offsets", "gather", "scatter", "token_weights", "invert_rows", "embed_gradient", "sum_parts",
        "scores", "gradient", "sum_splits",
    }  # fmt: skip


@needs_nvcc
def test_sparse_pool_of_a_text_longer_than_a_shared_tile_and_of_odd_width() -> None:
    """2048 tokens fill the tile in shared memory; beyond, runs are merged in global memory."""
    cases.run_sparse(torch.float32, width=7, lengths=(2100, 3), distinct=500)


@needs_nvcc
@pytest.mark.parametrize(
    ("dtype", "width"),
    [(torch.float32, 40), (torch.bfloat16, 4), (torch.bfloat16, 6), (torch.float16, 3), (torch.bool, 7)],
)
def test_packing(dtype: torch.dtype, width: int) -> None:
    cases.run_packing(dtype, width)
