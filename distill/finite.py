"""Which samples of a batch have finite hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.encoder import Layer


def finite_samples(layers: list[Layer]) -> Tensor:
    """Return for each sample whether all its hidden states are finite, bool `[B]` on their device.

    Looks at each sample's sum in float32: a NaN or an infinity anywhere makes that one non-finite, and values whose
    sum leaves float32's range are none to train on either. It reads each tensor once and copies nothing to the CPU.
    """
    parts = [part for layer in layers for part in layer if part[0].numel()]
    sums = torch.stack([part.detach().flatten(1).sum(1, dtype=torch.float32) for part in parts])
    return sums.isfinite().all(0)
