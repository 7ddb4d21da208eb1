"""Builds m3kernels._C (CPU, always) and m3kernels._C_cuda (whenever an nvcc is found, whatever the installed torch).

Both are plain shared libraries on the LibTorch stable ABI, loaded with torch.ops.load_library; neither contains Python
code, so one wheel serves every CPython >= 3.10 and every torch >= 2.10.

Environment:
    M3_BUILD_CUDA   auto (default): build if nvcc is found, warn and go on without if that fails; 0: never; 1: demand it
    M3_CUDA_ARCHS   compute capabilities, default "80 90 100"; PTX of the newest is added for later cards
    MAX_JOBS        parallel compilers; never more than the free memory allows
"""

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import torch
import torch.utils.cpp_extension as cpp_extension
from setuptools import setup

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10, the oldest torch the libraries load in
TORCH_INCLUDE = Path(torch.__file__).parent / "include"
GIB_PER_COMPILER = 2.5
NVCC_FLAGS = [
    "-O3",
    "-std=c++20",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xptxas=-v,-warn-spills",
    "-lineinfo",
    "-DUSE_CUDA",
    TORCH_TARGET,
]


def find_cuda_home() -> Path | None:
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    for candidate in candidates:
        if candidate and (Path(candidate) / "bin" / "nvcc").exists() and (Path(candidate) / "include").is_dir():
            return Path(candidate)
    return None


def cuda_architectures() -> list[str]:
    archs = re.split(r"[ ;,]+", os.environ.get("M3_CUDA_ARCHS", "80 90 100").strip())
    bad = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch)]
    if bad:
        sys.exit(f"M3_CUDA_ARCHS: {bad} are not compute capabilities; accepted is for example '80 90 100'")
    return archs


def parallel_jobs() -> int:
    wanted = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    try:
        free_gib = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        return wanted
    return max(1, min(wanted, int(free_gib / GIB_PER_COMPILER)))


class BuildExtension(cpp_extension.BuildExtension):
    """BuildExtension that compiles `ext.cuda_sources` by an nvcc rule of its own.

    torch's own CUDA rule refuses to work beside a CPU build of torch, so the .cu files never appear in `sources`.
    """

    def build_extensions(self) -> None:
        os.environ["MAX_JOBS"] = str(parallel_jobs())
        super().build_extensions()

    def build_extension(self, ext) -> None:
        if not getattr(ext, "cuda_sources", None):
            super().build_extension(ext)
            return
        try:
            ext.extra_objects = [*ext.extra_objects, *self.compile_cuda(ext.cuda_sources)]
            super().build_extension(ext)
        except (subprocess.CalledProcessError, OSError, RuntimeError) as error:
            if os.environ.get("M3_BUILD_CUDA", "auto") == "1":
                raise
            warnings.warn(
                f"m3kernels: building the CUDA kernels failed ({error}); going on with the CPU part", stacklevel=1
            )
            ext.optional = True
            ext.failed = True

    def copy_extensions_to_source(self) -> None:
        self.extensions = [ext for ext in self.extensions if not getattr(ext, "failed", False)]
        super().copy_extensions_to_source()

    def compile_cuda(self, sources: list[str]) -> list[str]:
        # Not build_temp, which an editable install throws away: objects are reused, and tests read ptxas' logs here.
        folder = ROOT / "build" / "nvcc"
        folder.mkdir(parents=True, exist_ok=True)
        archs = cuda_architectures()
        newest = max(archs, key=lambda arch: int(re.sub(r"\D", "", arch)))
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        includes = [f"-I{TORCH_INCLUDE}", f"-I{ROOT / 'csrc' / 'include'}"]
        command = " ".join([str(CUDA_HOME / "bin" / "nvcc"), *NVCC_FLAGS, *codes, *includes])
        rules = [
            "rule nvcc",
            f"  command = {command} -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || (cat $out.log; false)",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        objects = [str(folder / (Path(source).stem + ".cu.o")) for source in sources]
        rules += [f"build {out}: nvcc {ROOT / source}" for source, out in zip(sources, objects)]
        (folder / "build.ninja").write_text("\n".join(rules) + "\n")
        subprocess.check_call([sys.executable, "-m", "ninja", "-C", str(folder), "-j", str(parallel_jobs())])
        return objects


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


COMPILE_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fno-math-errno", "-DTORCH_STABLE_ONLY", TORCH_TARGET]
extensions = [
    cpp_extension.CppExtension(
        "m3kernels._C",
        sources("csrc/cpu/**/*.cpp"),
        py_limited_api=True,
        include_dirs=[str(ROOT / "csrc" / "include"), str(ROOT / "csrc" / "cpu")],
        extra_compile_args=COMPILE_FLAGS,
        extra_link_args=["-Wl,-z,defs"],
    )
]

build_cuda = os.environ.get("M3_BUILD_CUDA", "auto")
if build_cuda not in ("auto", "0", "1"):
    sys.exit(f"M3_BUILD_CUDA={build_cuda!r}: accepted are auto, 0 and 1")
CUDA_HOME = None if build_cuda == "0" else find_cuda_home()
if build_cuda == "1" and CUDA_HOME is None:
    sys.exit("M3_BUILD_CUDA=1, but no nvcc was found: put it on PATH or set CUDA_HOME")
if CUDA_HOME is not None:
    libraries = CUDA_HOME / ("lib64" if (CUDA_HOME / "lib64").is_dir() else "lib")
    cuda_extension = cpp_extension.CppExtension(
        "m3kernels._C_cuda",
        ["csrc/cuda/library.cpp"],
        include_dirs=[str(ROOT / "csrc" / "include")],
        py_limited_api=True,
        extra_compile_args=COMPILE_FLAGS,
        extra_link_args=[
            "-Wl,-z,defs",
            f"-L{libraries}",
            "-lcudart_static",
            "-lrt",
            "-ldl",
            "-lpthread",
            "-Wl,--exclude-libs,ALL",
        ],
    )
    cuda_extension.cuda_sources = sources("csrc/cuda/*.cu")
    extensions.append(cuda_extension)

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
