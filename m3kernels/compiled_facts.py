"""What a GPU kernel becomes on a GPU that need not be here: registers, spills, shared memory, tensor-core products.

Triton kernels are compiled ahead of time for an architecture; CUDA C++ kernels are read out of the compiled library.
Both end as machine code (SASS), which m3kernels.machine_code reads. These are facts of the compiled code, never a
measurement of time.

Spilled registers do not show in cuobjdump's LOCAL; they show as STACK and as LDL/STL instructions, which are read here.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from m3kernels import machine_code


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one SM (CUDA C++ programming guide 13.0, "Technical Specifications per Compute Capability")."""

    threads: int
    blocks: int
    shared_bytes: int
    shared_bytes_per_block: int
    registers: int = 65536
    tensor_columns: int = 512
    """Of tensor memory, where there is any (sm_100)."""

    @property
    def warps(self) -> int:
        """Resident warps at most."""
        return self.threads // 32


MULTIPROCESSORS = {
    80: Multiprocessor(2048, 32, 164 << 10, 163 << 10),
    86: Multiprocessor(1536, 16, 100 << 10, 99 << 10),
    89: Multiprocessor(1536, 24, 100 << 10, 99 << 10),
    90: Multiprocessor(2048, 32, 228 << 10, 227 << 10),
    100: Multiprocessor(2048, 32, 228 << 10, 227 << 10),
    120: Multiprocessor(1536, 24, 100 << 10, 99 << 10),
}


