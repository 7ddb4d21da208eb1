"""Reads machine code (SASS) of NVIDIA GPUs: resources, loops and instruction counts of every function in a cubin.

The disassemblers are the cuobjdump and nvdisasm of the Triton wheel; they read nvcc's cubins as well, and need no GPU.

The main loop of a function is where its time goes: of the loops (a branch to an earlier label) that hold tensor-core
products and no smaller such loop, the one with the most of them; without tensor cores the same by multiply-adds, and
without these by global loads. Waiting loops on barriers, which newer architectures nest in it, count as its part.

A multiply-add of m·n·k is 2·m·n·k FLOPs. HMMA belongs to a warp, HGMMA to a group of four, a tcgen05 product (UTCHMMA)
to the block: one thread issues it. Its shape is in its instruction descriptor (PTX ISA, "Instruction descriptor" of
tcgen05), a constant in a uniform register; it is read from there and appended to the name, as in UTCHMMA.128x64x16.
"""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import triton

__all__ = [
    "FMA",
    "INSTRUCTIONS",
    "TENSOR_CORE",
    "Function",
    "count",
    "demangled",
    "fma_flops",
    "functions",
    "library_functions",
    "load_bytes",
    "tensor_flops",
]

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

INSTRUCTIONS = {
    "mma.sync": r"[HIQD]MMA\b",
    "wgmma": r"[HIQ]GMMA\b",
    "tcgen05.mma": r"UTC\w*MMA\b",
    "ffma": r"FFMA2?\b",
    "ex2": r"MUFU\.EX2\b",
    "cp.async": r"LDGSTS\b",
    "bulk_copy": r"(UBLKCP|UTMALDG|UTMASTG)\b",
    "ldmatrix": r"LDSM\b",
    "load_global": r"LDG\b",
    "load_shared": r"LDS\b",
    "store_shared": r"STS\b",
    "load_local": r"LDL\b",
    "store_local": r"STL\b",
    "atomic": r"(ATOM|ATOMG|RED|REDG)\b",
}
TENSOR_CORE = ("mma.sync", "wgmma", "tcgen05.mma")
FMA = "ffma"
_PATTERNS = {name: re.compile(pattern) for name, pattern in INSTRUCTIONS.items()}
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", re.M)
_LABEL_OR_INSTRUCTION = re.compile(r"^(\.L_\w+):|" + _INSTRUCTION.pattern, re.M)
_HMMA_SHAPE = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}
_LOAD_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_HGMMA_SHAPE = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")
_UTCMMA = re.compile(r"UTC\w*MMA\b")
_UTCMMA_SHAPE = re.compile(r"UTCHMMA\.(\d+)x(\d+)x(\d+)")
_TCGEN05_DEPTH = {0: 16, 1: 16, 2: 8}
"""K of a tcgen05 product by the descriptor's type of A: float16, bfloat16, tf32, each 32 bytes."""


@dataclass(frozen=True)
class Function:
    """One kernel of a cubin. shared_bytes: static; threads: the most a launch may have (None: any number);
    code: instructions with their modifiers, without operands; main_loop: those of the main loop, or none;
    wgmma_groups: groups of wgmma products, each of which ends with one that can be waited for."""

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    threads: int | None
    code: tuple[str, ...]
    main_loop: tuple[str, ...]
    wgmma_groups: int


def functions(cubin: bytes) -> list[Function]:
    """All kernels of a cubin."""
    with _written(cubin) as path:
        return _functions(path)


def disassembly(cubin: bytes) -> str:
    """The text of all kernels, an instruction a line with its address and operands."""
    with _written(cubin) as path:
        return _disassembly(path)


def library_functions(library: Path) -> dict[int, list[Function]]:
    """Kernels by architecture of the cubins that nvcc put into a library."""
    found: dict[int, list[Function]] = {}
    with tempfile.TemporaryDirectory() as folder:
        _run("cuobjdump", "-xelf", "all", str(library.resolve()), folder=folder)
        for path in sorted(Path(folder).glob("*.cubin")):
            architecture = re.search(r"\.sm_(\d+)", path.name)
            if architecture is None:
                raise RuntimeError(f"{library}: {path.name} names no architecture")
            found.setdefault(int(architecture[1]), []).extend(_functions(path))
    return found


def count(code: Sequence[str]) -> dict[str, int]:
    """How many instructions of each kind of INSTRUCTIONS."""
    return {name: sum(bool(pattern.match(one)) for one in code) for name, pattern in _PATTERNS.items()}


def tensor_flops(code: Sequence[str], num_warps: int) -> int:
    """FLOPs for each warp of the products on tensor cores in `code`, which a block of `num_warps` executes; 0 where one
    of them does not tell its shape."""
    flops = 0
    for instruction in code:
        if group := _HGMMA_SHAPE.match(instruction):
            m, n, k = map(int, group.groups())
            flops += 2 * m * n * k // 4
        elif group := _UTCMMA_SHAPE.match(instruction):
            m, n, k = map(int, group.groups())
            flops += 2 * m * n * k // num_warps
        elif _UTCMMA.match(instruction):
            return 0
        elif instruction.startswith("HMMA."):
            m, n, k = _HMMA_SHAPE[instruction.split(".")[1]]
            flops += 2 * m * n * k
    return flops


