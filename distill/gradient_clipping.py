"""Gradient clipping for fused optimisers under mixed precision."""

from __future__ import annotations

from lightning import LightningModule
from torch import nn
from torch.optim import Optimizer


class FusedClipping(LightningModule):
    """A LightningModule whose gradients are clipped under fused optimisers too."""

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the trainable parameters' gradients as the trainer's settings say.

        Lightning refuses to clip for a fused optimiser under mixed precision, because with a gradient scaler the
        gradients would still be scaled. Under bfloat16 there is no scaler, and nothing to refuse.
        """
        if gradient_clip_val is None or getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        else:
            nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
