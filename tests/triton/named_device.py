"""A driver for Triton where there is no GPU: it only names an architecture, so that launches bind and compile.

monkeypatch.setattr(triton.runtime.driver, "_active", NamedDevice(90))
"""

from __future__ import annotations

from triton.backends.compiler import GPUTarget

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""What a block may take, by architecture."""
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
"""Of A100, H100 and B200."""


class NamedDevice:
    """What Triton, and packages built on it, ask a driver before they compile.

    Triton keeps compiled kernels by the device's number, so each architecture has a number of its own: itself.
    """

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.utils = self

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_BYTES[self.architecture],
            "multiprocessor_count": MULTIPROCESSORS[self.architecture],
        }
