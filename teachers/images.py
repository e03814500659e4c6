"""Images as they come from the data pipeline, made into what one encoder was trained on."""

from __future__ import annotations

import torch
from torch import Tensor

RGB = tuple[float, float, float]
"""One number per channel, in the order red, green, blue."""

IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)

_UINT8_MAX = 255.0


def normalise_images(images: Tensor, mean: RGB, std: RGB, dtype: torch.dtype) -> Tensor:
    """Return `(images - mean) / std`, computed in float32 whatever the autocast, then cast once.

    Channels are handled one by one with Python numbers, so nothing is copied from host to device on the way.

    Args:
        images: `[B, 3, H, W]`, uint8 in [0, 255] or floating point in [0, 1], RGB.
        mean: channel means of images scaled to [0, 1].
        std: channel standard deviations of images scaled to [0, 1].
        dtype: what the encoder computes in.

    Returns:
        `[B, 3, H, W]` in `dtype`.

    Raises:
        ValueError: `images` has another shape or an integer dtype other than uint8.
    """
    if images.ndim != 4 or images.shape[1] != len(mean):
        raise ValueError(f"images have shape {tuple(images.shape)}; expected [B, 3, H, W], RGB, channels second.")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images have dtype {images.dtype}; use uint8 in [0, 255] or floating point in [0, 1].")
    white = _UINT8_MAX if images.dtype == torch.uint8 else 1.0
    channels = [(images[:, c].to(torch.float32) / white - mean[c]) / std[c] for c in range(len(mean))]
    return torch.stack(channels, dim=1).to(dtype)


def check_image_size(height: int, width: int, patch_size: int) -> None:
    """Refuse sizes that do not divide into whole patches.

    Raises:
        ValueError: `height` or `width` is no multiple of `patch_size`; the message names the nearest that are.
    """
    for size in (height, width):
        if size % patch_size or size == 0:
            below = size // patch_size * patch_size
            nearest = f"{below} or {below + patch_size}" if below else str(patch_size)
            raise ValueError(
                f"image size {height} x {width} px: {size} is not a multiple of patch_size {patch_size}; use {nearest}."
            )


def as_rgb(values: object, name: str) -> RGB:
    """Return three floats from a list or tuple, as read from YAML or a config file.

    Raises:
        ValueError: `values` is not three numbers; `name` says which setting it is.
    """
    if isinstance(values, list | tuple):
        numbers = [float(v) for v in values if isinstance(v, int | float)]
        if len(numbers) == len(values) == 3:
            return (numbers[0], numbers[1], numbers[2])
    raise ValueError(f"{name} is {values!r}; it must be three numbers, for red, green and blue.")
