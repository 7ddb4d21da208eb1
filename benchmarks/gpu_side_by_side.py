"""Our Triton kernels beside public ones, by what the same compiler makes of them; no GPU.

    PEERS/bin/python -m benchmarks.gpu_side_by_side       writes docs/gpu_side_by_side.md and its JSON in
                                                          benchmarks/results

PEERS is an environment with this package's torch and Triton and, without their dependencies, flash-maxsim,
late-interaction-kernels, flash-attention-triton, flash-linear-attention, fla-core, einops and fasterkernels.

Every kernel is compiled by the launch that its own Python code makes: a driver that only names an architecture stands
in for CUDA's, tensors lie on the CPU, and a launch binds, specialises and compiles instead of running. Where a peer
tunes at run time, all configurations that it would try are compiled and its best one by FLOPs for each instruction is
shown, of those that do not spill: more than its tuner may find. Packages choose what to try when they are imported, and
keep what they found: every architecture has a process of its own, and the tuners' kept results are not used.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import autotuner, driver
from triton.runtime.jit import JITFunction

from m3kernels import _tiles
from m3kernels.attention import triton_kernels as attention
from m3kernels.compiled_facts import CompiledFacts, triton_facts
from m3kernels.maxsim import triton_kernels as maxsim
from tests.triton.named_device import MULTIPROCESSORS, SHARED_BYTES, NamedDevice

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Line:
    """One compiled kernel. flops_per_instruction and flops_per_byte: of the main loop, for a warp."""

    case: str
    package: str
    kernel: str
    architecture: int
    configurations: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_warps: int
    blocks: int
    occupancy: float
    instructions: int
    flops_per_instruction: float
    flops_per_byte: float

    @staticmethod
    def of(case: str, package: str, kernel: str, facts: CompiledFacts, configurations: int) -> Line:
        instructions, read, flops = facts.loop_instructions, facts.loop_load_bytes, loop_flops(facts)
        return Line(
            case,
            package,
            kernel,
            facts.architecture,
            configurations,
            facts.registers,
            facts.stack_bytes,
            facts.shared_bytes,
            facts.num_warps,
            facts.blocks_per_multiprocessor,
            facts.occupancy,
            instructions,
            flops / instructions if instructions else 0.0,
            flops / read if read else math.inf,
        )


@contextmanager
def compiled_launches(architecture: int) -> Iterator[dict[str, list[CompiledFacts]]]:
    """Facts of every kernel that is launched inside, by name: one, or one for each configuration of its tuner."""
    found: dict[str, list[CompiledFacts]] = {}
    run, bench, kept = JITFunction.run, autotuner.Autotuner._bench, autotuner.Autotuner.check_disk_cache
    saved = {
        name: getattr(torch.cuda, name) for name in ("get_device_capability", "get_device_properties", "is_available")
    }
    is_cuda, active = torch.Tensor.is_cuda, driver._active

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        found.setdefault(self.__name__, []).append(triton_facts(kernel))
        return kernel

    def static_cost(self: Any, *arguments: Any, config: Any, **meta: Any) -> list[float]:
        """In place of a time: instructions for each FLOP; a configuration that does not compile is out."""
        name = self.base_fn.__name__
        try:
            self.fn.run(*arguments, **{**meta, **config.all_kwargs(), "grid": (1,), "warmup": True})
        except Exception as error:
            warnings.warn(f"{name}, {config}: {type(error).__name__}: {error}", stacklevel=1)
            return [math.inf] * 3
        return [cost(found[name][-1])] * 3

    def tune(self: Any, key: Any, configs: Any, bench_all: Callable[[], None]) -> bool:
        bench_all()
        return False

    JITFunction.run, autotuner.Autotuner._bench = compile_only, static_cost
    autotuner.Autotuner.check_disk_cache = tune
    driver._active = NamedDevice(architecture)
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda device=None: divmod(architecture, 10)
    torch.cuda.get_device_properties = lambda device=None: _Properties(architecture)
    torch.Tensor.is_cuda = property(lambda self: True)
    try:
        yield found
    finally:
        JITFunction.run, autotuner.Autotuner._bench, driver._active = run, bench, active
        autotuner.Autotuner.check_disk_cache = kept
        torch.Tensor.is_cuda = is_cuda
        for name, function in saved.items():
            setattr(torch.cuda, name, function)


class _Properties:
    def __init__(self, architecture: int) -> None:
        self.name = {80: "NVIDIA A100", 90: "NVIDIA H100", 100: "NVIDIA B200"}[architecture]
        self.major, self.minor = divmod(architecture, 10)
        self.multi_processor_count = MULTIPROCESSORS[architecture]
        self.shared_memory_per_block_optin = SHARED_BYTES[architecture]


def loop_flops(facts: CompiledFacts) -> int:
    """FLOPs of the main loop for each warp: products on tensor cores, or else multiply-adds of its 32 lanes."""
    return facts.loop_tensor_flops or facts.loop_fma_flops


def cost(facts: CompiledFacts) -> float:
    """Instructions for each FLOP; infinite where registers spill or a block does not fit."""
    flops = loop_flops(facts)
    if facts.spilled or not facts.blocks_per_multiprocessor or not flops:
        return math.inf
    return facts.loop_instructions / flops


def attention_inputs(width: int) -> tuple[list[Tensor], Tensor]:
    rows = [torch.randn(1024, 4, width).bfloat16() for _ in range(4)]
    return rows, torch.tensor([0, 512, 1024], dtype=torch.int32)


def our_attention(architecture: int, width: int) -> None:
    (q, k, v, grad), offsets = attention_inputs(width)
    tiles = _tiles.for_architecture("attention", architecture)
    options = attention.Options(width**-0.5, None, 0.0, 0, False)
    out, sums = attention.forward(q, k, v, offsets, options, tiles)
    attention.backward(grad, q, k, v, out, sums, offsets, options, tiles)


def flash_attention_triton(architecture: int, width: int) -> None:
    """Dao's Triton kernels, kept up by flash-attention-triton: fixed length, not causal."""
    from flash_attention_triton import flash_attention_v2

    (q, k, v, grad), _ = attention_inputs(width)
    q, k, v, grad = (x.unflatten(0, (2, 512)).transpose(1, 2).contiguous() for x in (q, k, v, grad))
    for x in (q, k, v):
        x.requires_grad_()
    flash_attention_v2(q, k, v).backward(grad)


