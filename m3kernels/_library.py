"""Owner of the torch library `m3`: defines ops, loads what was compiled, and finds the compiled kernel of an op.

Schemas are defined in Python, so fake kernels, autograd and the reference exist even where nothing could be compiled.
The compiled libraries register their kernels under the same names in the namespaces `m3_cpu` and `m3_cuda`; each op's
implementation for a device (in its ops.py) checks what only values can tell and calls the kernel from here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LIBRARY = torch.library.Library("m3", "DEF")
_FOLDER = Path(__file__).parent
_BUILD_HINT = "build them with `pip install .` or `python setup.py build_ext --inplace`"


def define(schema: str) -> None:
    """Define the op `m3::<schema>`."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def implement(name: str, device: str, function: Callable[..., Any]) -> None:
    """Make `function` the implementation of `m3::<name>` for the dispatch key "CPU" or "CUDA"."""
    LIBRARY.impl(name, function, device)


def cpu_kernel(name: str) -> Callable[..., Any] | None:
    """The compiled CPU kernel of op `name`, or None where the library was not built."""
    return getattr(torch.ops.m3_cpu, name, None)


def _find(stem: str) -> Path | None:
    found = sorted(_FOLDER.glob(f"{stem}.*so"))
    return found[0] if found else None


CPU_LIBRARY = _find("_C")
CUDA_LIBRARY = _find("_C_cuda")

if CPU_LIBRARY is None:
    warnings.warn(
        f"m3kernels: the compiled CPU kernels are missing, every op runs its plain PyTorch reference; {_BUILD_HINT}",
        stacklevel=2,
    )
else:
    torch.ops.load_library(CPU_LIBRARY)
if CUDA_LIBRARY is not None and torch.cuda.is_available():
    torch.ops.load_library(CUDA_LIBRARY)
