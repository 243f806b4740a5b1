"""Devices by name: their memory and what they could compute; and the precision for the one at hand.

The numbers are the vendors' data sheets: dense tensor-core TFLOP/s and memory bandwidth of H100
(SXM, PCIe, NVL), H200 SXM and A100 SXM, and of the RTX 4090 with float32 accumulation.
"""

from dataclasses import dataclass

import torch

NO_BFLOAT16 = (
    "This GPU does not compute in bfloat16, so hardware.precision=auto trains in float32. "
    "hardware.precision=16-mixed is faster on it and may need a lower optim.lr."
)


@dataclass(frozen=True)
class Accelerator:
    """A device.

    Attributes:
        part: what `torch.cuda.get_device_name` contains.
        half_tflops, single_tflops: in 16 bits, and in float32 as TF32.
        terabytes_per_second: of its memory.
    """

    name: str
    part: str
    memory_gib: float
    half_tflops: float
    single_tflops: float
    terabytes_per_second: float

    def peak_flops(self, precision: str) -> float:
        """Return FLOP/s in one of Lightning's precisions."""
        return 1e12 * (self.single_tflops if precision.startswith("32") else self.half_tflops)


ACCELERATORS = (  # a longer part before one that it contains: the first that fits is taken
    Accelerator("H200 141 GB", "H200", 140.0, 989.0, 494.5, 4.8),
    Accelerator("H100 PCIe 80 GB", "H100 PCIe", 79.0, 756.0, 378.0, 2.0),
    Accelerator("H100 NVL 94 GB", "H100 NVL", 93.0, 835.0, 417.5, 3.9),
    Accelerator("H100 80 GB", "H100", 79.0, 989.0, 494.5, 3.35),
    Accelerator("A100 80 GB", "A100", 79.0, 312.0, 156.0, 2.039),
    Accelerator("A100 40 GB", "A100", 39.0, 312.0, 156.0, 1.555),
    Accelerator("RTX 4090 24 GB", "RTX 4090", 23.5, 165.2, 82.6, 1.008),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the FLOP/s that a device could do, or None where the table does not know it."""
    return next(
        (device.peak_flops(precision) for device in ACCELERATORS if device.part in device_name),
        None,
    )


def resolved_precision(precision: str, accelerator: str) -> tuple[str, str]:
    """Return what a config's precision means on this machine, and a hint for its user or "".

    Args:
        precision: Lightning's, or `auto`: bf16-mixed on a CUDA device that computes in bfloat16,
            else 32-true.
        accelerator: Lightning's.
    """
    if precision != "auto":
        return precision, ""
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "32-true", ""
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16-mixed", ""
    return "32-true", NO_BFLOAT16
