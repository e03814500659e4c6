"""Images that stand in for training data when a statistic is needed before any data is at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
_MAX_IMAGES = 64
"""Enough: the scale measured on 16 and on 64 images differs by about one per cent."""

_NUM_SYNTHETIC = 16
_SEED = 0
_BRIGHTNESS = (0.25, 0.58)
_CONTRAST = (0.2, 0.45)
"""Range of an image's mean and standard deviation in [0, 1], before clipping and the loss of fine structure. After them
the 10, 50 and 90 % quantiles are 0.33, 0.45, 0.55 and 0.17, 0.21, 0.26; of 700 ImageNet photographs at 336 px they are
0.33, 0.42, 0.57 and 0.14, 0.22, 0.30."""

_DETAIL_MEDIAN, _DETAIL_LOG_STD = 0.25, 1.6
"""Strength of fine structure relative to 1/f noise, and how much it varies within an image (log-normal). The standard
deviation within 14 px patches then has the quantiles 0.04, 0.08, 0.19; those photographs have 0.01, 0.06, 0.19."""

_COARSE_CELLS = 24
"""Cells a side above which structure counts as coarse, and varies in strength no more."""

_SHARED_ACROSS_CHANNELS = 0.93
"""Correlation of the colour channels; that of the same photographs."""


def synthetic_images(img_size: int, *, num_images: int = _NUM_SYNTHETIC, seed: int = _SEED) -> Tensor:
    """Return noise with simple statistics of photographs: a 1/f spectrum, and plain next to busy areas.

    The spectrum is from "Relations between the statistics of natural images and the response properties of cortical
    cells" (Field, 1987); the local strength, a Gaussian scale mixture, from "Scale mixtures of Gaussians and the
    statistics of natural images" (Wainwright and Simoncelli, 2000). Text and charts have plainer areas and harder
    edges: where they matter, calibrate on images of one's own.

    Args:
        img_size: pixels a side.
        num_images: how many.
        seed: of every draw.

    Returns:
        `[num_images, 3, img_size, img_size]`, float32 in [0, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    fields = _pink_noise(num_images, 5, img_size, generator)
    strength = _DETAIL_MEDIAN * torch.exp(_DETAIL_LOG_STD * _coarse(fields[:, 4:], img_size))
    shared = _SHARED_ACROSS_CHANNELS
    colour = shared**0.5 * fields[:, :1] + (1 - shared) ** 0.5 * fields[:, 1:4]
    coarse = _coarse(colour, img_size)
    draws = torch.rand(num_images, 2, generator=generator)
    mean, contrast = (
        (low + (high - low) * draws[:, i]).reshape(-1, 1, 1, 1)
        for i, (low, high) in enumerate((_BRIGHTNESS, _CONTRAST))
    )
    return (mean + contrast * (coarse + strength * (colour - coarse))).clamp(0.0, 1.0)


def _pink_noise(num_images: int, channels: int, img_size: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(num_images, channels, img_size, img_size, generator=generator)
    frequency = torch.hypot(torch.fft.fftfreq(img_size)[:, None], torch.fft.rfftfreq(img_size)[None])
    frequency[0, 0] = torch.inf
    fields = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(img_size, img_size))
    return fields / fields.std(dim=(2, 3), keepdim=True)


def _coarse(fields: Tensor, img_size: int) -> Tensor:
    cells = F.adaptive_avg_pool2d(fields, min(_COARSE_CELLS, img_size))
    return F.interpolate(cells, size=(img_size, img_size), mode="bicubic", align_corners=False)


def read_images(directory: str | Path, img_size: int) -> Tensor:
    """Return the images of a directory, resized to a square without cropping, by name, at most 64 of them.

    Args:
        directory: holds JPEG, PNG, WebP or BMP files; subdirectories are searched too. When there are more files
            than are read, they are taken at even distances, so every subdirectory has its share.
        img_size: pixels a side; bicubic.

    Returns:
        `[N, 3, img_size, img_size]`, float32 in [0, 1], RGB.

    Raises:
        FileNotFoundError: the directory is missing or holds no such file.
        ValueError: a file cannot be decoded.
    """
    root = Path(directory)
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in _SUFFIXES) if root.is_dir() else []
    if not files:
        raise FileNotFoundError(
            f"{root} holds no images; calibration_images names a directory of {', '.join(sorted(_SUFFIXES))} files."
        )
    step = max(len(files) / _MAX_IMAGES, 1.0)
    return torch.stack([_read_image(files[int(i * step)], img_size) for i in range(min(len(files), _MAX_IMAGES))])


def _read_image(file: Path, img_size: int) -> Tensor:
    try:
        with Image.open(file) as image:
            pixels = image.convert("RGB").resize((img_size, img_size), Image.Resampling.BICUBIC)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{file} cannot be decoded: {error}. Remove it from the calibration images.") from error
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255.0
