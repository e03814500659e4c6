"""What accelerators can do at most by their makers' data sheets, and what this machine's matrix products reach."""

from __future__ import annotations

import timeit
from dataclasses import dataclass

import torch

from distill.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """One kind of accelerator.

    Attributes:
        name: as a flag has it.
        title: as its maker has it.
        peak_tflops: dense bfloat16 matrix products with float32 sums, 10**12 operations a second, without sparsity.
        memory_gib: of one device, as sold.
        source: where the figures stand.
    """

    name: str
    title: str
    peak_tflops: float
    memory_gib: float
    source: str


_SHEETS = [
    # Data sheets give figures with 2:4 sparsity beside or instead of the dense ones: these are the dense ones.
    Accelerator("b200", "NVIDIA B200", 2250.0, 180.0, "NVIDIA DGX B200 data sheet, an eighth of the system"),
    Accelerator("h200", "NVIDIA H200", 989.5, 141.0, "NVIDIA H200 SXM data sheet, half of the figure with sparsity"),
    Accelerator("h100", "NVIDIA H100", 989.5, 80.0, "NVIDIA H100 SXM data sheet, half of the figure with sparsity"),
    Accelerator("a100", "NVIDIA A100", 312.0, 80.0, "NVIDIA A100 80GB data sheet"),
    Accelerator("a100-40gb", "NVIDIA A100", 312.0, 40.0, "NVIDIA A100 40GB data sheet"),
    Accelerator("l40s", "NVIDIA L40S", 362.05, 48.0, "NVIDIA L40S data sheet"),
    Accelerator("l4", "NVIDIA L4", 121.0, 24.0, "NVIDIA L4 data sheet, half of the figure with sparsity"),
    Accelerator("rtx4090", "NVIDIA GeForce RTX 4090", 165.2, 24.0, "NVIDIA Ada GPU architecture paper, appendix A"),
    Accelerator("mi300x", "AMD Instinct MI300X", 1307.4, 192.0, "AMD Instinct MI300X data sheet"),
]
ACCELERATORS = {accelerator.name: accelerator for accelerator in _SHEETS}
"""Known accelerators by name."""

_MATRIX_SIDE = {"cpu": 768, "cuda": 8192}
_ROUNDS = 5


def find_accelerator(name: str) -> Accelerator:
    """Return the accelerator of that name.

    Raises:
        ConfigError: it is not in the table; the message lists those that are.
    """
    if name.lower() not in ACCELERATORS:
        raise ConfigError(
            f"--accelerator {name!r} is not known; choose from {', '.join(ACCELERATORS)}, or measure this machine by "
            "--measure true."
        )
    return ACCELERATORS[name.lower()]


def recognise_accelerator(device_name: str, memory_gib: float) -> Accelerator | None:
    """Return the accelerator that a driver calls so, None if it is not in the table.

    Variants whose peak differs from the table's (PCIe, NVL, MIG slices, laptops) are not recognised.

    Args:
        device_name: for example "NVIDIA H100 80GB HBM3".
        memory_gib: of the device; it tells apart what shares a name.
    """
    words = device_name.replace("-", " ").upper().split()
    if {"PCIE", "NVL", "MIG", "LAPTOP", "D"} & set(words):
        return None
    near = [entry for entry in _SHEETS if entry.title.upper().split()[-1] in words]
    return min(near, key=lambda entry: abs(entry.memory_gib - memory_gib), default=None)


def measured_tflops(device: torch.device, dtype: torch.dtype, *, side: int | None = None) -> float:
    """Return what square matrix products reach here in 10**12 operations a second: the best of a few.

    Args:
        device: "cpu" takes some tens of milliseconds, with as many threads as torch uses; "cuda" some milliseconds.
        dtype: of the matrices.
        side: rows and columns; None takes what is large enough for the device.
    """
    side = side or _MATRIX_SIDE.get(device.type, _MATRIX_SIDE["cpu"])
    matrix = torch.ones(side, side, dtype=dtype, device=device)

    def product() -> None:
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    product()
    return 2 * side**3 / min(timeit.repeat(product, number=1, repeat=_ROUNDS)) / 1e12
