"""What setup.py built: the libraries load beside any torch, and a missing symbol shows here and not at a user's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m3kernels import _library, build_info

needs_cuda_library = pytest.mark.skipif(_library.CUDA_LIBRARY is None, reason="built without nvcc: no _C_cuda here")


def test_the_cpu_library_is_built_and_loaded() -> None:
    info = build_info()
    assert info.cpu_library is not None
    assert info.compiled_with
    assert info.torch == torch.__version__


@needs_cuda_library
def test_the_cuda_library_loads_beside_this_torch_and_has_a_kernel_for_each_of_its_ops() -> None:
    assert _library.CUDA_LIBRARY is not None
    torch.ops.load_library(_library.CUDA_LIBRARY)
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("m3_cuda::")]
    assert schemas
    missing = [s.name for s in schemas if not torch._C._dispatch_has_kernel_for_dispatch_key(s.name, "CUDA")]
    assert not missing


@needs_cuda_library
def test_the_cuda_library_needs_no_cuda_runtime_at_load_time() -> None:
    dynamic = subprocess.run(["readelf", "-d", str(_library.CUDA_LIBRARY)], check=True, capture_output=True, text=True)
    needed = [line for line in dynamic.stdout.splitlines() if "NEEDED" in line]
    assert not [line for line in needed if "cuda" in line.lower()]


def test_without_compiled_libraries_the_package_warns_once_and_runs_its_references(tmp_path: Path) -> None:
    package = Path(_library.__file__).parent
    copy = tmp_path / "m3kernels"
    for source in package.rglob("*.py"):
        target = copy / source.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text())
    program = (
        "import warnings, torch\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import m3kernels\n"
        "assert m3kernels.__file__.startswith(" + repr(str(tmp_path)) + "), m3kernels.__file__\n"
        "assert sum('compiled CPU kernels are missing' in str(w.message) for w in caught) == 1, caught\n"
        "offsets = torch.tensor([0, 2, 3], dtype=torch.int32)\n"
        "q = torch.randn(3, 1, 32, requires_grad=True)\n"
        "m3kernels.flash_attention_varlen(q, q, q, offsets).sum().backward()\n"
        "rows = torch.randn(3, 8, requires_grad=True)\n"
        "m3kernels.maxsim(rows, rows, offsets, offsets).sum().backward()\n"
        "batch = m3kernels.sparse_pool(torch.rand(3), torch.tensor([1, 1, 2], dtype=torch.int32), offsets)\n"
        "print(m3kernels.sparse_scores(batch, batch).shape, m3kernels.build_info().cpu_library)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([2, 2]) None" in result.stdout
