"""A frozen encoder's linear layers in 8-bit floating point, for scripts/bench/gpu.py.

By torchao where it is installed, else by `torch._scaled_mm`: weights are quantised once, a scale an output channel;
activations as they come, a scale a token (both e4m3). Where the device multiplies no 8-bit floats, the rounded values
are multiplied in their own dtype: the same error, and no speed.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Way = Literal["torchao", "scaled_mm", "emulated"]

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
FIRST_CAPABILITY = (8, 9)
"""Of NVIDIA's devices that multiply 8-bit floats: Ada Lovelace."""


def choose_way(device: torch.device) -> Way:
    """Return how 8-bit linear layers are computed on this device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FIRST_CAPABILITY:
        return "emulated"
    return "torchao" if find_spec("torchao") is not None else "scaled_mm"


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return `[R, C]` in 8 bits, and the float32 scale of each row, `[R, 1]`: rows are codes times scale."""
    scale = rows.abs().amax(dim=-1, keepdim=True).float().clamp_min(1e-12) / LARGEST
    return (rows.float() / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale


class Float8Linear(nn.Module):
    """A linear layer with 8-bit weights and activations.

    Args:
        linear: the layer it takes the place of.
        is_emulated: multiply the rounded values in the activations' dtype.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, *, is_emulated: bool) -> None:
        super().__init__()
        self.is_emulated = is_emulated
        codes, scale = quantise(linear.weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        rows = x.flatten(0, -2)
        codes, scale = quantise(rows)
        if self.is_emulated:
            weight = (self.codes.float() * self.scale).to(x.dtype)
            return F.linear((codes.float() * scale).to(x.dtype), weight, self.bias).unflatten(0, x.shape[:-1])
        out = torch._scaled_mm(
            codes, self.codes.t(), scale_a=scale, scale_b=self.scale.t(), out_dtype=x.dtype, use_fast_accum=True
        )
        return (out if self.bias is None else out + self.bias).unflatten(0, x.shape[:-1])


@torch.no_grad()
def use_float8(encoder: nn.Module, way: Way) -> int:
    """Put 8-bit layers in the place of an encoder's linear layers, in place; return how many."""
    linears = [(name, module) for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    if way == "torchao":
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        quantize_(encoder, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
        return len(linears)
    for name, module in linears:
        owner, _, leaf = name.rpartition(".")
        setattr(encoder.get_submodule(owner), leaf, Float8Linear(module, is_emulated=way == "emulated"))
    return len(linears)
