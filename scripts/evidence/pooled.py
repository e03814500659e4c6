"""Losses of the study over pooled features.

A recipe names them by `class_path: pooled.PooledMSE`; the folder of this file is then on PYTHONPATH.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from distill.losses import negative_cosine


class TokensAndMean:
    """Negative cosine of every token and, as much again, of the mean over an image's tokens.

    A mean varies less than tokens do, so tokens alone say little about it; pooled probes read nothing else.
    """

    needs_head = True

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return a float32 scalar in [-2, 2] for `student [B, N, D]` and `teacher [B, N, D]`."""
        return negative_cosine(student, teacher) + negative_cosine(
            student.float().mean(1, keepdim=True), teacher.float().mean(1, keepdim=True)
        )


class PooledMSE:
    """The study's plainest baseline: mean squared error of the means over patch tokens."""

    needs_head = True

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return a float32 scalar for `student [B, N, D]`, after its head, and `teacher [B, N, D]`."""
        return F.mse_loss(student.float().mean(1), teacher.detach().float().mean(1))