def fasterkernels(architecture: int, width: int) -> None:
    """Forward only, fixed length."""
    from fskernels.triton.triton_fa2 import flash_attention_2_fwd

    (q, k, v, _), _ = attention_inputs(width)
    flash_attention_2_fwd(*(x.unflatten(0, (2, 512)).transpose(1, 2).contiguous() for x in (q, k, v)))


def fla_attention(architecture: int, width: int) -> None:
    """flash-linear-attention's softmax attention, which is causal: its loop over full tiles is the comparable one."""
    from fla.ops.attn.parallel import parallel_attn

    (q, k, v, grad), _ = attention_inputs(width)
    q, k, v, grad = (x.unflatten(0, (2, 512)).contiguous() for x in (q, k, v, grad))
    for x in (q, k, v):
        x.requires_grad_()
    out = parallel_attn(q, k, v)
    (out[0] if isinstance(out, tuple) else out).backward(grad)


def late_inputs(width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(32, 32, width).bfloat16(), torch.randn(64, 128, width).bfloat16()


def our_maxsim(architecture: int, width: int) -> None:
    q, p = late_inputs(width)
    tiles = _tiles.for_architecture("maxsim", architecture)
    offsets = [torch.arange(len(x) + 1, dtype=torch.int32) * x.shape[1] for x in (q, p)]
    rows = (q.flatten(0, 1), p.flatten(0, 1), *offsets)
    scores, argmax = maxsim.forward(*rows, None, False, True, False, tiles)
    maxsim.backward(scores, *rows, None, argmax, False, False, tiles)


def flash_maxsim(architecture: int, width: int) -> None:
    import flash_maxsim as package

    q, p = (x.half() for x in late_inputs(width))
    package.flash_maxsim_batched(q, p)
    q.requires_grad_()
    p.requires_grad_()
    scores = package.flash_maxsim_batched_train(q, p)
    scores.backward(torch.ones_like(scores))


def late_interaction_kernels(architecture: int, width: int) -> None:
    from late_interaction_kernels import maxsim as function

    for backward in ("unified", "lowmem"):
        q, p = (x.requires_grad_() for x in late_inputs(width))
        scores = function(q, p, backward=backward)
        scores.backward(torch.ones_like(scores))


Launch = Callable[[int, int], None]
CASES: dict[str, tuple[int, dict[str, Launch]]] = {
    f"attention, head width {width}, bfloat16": (
        width,
        {
            "m3kernels": our_attention,
            "flash-attention-triton": flash_attention_triton,
            "flash-linear-attention": fla_attention,
            "fasterkernels": fasterkernels,
        },
    )
    for width in (32, 64, 128)
} | {
    f"late interaction, width {width}, 16 bits": (
        width,
        {
            "m3kernels": our_maxsim,
            "flash-maxsim": flash_maxsim,
            "late-interaction-kernels": late_interaction_kernels,
        },
    )
    for width in (128, 1024)
}


def lines(architecture: int) -> list[Line]:
    """All cases on one architecture, in a process that has compiled for no other."""
    made = []
    for case, (width, packages) in CASES.items():
        for package, launch in packages.items():
            with compiled_launches(architecture) as found:
                try:
                    launch(architecture, width)
                except Exception as error:
                    print(f"{case}, {package}, sm_{architecture}: {type(error).__name__}: {error}", file=sys.stderr)
            for kernel, facts in found.items():
                best = min(facts, key=lambda one: (cost(one), one.stack_bytes))
                if loop_flops(best):
                    made.append(Line.of(case, package, kernel, best, len(facts)))
    return made


def all_lines() -> list[Line]:
    """By case, then architecture."""
    with ProcessPoolExecutor(len(ARCHITECTURES), get_context("spawn"), max_tasks_per_child=1) as pool:
        made = [line for lines_of_one in pool.map(lines, ARCHITECTURES) for line in lines_of_one]
    return sorted(made, key=lambda line: (list(CASES).index(line.case), line.architecture))


PEER_KERNELS = {
    ("attention", "forward"): ("_forward_kernel", "parallel_attn_fwd_kernel", "_flash_attn_fwd_kernel"),
    ("attention", "backward_q"): ("_create_backward_kernel", "parallel_attn_bwd_kernel_dq"),
    ("attention", "backward_kv"): ("_create_backward_kernel", "parallel_attn_bwd_kernel_dkv"),
    ("maxsim", "forward"): ("_maxsim_fwd_kernel", "_maxsim_fwd_kernel_splitd"),
    ("maxsim", "backward_q"): ("_bwd_dQ_kernel", "_bwd_unified_kernel", "_maxsim_bwd_unified_kernel"),
    ("maxsim", "backward_p"): ("_bwd_dD_owned_kernel",),
}
"""Our kernel → the public ones that compute the same, or in one pass all gradients of it."""


def op_of(case: str) -> str:
    """The op of a case."""
    return "maxsim" if case.startswith("late") else "attention"


PACKAGES = (
    "flash-maxsim",
    "late-interaction-kernels",
    "flash-attention-triton",
    "flash-linear-attention",
    "fasterkernels",
)
_INTRODUCTION = """# Our Triton kernels beside public ones, as compiled

Made by `python -m benchmarks.gpu_side_by_side` with Triton {triton} and {packages}, on a machine without a GPU: facts
of compiled code, no time was measured. Each kernel is compiled by the launch that its own package makes (attention:
512 rows a text, not causal but for flash-linear-attention, which has only causal; late interaction: 32 queries of 32
rows, 64 passages of 128). Of a kernel that tunes itself the configuration with the most FLOPs for each instruction is
shown, of those that do not spill; *tried* is how many there were.

*FLOP/instr.* and *FLOP/B*: FLOPs of the main loop (products on tensor cores; multiply-adds in the gathers of late
interaction's gradients, which have no product) for each instruction that a warp issues and for each byte that it loads
from global memory or L2; FLOPs on padding and on products that warps repeat count in. A product of tcgen05, which one
thread issues for its block, counts for all its warps. *spilled B*: stack of a thread. Higher is better for both ratios,
0 for spills.

Below each table stands every figure in which a public kernel is ahead of ours.
[gpu_tile_trials.md](gpu_tile_trials.md) lists the other tiles of ours that were compiled for each, and why the one that
ships was kept. What is common to them:

- flash-attention-triton and flash-linear-attention lead where they spill: bytes of a spilled register do not count in
  FLOP/B, though each is a store and a load.
- flash-attention-triton's backward pass is one kernel of five products that adds to grad_q in global memory; ours are
  two deterministic ones of three and four products. The line below the table compares what all five need, for one
  multiply-add of each. The bytes leave out the sums of grad_q, float32 numbers that each block of N keys reads and
  writes again: 8 bytes for N times these five, so 0.0625 more at its largest N, 128. A single pass would also give up
  the fixed order of additions.
- Occupancy stands against both ratios: a larger tile has fewer warps on a multiprocessor.
- **The gradient of passages is behind late-interaction-kernels' in both ratios at width 128.** Its one-hot side is
  float32, multiplied in tf32, which keeps the range of gradients and 10 bits of each weight; theirs is rounded to the
  rows' type, 8 bits in bfloat16, and float16 loses small gradients. Of our tiles 128x128x64 by 8 warps has 345 and 108
  on sm_80, 780 and 108 on sm_90, with half the occupancy, and idles on passages of fewer than 128 rows. A bf16 one-hot
  side made it 580 on sm_80 and 482 on sm_90.
- Two bf16 products of the high and the low half of each weight, instead of one in tf32, keep the range and 16 bits of
  it. Tried for bfloat16 rows, useful FLOPs for each instruction and byte, tf32 → two halves; not shipped:
  - sm_80: 64x128x32 by 8 warps 280 → 402 and 47, 25 % occupancy both; by 4 warps 504 and 54 (19 %); 128x128x32 by 8
    warps 331 → 567 and 93 (12 %). Ahead of tf32, still behind late-interaction-kernels' 993; float16 rows would need
    float16 weights, which lose small gradients, so sm_80 would have two arithmetics.
  - sm_90: 64x128x64 by 8 warps 533 → 411, 128x128x64 780 → 638 (six groups of wgmma wait); by 4 warps 64x128x64 gains,
    563 → 589, at 12 % occupancy. Behind the 790 that tf32 reaches with 128x128x32.
  - sm_100: 128x128x64 by 8 warps 531 → 389; each of the six tiles tried loses.
- Late interaction forward at 25 % occupancy and more: 64x128x64 by 8 warps has 1365 and 43 on sm_80 (25 %), 1440 and 43
  on sm_90 (25 %); 64x64x32 has 819 and 32 (38 %), 529 and 32 (50 %).
- The gradient of queries on sm_90 at width 1024: two rows of 1024 by one warp, which ship, have 18.0 and 0.89 at 33 %
  occupancy, one row 16.7 and 0.89 at 50 %; twelve others, the one that shipped before among them, have 12.7 to 13.8
  and 0.67.
- late-interaction-kernels' and flash-maxsim's unified backward kernels add to the gradients with atomics, in no fixed
  order; ours of queries and of passages are apart and have none.
"""
FIGURES = (("FLOP/instr.", "flops_per_instruction"), ("FLOP/B", "flops_per_byte"), ("occupancy", "occupancy"))


def leads(group: list[Line]) -> list[str]:
    """A line for each of our kernels that a public one leads in a figure."""
    found = []
    for own in group:
        peers = PEER_KERNELS.get((op_of(own.case), own.kernel.removesuffix("_kernel")), ())
        parts = []
        for other in group:
            if own.package != "m3kernels" or other.package == "m3kernels" or other.kernel not in peers:
                continue
            ahead = [
                f"{name} {_figure(name, getattr(other, key))}"
                for name, key in FIGURES
                if getattr(other, key) > getattr(own, key)
            ]
            if ahead:
                spills = f", which spills {other.spilled_bytes} B" if other.spilled_bytes else ""
                parts.append(f"{other.package} `{other.kernel}`{spills}: {', '.join(ahead)}")
        if parts:
            figures = ", ".join(f"{name} {_figure(name, getattr(own, key))}" for name, key in FIGURES)
            found.append(f"- ahead of `{own.kernel}` ({figures}): {'; '.join(parts)}")
    return found


def backward_passes(group: list[Line]) -> list[str]:
    """What the five products of attention's gradients need for one multiply-add of each: ours, and the single pass."""
    held = {(line.package, line.kernel): line for line in group}
    ours = [held.get(("m3kernels", name)) for name in ("backward_q_kernel", "backward_kv_kernel")]
    single = held.get(("flash-attention-triton", "_create_backward_kernel"))
    if single is None or None in ours:
        return []
    parts = []
    for name, key in FIGURES[:2]:
        own = sum(flops / getattr(line, key) for flops, line in zip((6, 8), ours, strict=True))
        parts.append(f"{own:.4f} {name.partition('/')[2]} against {10 / getattr(single, key):.4f}")
    return [f"- five products of a backward pass, ours against flash-attention-triton's: {', '.join(parts)}"]


def _figure(name: str, value: float) -> str:
    return f"{100 * value:.0f} %" if name == "occupancy" else f"{value:.1f}" if value < 20 else f"{value:.0f}"


def markdown(found: list[Line]) -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    lines = [_INTRODUCTION.format(triton=triton.__version__, packages=", ".join(versions))]
    columns = ("package", "kernel", "tried", "registers", "spilled B", "shared KiB", "warps", "blocks/SM", "occupancy",
               "loop", "FLOP/instr.", "FLOP/B")  # fmt: skip
    groups: dict[tuple[str, int], list[Line]] = {}
    for line in found:
        groups.setdefault((line.case, line.architecture), []).append(line)
    for (case, architecture), group in groups.items():
        lines += [f"## {case}, sm_{architecture}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        for one in group:
            cells = [one.package, f"`{one.kernel}`", one.configurations, one.registers, one.spilled_bytes,
                     f"{one.shared_bytes / 1024:.1f}", one.num_warps, one.blocks, f"{100 * one.occupancy:.0f} %",
                     one.instructions, *(_figure(name, getattr(one, key)) for name, key in FIGURES[:2])]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines += ["", *leads(group), *backward_passes(group), ""]
    return "\n".join(lines)


def main() -> None:
    found = all_lines()
    rows = ",\n".join(f"  {json.dumps(asdict(line))}" for line in found)
    (ROOT / "benchmarks" / "results" / "gpu_side_by_side.json").write_text(f"[\n{rows}\n]\n")
    (ROOT / "docs" / "gpu_side_by_side.md").write_text(markdown(found))


if __name__ == "__main__":
    main()
