"""Which precision this machine computes fast in: a measurement, not a habit.

CPUs with bfloat16 instructions multiply matrices about four times as fast in bfloat16 as in float32; others emulate
them, eighty times slower. Nothing in a model tells which kind of CPU it is on, so a small product is timed.
"""

from __future__ import annotations

import timeit
from functools import cache
from typing import Literal

import torch

MATRIX_SIDE = 256
ROUNDS = 5

Precision = Literal["32-true", "bf16-mixed"]

AUTOCAST_DTYPES = {"32-true": None, "32": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What a trainer casts to, by Lightning's name of its precision; None casts nothing."""


def choose_precision(device: str) -> Precision:
    """Return Lightning's name of the precision to train in: bf16-mixed where bfloat16 is fast, else 32-true.

    Args:
        device: "cuda" or "cpu".
    """
    is_fast = torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else cpu_has_fast_bfloat16()
    return "bf16-mixed" if is_fast else "32-true"


@cache
def cpu_has_fast_bfloat16() -> bool:
    """Return whether this CPU multiplies matrices faster in bfloat16 than in float32; measured once a process."""
    return _fastest_product_s(torch.bfloat16) < _fastest_product_s(torch.float32)


def _fastest_product_s(dtype: torch.dtype) -> float:
    matrix = torch.ones(MATRIX_SIDE, MATRIX_SIDE, dtype=dtype)
    return min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=ROUNDS))
