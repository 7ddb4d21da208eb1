"""What runs on which GPU, and what an op says where its kernel does not serve one; needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import m3kernels
from m3kernels import _library, gpu_support, packing
from m3kernels.attention import ops as attention
from m3kernels.maxsim import ops as maxsim
from m3kernels.sparse import ops as sparse

OFFSETS = torch.tensor([0, 3, 5], dtype=torch.int32)
ROWS = torch.randn(5, 16)
HEADS = torch.randn(5, 2, 32)
ATTENTION = (HEADS, HEADS, HEADS, OFFSETS, 5, 0.2, None, 0.0, 0, False)
MAXSIM = (ROWS, ROWS, OFFSETS, OFFSETS, None, True, True, False)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cached = (gpu_support.triton_obstacle, gpu_support.cuda_obstacle, gpu_support._triton_kernels)
    for function in cached:
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in cached:
        function.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], held: tuple[str, ...]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(_library, "CUDA_LIBRARY", Path("_C_cuda.so"))
    monkeypatch.setattr(gpu_support, "cuda_architectures", lambda path: held)


def test_an_old_card_is_told_what_it_lacks_and_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    pretend(monkeypatch, (7, 5), ("sm_80", "sm_90"))
    for call in (lambda: attention._forward_cuda(*ATTENTION), lambda: maxsim._forward_cuda(*MAXSIM)):
        with pytest.raises(RuntimeError, match=r"need sm_80 or newer.*this GPU is sm_75; M3_GPU_REFERENCE=1 runs"):
            call()
    with pytest.raises(RuntimeError, match=r"m3::pack: .* built for sm_80, sm_90, this GPU is sm_75;.*M3_CUDA_ARCHS="):
        packing._pack_cuda(ROWS[None], OFFSETS[:2], 3)


def test_the_reference_runs_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M3_GPU_REFERENCE", "1")
    pretend(monkeypatch, (7, 5), ())
    out, _ = attention._forward_cuda(*ATTENTION)
    torch.testing.assert_close(out, m3kernels.flash_attention_varlen(HEADS, HEADS, HEADS, OFFSETS, scale=0.2))
    scores, _ = maxsim._forward_cuda(*MAXSIM)
    torch.testing.assert_close(scores, m3kernels.maxsim(ROWS, ROWS, OFFSETS, OFFSETS))
    padded = packing._unpack_cuda(ROWS, OFFSETS, 3)
    assert torch.equal(padded, m3kernels.unpack(ROWS, OFFSETS, 3))
    assert torch.equal(packing._pack_cuda(padded, OFFSETS, 5), ROWS)
    assert sparse._kernel("sparse_pool", ROWS.to("meta")) is sparse.reference.sparse_pool
    assert {one.implementation for one in gpu_support.served_by_gpus({"gpu": (7, 5)})} == {"plain PyTorch reference"}


def test_a_misspelt_request_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M3_GPU_REFERENCE", "yes")
    with pytest.raises(ValueError, match="M3_GPU_REFERENCE is 'yes'; accepted: 0 and 1"):
        gpu_support.reference_wanted()


def test_missing_and_old_triton_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_support.importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in gpu_support.triton_obstacle((8, 0))
    monkeypatch.undo()
    gpu_support.triton_obstacle.cache_clear()
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(gpu_support, "_triton_version", lambda: (3, 1))
    assert "Triton 3.1 is too old" in gpu_support.triton_obstacle((8, 0))


@pytest.mark.parametrize(
    ("held", "capability", "runs"),
    [
        (("sm_80", "sm_90"), (8, 0), True),
        (("sm_80", "sm_90"), (8, 9), True),
        (("sm_80", "sm_90"), (12, 0), False),
        (("sm_86",), (8, 0), False),
        (("sm_80", "compute_90"), (12, 0), True),
        (("sm_80", "compute_90"), (8, 6), True),
        (("compute_90",), (8, 9), False),
        ((), (9, 0), False),
    ],
)
def test_machine_code_serves_its_generation_and_ptx_newer_cards(
    held: tuple[str, ...], capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, capability, held)
    assert (gpu_support.cuda_obstacle(capability) == "") is runs


def test_a_missing_cuda_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (8, 0), ())
    monkeypatch.setattr(_library, "CUDA_LIBRARY", None)
    with pytest.raises(RuntimeError, match="m3::sparse_pool: the CUDA kernels are missing; build the package"):
        gpu_support.cuda_kernel("sparse_pool", torch.device("cuda"))


def test_what_would_run_on_each_card(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    pretend(monkeypatch, (8, 9), ("sm_80", "sm_90", "sm_100", "compute_100"))
    cards = {"T4": (7, 5), "RTX 4090": (8, 9), "H100": (9, 0), "RTX 5090": (12, 0)}
    runs = {(one.device, one.op): one.implementation for one in gpu_support.served_by_gpus(cards)}
    assert {card: runs[card, "attention"] for card in cards} == {
        "T4": "nothing",
        "RTX 4090": "Triton, tiles of sm_80",
        "H100": "Triton, tiles of sm_90",
        "RTX 5090": "Triton, tiles of sm_80",
    }
    assert {card: runs[card, "pack and unpack"] for card in cards} == {
        "T4": "nothing",
        "RTX 4090": "CUDA C++",
        "H100": "CUDA C++",
        "RTX 5090": "CUDA C++",
    }
