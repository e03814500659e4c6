"""Encoded bytes to RGB pixels, within limits that are checked before decoding.

EXIF orientation is not applied and an embedded colour profile is not used, as in InternVL's loading (`Image.open(...)
.convert("RGB")`): the teacher was trained on images read that way.
"""

from __future__ import annotations

import re
import warnings
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from distill.data.image_header import ImageError, open_image

# 8-bit grey and YCbCr JPEGs go to libjpeg-turbo by way of torchvision, which writes into HWC memory once; CMYK ones
# have several conventions that Pillow knows.
_FAST_JPEG_MODES = ("RGB", "L")

# torchvision's messages open with the place in its C++ sources.
_CODE_PLACE = re.compile(r"^decode_jpeg, \S+:\d+, ")


def decode_image(data: bytes | bytearray) -> Tensor:
    """Return an encoded image's pixels as RGB.

    Transparency is dropped, not composited; palettes are resolved; 16-bit grey is scaled to 8 bits; of an animation the
    first frame counts.

    Args:
        data: an encoded JPEG, PNG or WebP image.

    Returns:
        `[3, H, W]` uint8, a view of `[H, W, 3]` memory: resizing it so, without making it contiguous first, is what
        makes the antialiased uint8 resize fast.

    Raises:
        ImageError: the bytes are damaged or truncated, the format is not allowed, or the image has too many pixels.
    """
    with open_image(data) as image:
        try:
            if image.format in ("JPEG", "MPO") and image.mode in _FAST_JPEG_MODES:
                return decode_jpeg_rgb(data)
            return torch.from_numpy(_to_rgb(image)).permute(2, 0, 1)
        except Exception as error:
            # Damaged bytes make decoders raise anything; at this edge all of it means one bad image.
            reason = _CODE_PLACE.sub("", str(error))
            raise ImageError(f"the image does not decode ({type(error).__name__}: {reason})") from error


def decode_jpeg_rgb(data: bytes | bytearray | memoryview) -> Tensor:
    """Return the pixels of a grey or YCbCr JPEG, by libjpeg-turbo.

    Returns:
        `[3, H, W]` uint8, a view of `[H, W, 3]` memory.

    Raises:
        RuntimeError: the bytes are damaged or truncated.
    """
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    with warnings.catch_warnings():
        # torchvision announces from 0.29 on that a later release will be without decoders.
        warnings.simplefilter("ignore", DeprecationWarning)
        return cast(Tensor, decode_jpeg(encoded, mode=ImageReadMode.RGB))


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Return `[H, W, 3]` pixels."""
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit grey at 255, which turns most of it white.
        grey = (np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        # Straight to RGB, Pillow warns about the transparency it drops; the colours are the same.
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))
