"""The mean cosine of projected student tokens with teacher tokens, a few thousand tokens at a time.

A projection of 1024 to 3200 channels, its float32 copy and their gradients are the largest activations of a step:
held whole, 525,000 tokens (128 images, four layers) take about 21 GB. Here each chunk is projected, compared and
differentiated while it is there, in the forward pass; what stays for the backward pass is the gradient of the narrow
student tokens and of the projection itself. It takes as many matrix products as before.

Legend: T tokens, D the student's width, E the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distill.losses import NORM_EPS

Prepare = Callable[[Tensor], Tensor]


def projected_cosine(tokens: Tensor, projection: nn.Linear, teacher: Tensor, prepare: Prepare, chunk: int) -> Tensor:
    """Return the mean over tokens of cos(projection(tokens), prepare(teacher)): a float32 scalar.

    The projection is computed in autocast's dtype, the cosine in float32. The teacher gets no gradient.

    Args:
        tokens: `[..., D]`.
        projection: from D to E channels, with a bias.
        teacher: `[..., E]`.
        prepare: what is done to teacher tokens `[n, E]` first, such as standardising them.
        chunk: tokens at a time, at least 1.
    """
    kind = tokens.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype
    parameters = (projection.weight, projection.bias)
    has_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (tokens, *parameters))
    plan = _Plan(prepare, chunk, dtype, has_gradient)
    with torch.autocast(kind, enabled=False):
        total = _SummedCosine.apply(tokens.flatten(0, -2), *parameters, teacher.detach().flatten(0, -2), plan)
    return cast(Tensor, total) / teacher[..., 0].numel()


class _Plan:
    """How the sum is computed; one object, as autograd functions take tensors and plain values."""

    def __init__(self, prepare: Prepare, chunk: int, dtype: torch.dtype, has_gradient: bool) -> None:
        self.prepare, self.chunk, self.dtype, self.has_gradient = prepare, chunk, dtype, has_gradient


class _SummedCosine(torch.autograd.Function):
    """Sum of cosines over tokens `[T, D]`; the gradients are computed in the forward pass, for a gradient of one."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor, plan: _Plan) -> Tensor:
        wide, offset = weight.to(plan.dtype), bias.to(plan.dtype)
        total = torch.zeros((), dtype=torch.float32, device=tokens.device)
        if not plan.has_gradient:
            for own, target in zip(tokens.split(plan.chunk), teacher.split(plan.chunk), strict=True):
                projected = F.linear(own.to(plan.dtype), wide, offset)
                total += _cosines(projected.float(), plan.prepare(target).float())[0].sum()
            return total
        of_tokens = torch.empty(tokens.shape, dtype=plan.dtype, device=tokens.device)
        of_weight, of_bias = (torch.zeros_like(t, dtype=torch.float32) for t in (weight, bias))
        parts = (tokens.split(plan.chunk), teacher.split(plan.chunk), of_tokens.split(plan.chunk))
        for own, target, place in zip(*parts, strict=True):
            cast_own = own.to(plan.dtype)
            projected = F.linear(cast_own, wide, offset).float()
            cosine, gradient = _cosine_and_gradient(projected, plan.prepare(target).float())
            total += cosine.sum()
            of_bias += gradient.sum(0)
            narrow = gradient.to(plan.dtype)
            torch.mm(narrow, wide, out=place)
            of_weight += narrow.T @ cast_own
        ctx.save_for_backward(of_tokens, of_weight, of_bias)
        ctx.dtypes = (tokens.dtype, weight.dtype, bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        scaled = (
            # In float32 first: divided by the number of tokens, gradients are too small for float16.
            (saved.float() * gradients[0]).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None)


def _cosines(projected: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return cosines `[T, 1]` and both norms `[T, 1]`, as `torch.nn.functional.cosine_similarity` bounds them."""
    own = torch.linalg.vector_norm(projected, dim=-1, keepdim=True).clamp_min(NORM_EPS)
    other = torch.linalg.vector_norm(target, dim=-1, keepdim=True).clamp_min(NORM_EPS)
    return (projected * target).sum(-1, keepdim=True) / (own * other), own, other


def _cosine_and_gradient(projected: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines `[T, 1]` and their gradients by `projected`, `[T, E]`; `projected` is overwritten."""
    cosine, own, other = _cosines(projected, target)
    # A token at the bound has a constant for its norm, which has no gradient.
    inner = torch.where(own > NORM_EPS, cosine / own.square(), 0.0)
    return cosine, target.mul(1 / (own * other)).sub_(projected.mul_(inner))
