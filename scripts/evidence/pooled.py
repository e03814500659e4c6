"""The study's loss over pooled features.

A recipe names them by `class_path: pooled.PooledMSE`; the folder of this file is then on PYTHONPATH.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


class PooledMSE:
    """The study's plainest baseline: mean squared error of the means over patch tokens."""

    needs_head = True

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return a float32 scalar for `student [B, N, D]`, after its head, and `teacher [B, N, D]`."""
        return F.mse_loss(student.float().mean(1), teacher.detach().float().mean(1))
