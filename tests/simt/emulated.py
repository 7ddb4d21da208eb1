"""Builds csrc/cuda/*.cu for the CPU under the emulator simt.h and loads them as torch.ops.m3_simt.

Libraries are kept in .cache/simt under a hash of all their sources, one for each sanitizer.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SIMT = ROOT / "tests" / "simt"
TORCH = Path(torch.__file__).parent
SANITIZER = os.environ.get("M3_SIMT_SANITIZER", "")


def cuda_headers() -> Path | None:
    """The include folder of a CUDA toolkit, whose host versions of half and bfloat16 the emulator uses."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", Path(nvcc).resolve().parents[1] if nvcc else None]
    folders = [Path(home) / "include" for home in homes if home]
    return next((folder for folder in folders if (folder / "cuda_bf16.h").exists()), None)


needs_emulator = pytest.mark.skipif(
    cuda_headers() is None or shutil.which("g++") is None,
    reason="the CUDA sources run on the CPU only with g++ and the headers of a CUDA toolkit",
)


def build(name: str, sources: list[Path]) -> Path:
    """A library of `sources`, compiled by g++ with the sanitizer of this process (none, address or thread)."""
    headers = sorted(ROOT.glob("csrc/**/*.h")) + sorted(ROOT.glob("csrc/**/*.cuh")) + [SIMT / "simt.h"]
    digest = hashlib.sha256(f"{torch.__version__} {SANITIZER}".encode())
    for path in headers + sources:
        digest.update(path.read_bytes())
    library = ROOT / ".cache" / "simt" / f"{name}-{SANITIZER or 'plain'}-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder = library.with_suffix(f".{os.getpid()}")
    folder.mkdir(parents=True)
    flags = ["-std=c++20", "-O1" if SANITIZER else "-O2", "-g1", "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += ["-Wno-attributes", "-Wno-unknown-pragmas"]
    flags += [f"-I{path}" for path in (SIMT, ROOT / "csrc" / "include", TORCH / "include", cuda_headers())]
    if SANITIZER:
        flags += [f"-fsanitize={SANITIZER}", "-fno-omit-frame-pointer"]
    objects = [folder / f"{source.name}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        command = ["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    link = ["g++", "-shared", *flags, *map(str, objects), "-o", str(folder / library.name)]
    subprocess.run([*link, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lpthread"], check=True)
    os.replace(folder / library.name, library)
    shutil.rmtree(folder)
    return library


def load_kernels() -> object:
    """torch.ops.m3_simt: the very sources of torch.ops.m3_cuda, for CPU tensors."""
    torch.ops.load_library(build("kernels", [SIMT / "library.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]))
    return torch.ops.m3_simt


def load_planted_bugs() -> object:
    torch.ops.load_library(build("planted", [SIMT / "planted_bugs.cu"]))
    return torch.ops.m3_planted
