"""Low resolution first: students begin on small copies of the images whose whole copies their teachers see.

Most of what a student has to change does not depend on the image size, and a small image costs a fraction. Targets stay
those of whole images; grids are matched as always (`distill.hidden_states.match_grids`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.encoder import Encoder
from distill.errors import ConfigError


@dataclass
class LowResolution:
    """How long students see small images, and how small.

    Args:
        img_size_px: side of the small images, a multiple of every student's patch size and below `data.img_size_px`.
        fraction: part of the optimiser steps that are taken on them, between 0 and 1. The steps after it adapt the
            student to whole images. It is taken of the steps that the run at hand plans: a run that is extended counts
            anew. Validation always shows whole images.

    Raises:
        ConfigError: a number is out of range.
    """

    img_size_px: int
    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ConfigError(
                f"model.low_resolution.fraction is {self.fraction}; it must lie between 0 and 1. To train on small "
                "images alone, set data.img_size_px."
            )
        if self.img_size_px < 1:
            raise ConfigError(f"model.low_resolution.img_size_px is {self.img_size_px}; it must be at least 1.")

    def check(self, img_size_px: int, students: Mapping[str, Encoder]) -> None:
        """Refuse a size that the data or a student cannot go with.

        Args:
            img_size_px: side of the whole images.
            students: by name.

        Raises:
            ConfigError: naming the size and what it has to be.
        """
        where = f"model.low_resolution.img_size_px is {self.img_size_px}"
        if self.img_size_px >= img_size_px:
            raise ConfigError(f"{where}; it must be below data.img_size_px, {img_size_px}.")
        for name, student in students.items():
            if self.img_size_px % student.patch_size:
                raise ConfigError(
                    f"{where}; it must be a multiple of {student.patch_size}, the student {name!r}'s patch."
                )

    def shrink(self, images: Tensor) -> Tensor:
        """Return small copies of images `[B, 3, H, W]`, uint8 or in [0, 1]: `[B, 3, S, S]`, floating, in [0, 1]."""
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        side = (self.img_size_px, self.img_size_px)
        return F.interpolate(pixels, size=side, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
