"""Which attention kernel is faster on this machine: a measurement at the model's own shape, taken once a process.

On CPUs with bfloat16 instructions torch's fused attention does not use them, and multiplying the matrices out is 1.4
to 2.9 times as fast; in float32, and on other CPUs, it is the other way round. Nothing in a model tells which.

Legend: B images, h heads, N tokens, d width of a head.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Literal["sdpa", "explicit"]
AttentionShape = tuple[int, int, int]
"""Heads, tokens, width of a head."""

MARGIN = 1.15
"""How many times as fast the other kernel must be to displace the usual one: a choice must not hang on noise."""

MIN_FLOPS = 10_000_000
"""Operations of an image's attention below which nothing is measured, as nothing can be gained."""

PROBE_S = 0.5
ROUNDS = 5
MAX_IMAGES = 8


@runtime_checkable
class ChoosesAttention(Protocol):
    """An encoder whose attention kernel may be set from outside."""

    def attention_shape(self, img_size_px: int) -> AttentionShape | None:
        """Return heads, tokens and head width for images of that side; None where the recipe fixed the kernel."""
        ...

    def use_attention(self, kernel: Kernel) -> None:
        """Use this kernel from now on."""
        ...


def usual_kernel(device: torch.device, dtype: torch.dtype) -> Kernel:
    """Return what is faster on most machines: explicit products for bfloat16 on a CPU, else the fused kernel."""
    return "explicit" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"


def choose_attention(
    shape: AttentionShape, *, images: int, device: torch.device, dtype: torch.dtype, trains: bool
) -> Kernel:
    """Return the faster kernel, measured on a CPU; on other devices the fused one, which keeps no scores in memory.

    Args:
        shape: heads, tokens, head width.
        images: B, of a forward pass.
        device: where the encoder runs.
        dtype: attention computes in.
        trains: whether the backward pass counts.
    """
    usual = usual_kernel(device, dtype)
    heads, tokens, width = shape
    if device.type != "cpu" or 4 * heads * tokens**2 * width < MIN_FLOPS:
        return usual
    seconds = measure_attention(min(images, MAX_IMAGES), heads, tokens, width, dtype, trains)
    other: Kernel = "sdpa" if usual == "explicit" else "explicit"
    return other if seconds[usual] > MARGIN * seconds[other] else usual


@cache
def measure_attention(
    images: int, heads: int, tokens: int, width: int, dtype: torch.dtype, trains: bool
) -> dict[Kernel, float]:
    """Return CPU seconds of either kernel, the least of a few interleaved rounds; at most about a second in all.

    Args:
        images: B; fewer are taken where they would take too long.
        heads: h; likewise.
        tokens: N.
        width: d.
        dtype: of queries, keys and values.
        trains: whether the backward pass counts.
    """
    single = _seconds(F.scaled_dot_product_attention, _inputs(1, 1, tokens, width, dtype, trains))
    affordable = max(1, int(PROBE_S / ROUNDS / max(single, 1e-6)))
    heads = min(heads, affordable)
    inputs = _inputs(max(1, min(images, affordable // heads)), heads, tokens, width, dtype, trains)
    kernels: dict[Kernel, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "sdpa": F.scaled_dot_product_attention,
        "explicit": explicit_attention,
    }
    least: dict[Kernel, float] = dict.fromkeys(kernels, float("inf"))
    for _ in range(ROUNDS):
        for name, kernel in kernels.items():
            least[name] = min(least[name], _seconds(kernel, inputs))
    return least


def explicit_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v for `[B, h, N, d]` inputs, with the matrices multiplied out."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return scores.softmax(dim=-1) @ value


def _inputs(images: int, heads: int, tokens: int, width: int, dtype: torch.dtype, trains: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)  # the global generator belongs to the training run
    shape = (images, heads, tokens, width)
    drawn = [torch.randn(shape, generator=generator, device="cpu").to(dtype) for _ in range(3)]
    return [tensor.requires_grad_(trains) for tensor in drawn]


def _seconds(kernel: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]) -> float:
    query, key, value = inputs
    began = time.process_time()
    with torch.set_grad_enabled(query.requires_grad):
        out = kernel(query, key, value)
        if query.requires_grad:
            torch.autograd.grad(out, inputs, torch.ones_like(out))
    return time.process_time() - began
