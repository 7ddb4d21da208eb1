"""What a Triton kernel becomes on a GPU that need not be here: registers, spills, shared memory, tensor-core products.

The kernel is compiled ahead of time for an architecture, and its machine code (SASS) is read with the cuobjdump and
nvdisasm of the Triton wheel. These are facts of the compiled code, never a measurement of time.

Spilled registers do not show in cuobjdump's LOCAL; they show as STACK and as LDL/STL instructions, which are read here.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one SM (CUDA programming guide, table of technical specifications by compute capability)."""

    threads: int
    blocks: int
    shared_bytes: int
    shared_bytes_per_block: int
    registers: int = 65536


MULTIPROCESSORS = {
    80: Multiprocessor(2048, 32, 164 << 10, 163 << 10),
    86: Multiprocessor(1536, 16, 100 << 10, 99 << 10),
    89: Multiprocessor(1536, 24, 100 << 10, 99 << 10),
    90: Multiprocessor(2048, 32, 228 << 10, 227 << 10),
    100: Multiprocessor(2048, 32, 228 << 10, 227 << 10),
    120: Multiprocessor(1536, 24, 100 << 10, 99 << 10),
}

INSTRUCTIONS = {
    "mma.sync": r"\b[HIQD]MMA\b",
    "wgmma": r"\b[HIQ]GMMA\b",
    "tcgen05.mma": r"\bUTC\w*MMA\b",
    "ffma": r"\bFFMA2?\b",
    "ex2": r"\bMUFU\.EX2\b",
    "cp.async": r"\bLDGSTS\b",
    "load_global": r"\bLDG\b",
    "load_local": r"\bLDL\b",
    "store_local": r"\bSTL\b",
    "atomic": r"\b(ATOM|ATOMG|RED|REDG)\b",
}
TENSOR_CORE = ("mma.sync", "wgmma", "tcgen05.mma")


@dataclass(frozen=True)
class CompiledFacts:
    """Facts of one kernel on one architecture; `counts` are static instruction counts by the names of INSTRUCTIONS.

    products: how many tl.dot the kernel's Triton IR holds. fma_products: how many products of the GPU IR the compiler
    left to the plain FMA units (pipelining may have copied some, so this is no part of `products`).
    """

    architecture: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    instructions: int
    counts: dict[str, int]
    products: int
    fma_products: int

    @property
    def spilled(self) -> bool:
        """Whether any register lives in memory."""
        return bool(self.stack_bytes or self.counts["load_local"] or self.counts["store_local"])

    @property
    def fits(self) -> bool:
        """Whether one block's shared memory is within the architecture's limit."""
        return self.shared_bytes <= MULTIPROCESSORS[self.architecture].shared_bytes_per_block

    @property
    def blocks_per_multiprocessor(self) -> int:
        """Resident blocks by threads, registers (given out by 256 to a warp) and shared memory (1 KiB reserved)."""
        limits = MULTIPROCESSORS[self.architecture]
        warp_registers = -(-self.registers * 32 // 256) * 256
        return min(
            limits.blocks,
            limits.threads // (32 * self.num_warps),
            limits.registers // (warp_registers * self.num_warps),
            limits.shared_bytes // (self.shared_bytes + 1024),
        )


def compile_facts(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    architecture: int,
    *,
    aligned: tuple[str, ...] = (),
    num_warps: int,
    num_stages: int,
) -> CompiledFacts:
    """Compile `kernel` for sm_<architecture> and read the machine code.

    Args:
        kernel: a @triton.jit function.
        signature: Triton type of every argument, in order ("*bf16", "i32", ..., "constexpr").
        constants: values of the constexpr arguments.
        aligned: names of pointers and strides divisible by 16, as they are at every usual launch.
    Raises:
        triton.compiler.errors.CompilationError, RuntimeError: the kernel does not compile.
    """
    names = list(signature)
    source = ASTSource(
        fn=kernel,
        signature=dict(signature),
        constexprs=dict(constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})
    usage, code = _disassemble(compiled.asm["cubin"])
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if numbers is None:
        raise RuntimeError(f"cuobjdump printed no resource usage of {kernel.__name__}: {usage!r}")
    gpu_ir = compiled.asm["ttgir"]
    return CompiledFacts(
        architecture=architecture,
        registers=int(numbers[1]),
        stack_bytes=int(numbers[2]),
        shared_bytes=compiled.metadata.shared,
        num_warps=num_warps,
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M)),
        counts={name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()},
        products=len(re.findall(r"\btt\.dot\b", compiled.asm["ttir"])),
        fma_products=_fma_products(gpu_ir),
    )


def _fma_products(gpu_ir: str) -> int:
    """Products in Triton's GPU IR whose result has no tensor-core layout; wgmma and tcgen05 have ops of their own."""
    layouts = re.findall(r"^(#\w+) = #ttg\.nvidia_mma", gpu_ir, re.M)
    results = re.findall(r"= tt\.dot\b.*-> tensor<[^>]*, (#\w+)>", gpu_ir)
    return sum(layout not in layouts for layout in results)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([str(_TOOLS / tool), *options, file.name], capture_output=True, text=True, check=True).stdout
            for tool, options in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", ["-c"]))
        )
    return usage, code
