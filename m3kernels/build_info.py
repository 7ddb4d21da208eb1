"""What was compiled into this installation and what of it runs on this machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from m3kernels import _library
from m3kernels._version import __version__
from m3kernels.fatbin import cuda_architectures

__all__ = ["BuildInfo", "build_info"]


@dataclass(frozen=True)
class BuildInfo:
    """Facts for `m3 doctor`.

    version: of m3kernels. torch: version that runs. cpu_library, cuda_library: paths of the compiled libraries or None.
    compiled_with: compiler of the CPU library or None. cpu_isa: instruction set that the CPU kernels use here, None
    where they are missing. cuda_architectures: those that the CUDA library holds code for, see m3kernels.fatbin.
    cuda_available: whether torch sees a GPU. device_names: the GPUs that it sees.
    """

    version: str
    torch: str
    cpu_library: str | None
    compiled_with: str | None
    cpu_isa: str | None
    cuda_library: str | None
    cuda_architectures: tuple[str, ...]
    cuda_available: bool
    device_names: tuple[str, ...]


def build_info() -> BuildInfo:
    """Look at the compiled libraries and the machine."""
    compiled_with = _library.cpu_kernel("compiled_with")
    cpu_isa = _library.cpu_kernel("cpu_isa")
    available = torch.cuda.is_available()
    return BuildInfo(
        version=__version__,
        torch=torch.__version__,
        cpu_library=str(_library.CPU_LIBRARY) if _library.CPU_LIBRARY else None,
        compiled_with=compiled_with() if compiled_with else None,
        cpu_isa=cpu_isa() if cpu_isa else None,
        cuda_library=str(_library.CUDA_LIBRARY) if _library.CUDA_LIBRARY else None,
        cuda_architectures=cuda_architectures(_library.CUDA_LIBRARY) if _library.CUDA_LIBRARY else (),
        cuda_available=available,
        device_names=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        if available
        else (),
    )
