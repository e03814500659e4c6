"""Images as the data pipeline gives them, checked and normalised for one encoder."""

from __future__ import annotations

import torch
from torch import Tensor

RGB = tuple[float, float, float]
"""One number per channel: red, green, blue, of images scaled to [0, 1]."""

IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)
CLIP_MEAN: RGB = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: RGB = (0.26862954, 0.26130258, 0.27577711)

_UINT8_MAX = 255.0


def check_images(images: Tensor, patch_size: int) -> None:
    """Refuse what no encoder can read.

    Args:
        images: what should be `[B, 3, H, W]`, uint8 or floating point.
        patch_size: pixels that H and W must be a multiple of.

    Raises:
        ValueError: another shape or dtype, or H or W is no multiple of `patch_size`.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {list(images.shape)}; give RGB images as [B, 3, H, W].")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images have dtype {images.dtype}; give uint8 in [0, 255] or floating point in [0, 1].")
    height, width = images.shape[-2:]
    for size in (height, width):
        if size % patch_size or size == 0:
            raise ValueError(
                f"image size {height} x {width} is not a multiple of patch_size {patch_size}; "
                f"use {nearest_sizes(size, patch_size)}."
            )


def nearest_sizes(size: int, patch_size: int) -> str:
    """Return the multiples of `patch_size` next to `size`, for a message: `448 or 462`."""
    below = size // patch_size * patch_size
    return f"{below} or {below + patch_size}" if below else str(patch_size)


def normalise_images(images: Tensor, mean: RGB, std: RGB, dtype: torch.dtype) -> Tensor:
    """Return `(images - mean) / std`, computed in float32 whatever the autocast and the dtype of the encoder.

    Args:
        images: `[B, 3, H, W]`, uint8 in [0, 255] or floating point in [0, 1].
        mean: channel means of images scaled to [0, 1].
        std: channel standard deviations of images scaled to [0, 1].
        dtype: of the result.

    Returns:
        `[B, 3, H, W]` in `dtype`.
    """
    normalised = images.to(torch.float32, copy=True)
    if images.dtype == torch.uint8:
        normalised.div_(_UINT8_MAX)
    # Numbers rather than tensors: nothing to copy to a device, and nothing that `module.bfloat16()` could round.
    for channel, (centre, scale) in enumerate(zip(mean, std, strict=True)):
        normalised[:, channel].sub_(centre).div_(scale)
    return normalised.to(dtype)