def fma_flops(code: Sequence[str]) -> int:
    """FLOPs for each warp of the float32 multiply-adds in `code`; FFMA2 does two in each lane."""
    return sum(128 if one.startswith("FFMA2") else 64 for one in code if _PATTERNS[FMA].match(one))


def load_bytes(code: Sequence[str]) -> int:
    """Bytes that a warp, all of its lanes active, loads from global memory: LDG and LDGSTS, 1 to 16 for each lane."""
    total = 0
    for instruction in code:
        name, *modifiers = instruction.split(".")
        if name in ("LDG", "LDGSTS"):
            total += 32 * next((_LOAD_BYTES[one] for one in modifiers if one in _LOAD_BYTES), 4)
    return total


@functools.cache
def demangled(name: str) -> str:
    """A C++ name without parameters and anonymous namespaces, by the C++ library that torch brings along."""
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    pointer = demangle(name.encode(), None, None, ctypes.byref(status))
    if status.value:
        return name
    text = ctypes.string_at(pointer).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(pointer))
    text = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N_\w*::", "", text)
    text = re.sub(r"\(.*", "", text).removeprefix("void ")
    return re.sub(r"\w+::", "", text)


def _functions(path: Path) -> list[Function]:
    usage = _run("cuobjdump", "--dump-resource-usage", str(path))
    elf = _run("cuobjdump", "-elf", str(path))
    text = _disassembly(path)
    bodies = dict(_split(text, r"^\s*\.section\s+\.text\.([^\s,]+),"))
    threads = {}
    for name, body in _split(elf, r"^\.nv\.info\.(\S+)"):
        bound = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+0x(\w+) 0x(\w+) 0x(\w+)", body)
        if bound:
            x, y, z = (int(number, 16) for number in bound.groups())
            threads[name] = x * y * z
    found = []
    for name, body in _split(usage, r"^ Function (\S+):"):
        numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", body)
        if numbers is None or name not in bodies:
            raise RuntimeError(f"the disassemblers said nothing of {name}: {body!r}")
        code, loop = _parse(bodies[name])
        registers, stack, shared = map(int, numbers.groups())
        groups = len(re.findall(r"GMMA\..*\bgsb0", bodies[name]))
        found.append(Function(name, registers, stack, shared, threads.get(name), code, loop, groups))
    return found


def _parse(body: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Instructions of a function and of its main loop."""
    code: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[str, int]] = []
    uniform: dict[str, int] = {}
    for found in _LABEL_OR_INSTRUCTION.finditer(body):
        label, _, predicate, name, operands = found.groups()
        if label:
            labels[label] = len(code)
            continue
        if _UTCMMA.match(name):
            name = f"{name}.{_tcgen05_shape(name, operands, uniform)}"
        elif written := re.match(r"\s*(UR\d+)", operands):
            value = re.match(r"\s*UR\d+, (0x[0-9a-f]+)\s*$", operands)
            uniform.pop(written[1], None)
            if name == "UMOV" and value and not predicate:
                uniform[written[1]] = int(value[1], 16)
        code.append(name)
        target = re.search(r"\((\.L_\w+)\)", operands)
        if name.startswith("BRA") and target:
            branches.append((target[1], len(code)))
    loops = [(labels[target], end) for target, end in branches if labels[target] < end - 1]
    return tuple(code), _main_loop(code, loops)


def _tcgen05_shape(name: str, operands: str, uniform: dict[str, int]) -> str:
    """MxNxK of a tcgen05 product, from the constant that its descriptor's register got last; "unknown" without one."""
    register = re.search(r"idesc\[(UR\d+)\]", operands)
    descriptor = uniform.get(register[1]) if register else None
    if descriptor is None or not name.startswith("UTCHMMA"):
        return "unknown"
    return f"{(descriptor >> 24 & 31) * 16}x{(descriptor >> 17 & 63) * 8}x{_TCGEN05_DEPTH[descriptor >> 7 & 7]}"


def _main_loop(code: Sequence[str], loops: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    for kinds in (TENSOR_CORE, (FMA,), ("load_global", "cp.async")):
        weights = {}
        for begin, end in loops:
            counts = count(code[begin:end])
            weights[begin, end] = sum(counts[kind] for kind in kinds)
        holders = [loop for loop in loops if weights[loop]]
        innermost = [
            (begin, end)
            for begin, end in holders
            if not any(begin <= other[0] and other[1] <= end and other != (begin, end) for other in holders)
        ]
        if innermost:
            begin, end = max(innermost, key=lambda loop: (weights[loop], loop[1] - loop[0]))
            return tuple(code[begin:end])
    return ()


def _split(text: str, heading: str) -> list[tuple[str, str]]:
    """Pairs of what a heading's group matched and the text up to the next heading."""
    parts = re.split(heading, text, flags=re.M)
    return list(zip(parts[1::2], parts[2::2]))


@contextmanager
def _written(cubin: bytes) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        yield Path(file.name)


def _disassembly(path: Path) -> str:
    return _run("nvdisasm", "-c", str(path))


def _run(tool: str, *arguments: str, folder: str | None = None) -> str:
    done = subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True, cwd=folder)
    return done.stdout
