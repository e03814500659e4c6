"""Projection heads from a student's width to its teacher's, one for each paired layer; trained, never exported.

A cosine between 1024 and 3200 channels needs a map between them. The Mini-InternVL report does not say which one it
used, so these and their default are this project's choice.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

HeadKind = Literal["linear", "layer_norm_linear", "mlp", "none"]


class LinearHead(nn.Sequential):
    """One linear layer: the student's residual stream must become the teacher's by rotation and scale alone."""

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__(nn.Linear(student_dim, teacher_dim))


class LayerNormLinearHead(nn.Sequential):
    """LayerNorm, then one linear layer: the student's block outputs have no final norm, so their scale drifts."""

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__(nn.LayerNorm(student_dim, eps=1e-6), nn.Linear(student_dim, teacher_dim))


class MLPHead(nn.Sequential):
    """LayerNorm, linear, GELU, linear, with a hidden width of twice the student's."""

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        hidden_dim = 2 * student_dim
        super().__init__(
            nn.LayerNorm(student_dim, eps=1e-6),
            nn.Linear(student_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, teacher_dim),
        )


class NoHead(nn.Module):
    """The identity, for losses that compare tokens of different widths, and for equal widths."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return `tokens` as they are."""
        return tokens


def build_head(kind: HeadKind, student_dim: int, teacher_dim: int) -> nn.Module:
    """Return a head that maps `[..., student_dim]` to `[..., teacher_dim]`.

    Args:
        kind: "linear", "layer_norm_linear", "mlp", or "none" for the identity.
        student_dim: channels in.
        teacher_dim: channels out.
    """
    if kind == "none":
        return NoHead()
    heads = {"linear": LinearHead, "layer_norm_linear": LayerNormLinearHead, "mlp": MLPHead}
    head = heads[kind](student_dim, teacher_dim)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
    return head
