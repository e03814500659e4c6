"""The square view an encoder sees, and the randomness of training, which depends on (seed, position) alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from distill.data.decode import decode_jpeg_rgb
from distill.errors import ConfigError

JPEG_QUALITIES = (75, 100)
"""InternVL re-encodes every training image at a random quality from 75 to 100 (`build_transform` in its
`internvl/train/dataset.py`)."""

MAX_JPEG_SIDE_PX = 65_500
"""libjpeg's limit."""

ASPECT_RATIOS = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image before it is resized.

    Teacher and student see the same view, so nothing here has to keep a label true; but the teacher's features should
    stay worth learning. Keep crops mild and flips off where there is text: mirrored writing is not writing.

    Args:
        reencode: jpeg writes and reads the image as a JPEG of random quality from 75 to 100, as InternVL's training
            does; none leaves it as it is.
        crop_scale_min: smallest part of the area that a random crop keeps, in (0, 1]; 1 means no crop. A crop's aspect
            ratio is from 3/4 to 4/3 times the image's own.
        horizontal_flip: mirror half of the images. Leave it off for documents and charts.

    Raises:
        ConfigError: crop_scale_min is outside (0, 1].
    """

    reencode: Literal["none", "jpeg"] = "jpeg"
    crop_scale_min: float = 1.0
    horizontal_flip: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale_min <= 1:
            raise ConfigError(f"data.augment.crop_scale_min is {self.crop_scale_min}; it must lie in (0, 1].")


NO_AUGMENTATION = Augmentation(reencode="none")


def augment(image: Tensor, config: Augmentation, generator: np.random.Generator) -> Tensor:
    """Return a randomly changed image.

    Args:
        image: `[3, H, W]` uint8, RGB.
        config: what may happen.
        generator: the only source of randomness.

    Returns:
        `[3, H', W']` uint8.
    """
    if config.crop_scale_min < 1:
        image = _random_crop(image, config.crop_scale_min, generator)
    if config.horizontal_flip and generator.random() < 0.5:
        image = image.flip(-1)
    if config.reencode == "jpeg" and max(image.shape[-2:]) <= MAX_JPEG_SIDE_PX:
        low, high = JPEG_QUALITIES
        image = _reencode(image, int(generator.integers(low, high + 1)))
    return image


def smallest_source_px(config: Augmentation, img_size_px: int) -> int:
    """Return the side below which a source image would have to be enlarged after the smallest crop."""
    stretch = max(ASPECT_RATIOS) if config.crop_scale_min < 1 else 1.0
    return math.ceil(img_size_px * math.sqrt(stretch / config.crop_scale_min))


def _reencode(image: Tensor, quality: int) -> Tensor:
    # Pillow writes from HWC memory, which the image has: half the time of torchvision's encoder, which takes CHW.
    buffer = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, "JPEG", quality=quality)
    return decode_jpeg_rgb(buffer.getbuffer())


def _random_crop(image: Tensor, scale_min: float, generator: np.random.Generator) -> Tensor:
    height, width = image.shape[-2:]
    scale = generator.uniform(scale_min, 1)
    stretch = math.sqrt(math.exp(generator.uniform(math.log(ASPECT_RATIOS[0]), math.log(ASPECT_RATIOS[1]))))
    rows = max(1, min(height, round(height * math.sqrt(scale) / stretch)))
    columns = max(1, min(width, round(width * math.sqrt(scale) * stretch)))
    top = int(generator.integers(0, height - rows + 1))
    left = int(generator.integers(0, width - columns + 1))
    return image[:, top : top + rows, left : left + columns]


def square_view(image: Tensor, img_size_px: int) -> Tensor:
    """Return an image resized to a square, bicubic with antialiasing, aspect ratio not kept.

    This is InternVL's view of a single tile (its config's `pad2square: false`).

    Args:
        image: `[3, H, W]` uint8, RGB; fastest as a view of `[H, W, 3]` memory.
        img_size_px: side of the square.

    Returns:
        `[3, img_size_px, img_size_px]` uint8, a view of `[img_size_px, img_size_px, 3]` memory where `image` is one:
        turning it round would cost a third of the time that decoding and resizing take.
    """
    height, width = image.shape[-2:]
    if width < img_size_px < height:
        # Both libraries resize along one axis after the other and round in between. Where the width grows and the
        # height shrinks Pillow takes the height first, torchvision the width: 55 dB apart, and slower.
        image = _resize(image, img_size_px, width)
    return _resize(image, img_size_px, img_size_px)


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    return tvf.resize(image, [height, width], interpolation=InterpolationMode.BICUBIC, antialias=True)