@dataclass(frozen=True)
class CompiledFacts:
    """Facts of one kernel on one architecture; counts are static, by the names of machine_code.INSTRUCTIONS.

    products: how many tl.dot the kernel's Triton IR holds. fma_products: how many products of the GPU IR the compiler
    left to the plain FMA units (pipelining may have copied some, so this is no part of `products`).
    serialized_products: groups of wgmma products that the assembler added because it waits for each product at once: it
    does so where registers that a product uses are written while it may still run.
    loop_*: of the main loop (m3kernels.machine_code), for each warp; loop_load_bytes: read from global memory (or L2).
    tensor_columns: of tensor memory, which a block takes on sm_100.
    """

    architecture: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    instructions: int
    counts: dict[str, int]
    loop_instructions: int
    loop_counts: dict[str, int]
    loop_tensor_flops: int
    loop_fma_flops: int
    loop_load_bytes: int
    products: int
    fma_products: int
    serialized_products: int
    tensor_columns: int

    @property
    def spilled(self) -> bool:
        """Whether any register lives in memory."""
        return bool(self.stack_bytes or self.local_accesses)

    @property
    def local_accesses(self) -> int:
        """Loads and stores of local memory, where spilled registers lie."""
        return self.counts["load_local"] + self.counts["store_local"]

    @property
    def tensor_instructions(self) -> int:
        """Products on tensor cores in the whole kernel."""
        return sum(self.counts[kind] for kind in machine_code.TENSOR_CORE)

    @property
    def fits(self) -> bool:
        """Whether one block's shared memory is within the architecture's limit."""
        return self.shared_bytes <= MULTIPROCESSORS[self.architecture].shared_bytes_per_block

    @property
    def blocks_per_multiprocessor(self) -> int:
        """Resident blocks by threads, registers (given out by 256 to a warp), shared memory (1 KiB reserved) and tensor
        memory."""
        limits = MULTIPROCESSORS[self.architecture]
        warp_registers = -(-self.registers * 32 // 256) * 256
        return min(
            limits.blocks,
            limits.threads // (32 * self.num_warps),
            limits.registers // (warp_registers * self.num_warps),
            limits.shared_bytes // (self.shared_bytes + 1024),
            limits.tensor_columns // max(self.tensor_columns, 1),
        )

    @property
    def occupancy(self) -> float:
        """Resident warps of the most that an SM holds."""
        return self.blocks_per_multiprocessor * self.num_warps / MULTIPROCESSORS[self.architecture].warps


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    architecture: int,
    *,
    aligned: tuple[str, ...] = (),
    num_warps: int,
    num_stages: int,
) -> Any:
    """Triton's compilation of `kernel` for sm_<architecture>, a triton.compiler.CompiledKernel.

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
    return triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})


def triton_facts(compiled: Any) -> CompiledFacts:
    """Facts of a kernel that Triton has compiled."""
    (function,) = machine_code.functions(compiled.asm["cubin"])
    return _facts(
        function,
        compiled.metadata.target.arch,
        shared_bytes=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        products=len(re.findall(r"\btt\.dot\b", compiled.asm["ttir"])),
        fma_products=_fma_products(compiled.asm["ttgir"]),
        serialized_products=max(0, function.wgmma_groups - compiled.asm["ptx"].count("wgmma.commit_group")),
        tensor_columns=getattr(compiled.metadata, "tmem_size", 0),
    )


def library_facts(
    held: Mapping[int, Sequence[machine_code.Function]], architectures: Mapping[int, int]
) -> dict[int, dict[str, CompiledFacts]]:
    """Facts of every CUDA C++ kernel of a compiled library, by architecture and name.

    A kernel's warps are those that its __launch_bounds__ allow. None allocates shared memory at its launch.

    Args:
        held: machine_code.library_functions of the library.
        architectures: for each architecture asked for, the one whose machine code it executes.
    """
    return {
        asked: {
            machine_code.demangled(function.name): _facts(
                function,
                asked,
                shared_bytes=function.shared_bytes,
                num_warps=_bound(function) // 32,
                products=0,
                fma_products=0,
                serialized_products=0,
                tensor_columns=0,
            )
            for function in held[executed]
        }
        for asked, executed in architectures.items()
    }


def configuration_hash(kernel: Any, configuration: Mapping[str, Any]) -> str:
    """Hash of what a Triton kernel is compiled from: Triton's version, the configuration, and the source of the kernel
    and of all device functions and constants that it uses, without comments and docstrings."""
    parts = (triton.__version__, json.dumps(configuration, sort_keys=True), _source(kernel))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _source(kernel: Any) -> str:
    seen: dict[str, str] = {}
    _collect_sources(kernel, seen)
    return "\n".join(f"{name}={seen[name]}" for name in sorted(seen))


def _collect_sources(function: Any, seen: dict[str, str]) -> None:
    """Add the source of a device function and of those that it calls."""
    python = function.fn
    tree = ast.parse(textwrap.dedent(inspect.getsource(python)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    seen[python.__name__] = ast.unparse(tree)
    for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
        used = python.__globals__.get(name)
        if name in seen or used is None:
            continue
        if isinstance(used, triton.JITFunction):
            _collect_sources(used, seen)
        elif isinstance(used, triton.language.constexpr):
            seen[name] = repr(used.value)


def _facts(
    function: machine_code.Function,
    architecture: int,
    *,
    shared_bytes: int,
    num_warps: int,
    products: int,
    fma_products: int,
    serialized_products: int,
    tensor_columns: int,
) -> CompiledFacts:
    return CompiledFacts(
        architecture=architecture,
        registers=function.registers,
        stack_bytes=function.stack_bytes,
        shared_bytes=shared_bytes,
        num_warps=num_warps,
        instructions=len(function.code),
        counts=machine_code.count(function.code),
        loop_instructions=len(function.main_loop),
        loop_counts=machine_code.count(function.main_loop),
        loop_tensor_flops=machine_code.tensor_flops(function.main_loop, num_warps),
        loop_fma_flops=machine_code.fma_flops(function.main_loop),
        loop_load_bytes=machine_code.load_bytes(function.main_loop),
        products=products,
        fma_products=fma_products,
        serialized_products=serialized_products,
        tensor_columns=tensor_columns,
    )


def _bound(function: machine_code.Function) -> int:
    if function.threads is None:
        raise RuntimeError(f"{function.name} has no __launch_bounds__, so nothing tells how many threads a block has")
    return function.threads


def _fma_products(gpu_ir: str) -> int:
    """Products in Triton's GPU IR whose result has no tensor-core layout; wgmma and tcgen05 have ops of their own."""
    layouts = re.findall(r"^(#\w+) = #ttg\.nvidia_mma", gpu_ir, re.M)
    results = re.findall(r"= tt\.dot\b.*-> tensor<[^>]*, (#\w+)>", gpu_ir)
    return sum(layout not in layouts for layout in results)
