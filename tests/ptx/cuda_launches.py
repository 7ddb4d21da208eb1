"""Runs csrc/cuda/*.cu as nvcc compiles it, on CPU tensors: its host code as it is, its kernels' sm_80 PTX simulated.

    with simulated_cuda() as cuda:
        weights, ids, offsets, rows = cuda.ops.sparse_pool(token_weights, token_ids, offsets, [])
    cuda.launches[0].counters

One nvcc run makes each object file and its PTX; the objects are linked with simulated_runtime.cpp in place of libcudart
and register their ops as torch.ops.m3_ptx.* for CPU tensors. Results are cached in .cache/ptx under a hash of sources.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ptx.simulator import GlobalMemory, Program, load
from tests.ptx.triton_launches import ROOT, Launch, Programs, extent
from tests.simt.emulated import cuda_headers

PTX_TESTS = ROOT / "tests" / "ptx"
TORCH = Path(torch.__file__).parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NVCC_FLAGS = [
    "-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA",
    "-gencode=arch=compute_80,code=compute_80",
]  # fmt: skip
REGISTRATION = PTX_TESTS / "register_for_cpu.h"
RUNTIME = PTX_TESTS / "simulated_runtime.cpp"
LIBRARY = "libm3_ptx.so"
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def nvcc() -> Path | None:
    """The compiler of the toolkit whose headers are found."""
    headers = cuda_headers()
    path = headers.parent / "bin" / "nvcc" if headers else None
    return path if path is not None and path.exists() else None


needs_nvcc = pytest.mark.skipif(
    nvcc() is None or shutil.which("g++") is None, reason="needs nvcc and g++ to make the CUDA sources' PTX"
)


def sources_digest() -> str:
    """Of the CUDA C++ sources and their headers."""
    digest = hashlib.sha256()
    for path in [*sorted(ROOT.glob("csrc/cuda/*.cu*")), *sorted(ROOT.glob("csrc/include/*.h"))]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def build() -> Path:
    """The folder with the library and the PTX of every source, compiled unless it is there already."""
    compiler = nvcc()
    assert compiler is not None
    digest = hashlib.sha256(f"{torch.__version__} {compiler} {NVCC_FLAGS} {sources_digest()}".encode())
    for path in (RUNTIME, REGISTRATION):
        digest.update(path.read_bytes())
    folder = ROOT / ".cache" / "ptx" / f"cuda-{digest.hexdigest()[:16]}"
    if folder.exists():
        return folder
    making = folder.with_suffix(f".{os.getpid()}")
    includes = [f"-I{TORCH / 'include'}", f"-I{ROOT / 'csrc' / 'include'}"]

    def compile_one(source: Path) -> Path:
        kept = making / source.stem
        kept.mkdir(parents=True)
        target = kept / f"{source.stem}.o"
        command = [str(compiler), *NVCC_FLAGS, TARGET, *includes, "--keep", "--keep-dir", str(kept)]
        command += ["-include", str(REGISTRATION)]
        _run([*command, "-c", str(source), "-o", str(target)])
        (kept / f"{source.stem}.ptx").rename(making / f"{source.stem}.ptx")
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    command = ["g++", "-shared", "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", TARGET, *includes, str(RUNTIME)]
    command += [*map(str, objects), "-o", str(making / LIBRARY), f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    _run([*command, "-Wl,-Bsymbolic", "-Wl,-z,defs"])
    for source in SOURCES:
        shutil.rmtree(making / source.stem)
    making.rename(folder)
    return folder


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr[-4000:]}"


_CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint64
)


@functools.cache
def _library() -> tuple[ctypes.CDLL, dict[str, Program]]:
    """The library, and all kernels by their mangled names."""
    folder = build()
    torch.ops.load_library(folder / LIBRARY)
    programs: dict[str, Program] = {}
    for source in SOURCES:
        programs |= load((folder / f"{source.stem}.ptx").read_text())
    return ctypes.CDLL(str(folder / LIBRARY)), programs


class _Tensors(TorchDispatchMode):
    """Remembers every tensor that an operator takes or gives: these are the memory that kernels may touch."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        self.remember(arguments)
        self.remember(result)
        return result

    def remember(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
        elif isinstance(value, list | tuple):
            for item in value:
                self.remember(item)


class SimulatedCuda:
    """The ops of m3_ptx as functions, and the launches they made."""

    def __init__(self, programs: Programs | None) -> None:
        self.launches: list[Launch] = []
        self.ops = _Ops(self)
        self._choose = programs
        self._failed: BaseException | None = None
        self._tensors = _Tensors()

    def call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Run one op; what a launch raised comes out here."""
        library, _ = _library()
        callback = _CALLBACK(self._launch)
        library.m3_ptx_on_launch(callback)
        self._tensors.tensors.clear()
        self._tensors.remember(arguments)
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        try:
            with self._tensors:
                result = getattr(torch.ops.m3_ptx, name).default.redispatch(keys, *arguments)
        finally:
            library.m3_ptx_on_launch(_CALLBACK())
            failed, self._failed = self._failed, None
        if failed is not None:
            raise failed
        return result

    def _launch(self, name: bytes, sizes: Any, arguments: Any, shared_bytes: int) -> None:
        # An exception must not pass through C++; it is kept, and later kernels of the op do not run.
        if self._failed is None:
            try:
                self._simulate(name.decode(), sizes, arguments, shared_bytes)
            except BaseException as error:
                self._failed = error

    def _simulate(self, name: str, sizes: Any, arguments: Any, shared_bytes: int) -> None:
        program = _library()[1][name]
        block = bytearray(program.kernel.parameter_bytes)
        for number, parameter in enumerate(program.kernel.parameters):
            word = ctypes.string_at(arguments[number], parameter.size)
            block[parameter.offset : parameter.offset + parameter.size] = word
        grid, threads = (sizes[0], sizes[1], sizes[2]), (sizes[3], sizes[4], sizes[5])
        memory = GlobalMemory([extent(tensor) for tensor in self._tensors.tensors])
        chosen: Iterable[tuple[int, int, int]] | None = None
        if self._choose is not None:
            chosen = self._choose(readable(name), grid)
        counters = program.launch(memory, grid, threads, bytes(block), shared_bytes, chosen)
        self.launches.append(Launch(readable(name), grid, threads[0] * threads[1] * threads[2], counters))


class _Ops:
    def __init__(self, cuda: SimulatedCuda) -> None:
        self._cuda = cuda

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self._cuda.call(name, arguments)


@functools.cache
def readable(mangled: str) -> str:
    """ "winners_kernel<float>" from a mangled name."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|m3::|_GLOBAL__N__\w+::|^void ", "", name)
    return re.sub(r"\(.*", "", name)


@contextmanager
def simulated_cuda(programs: Programs | None = None) -> Iterator[SimulatedCuda]:
    """The compiled CUDA ops, simulated."""
    yield SimulatedCuda(programs)
