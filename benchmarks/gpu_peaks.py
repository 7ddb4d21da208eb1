"""Published peak figures of GPUs, for lower bounds of run times. Nothing here was measured by us.

Dense products (datasheets that state sparse figures are halved), float32 sums. Sources:
A100 80GB SXM: NVIDIA A100 datasheet (2021). H100 SXM: NVIDIA H100 datasheet (2023). H200 SXM: NVIDIA H200 datasheet
(2024). B200: NVIDIA Blackwell architecture technical brief (2024), HGX B200 at 1000 W. RTX 4090: NVIDIA Ada GPU
architecture whitepaper (2022), appendix A, FP16 and BF16 with FP32 accumulate.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """10¹² operations a second by arithmetic, and 10⁹ bytes a second of device memory."""

    name: str
    bits16: float
    tf32: float
    float32: float
    gigabytes: float

    def seconds(self, tensor_flops: float, tensor_arithmetic: str, float_flops: float, memory_bytes: float) -> float:
        """The largest of three lower bounds: tensor cores, float32 units, each byte of memory moved once."""
        tensor = self.tf32 if tensor_arithmetic == "tf32" else self.bits16
        return max(
            tensor_flops / (tensor * 1e12), float_flops / (self.float32 * 1e12), memory_bytes / (self.gigabytes * 1e9)
        )


GPUS = (
    Gpu("A100", 312.0, 156.0, 19.5, 2039.0),
    Gpu("H100", 989.5, 494.7, 67.0, 3350.0),
    Gpu("H200", 989.5, 494.7, 67.0, 4800.0),
    Gpu("B200", 2250.0, 1100.0, 80.0, 8000.0),
    Gpu("RTX 4090", 165.2, 82.6, 82.6, 1008.0),
)
