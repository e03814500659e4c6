"""Noise in place of an encoder's features: the control of every claim that a VLM's answers come from the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill.encoder import Layer

_SEED = 20240607


class NoiseFeatures(nn.Module):
    """Fixed Gaussian noise with the mean and standard deviation, channel by channel, of the features it replaces.

    Every tile of the same size gets the same noise, so nothing of the image is left, not even its brightness. Mean and
    standard deviation are taken once, from the first batch, and are saved with the model.

    Args:
        width: of the hidden state.
        num_prefix_tokens: of the encoder.
    """

    mean: Tensor
    std: Tensor
    calibrated: Tensor

    def __init__(self, width: int, num_prefix_tokens: int) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))

    @property
    def is_calibrated(self) -> bool:
        """Whether mean and standard deviation have been taken."""
        return bool(self.calibrated)

    @torch.no_grad()
    def calibrate(self, features: Layer) -> None:
        """Take mean and standard deviation from real features `(prefix [T, P, D], patches [T, H, W, D])`."""
        tokens = features[1].flatten(0, 2).float()
        self.mean.copy_(tokens.mean(0))
        self.std.copy_(tokens.std(0, correction=0))
        self.calibrated.fill_(True)

    def forward(self, num_tiles: int, grid: tuple[int, int]) -> Layer:
        """Return the same noise for each of so many tiles of a grid of patches."""
        rows, columns = grid
        # Drawn on the CPU, so that every device gets the same.
        drawn = torch.randn(
            self.num_prefix_tokens + rows * columns, len(self.mean), generator=torch.Generator().manual_seed(_SEED)
        )
        noise = self.mean + self.std * drawn.to(self.mean)
        noise = noise.expand(num_tiles, -1, -1)
        return noise[:, : self.num_prefix_tokens], noise[:, self.num_prefix_tokens :].unflatten(1, grid)
