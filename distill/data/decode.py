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

from distill.data.image_header import MAX_PIXELS, ImageError, open_image

# 8-bit grey and YCbCr JPEGs go to libjpeg-turbo by way of torchvision, which writes into HWC memory once; CMYK ones
# have several conventions that Pillow knows.
_FAST_JPEG_MODES = ("RGB", "L")

MAX_SCANNED_PIXELS = 20 * MAX_PIXELS
"""A progressive JPEG visits all its pixels once a scan, and a small file can announce thousands of scans: minutes of
decoding for one image. Encoders write about ten; at the largest size allowed twice that many may pass."""

_START_OF_SCAN = b"\xff\xda"

# torchvision's messages open with the place in its C++ sources.
_CODE_PLACE = re.compile(r"^decode_jpeg, \S+:\d+, ")


def decode_image(data: bytes | bytearray, *, min_size_px: int | None = None) -> Tensor:
    """Return an encoded image's pixels as RGB.

    Transparency is dropped, not composited; palettes are resolved; 16-bit grey is scaled to 8 bits; of an animation the
    first frame counts.

    Args:
        data: an encoded JPEG, PNG or WebP image.
        min_size_px: decode a JPEG at 1/2, 1/4 or 1/8 of its size (by leaving out high frequencies, "DCT scaling") where
            both sides keep at least so many pixels. Faster for large images, and not the same pixels: about 44 dB from
            decoding whole. None decodes whole.

    Returns:
        `[3, H, W]` uint8, a view of `[H, W, 3]` memory: resizing it so, without making it contiguous first, is what
        makes the antialiased uint8 resize fast.

    Raises:
        ImageError: the bytes are damaged or truncated, the format is not allowed, or the image has too many pixels or
            scans.
    """
    with open_image(data) as image:
        is_jpeg = image.format in ("JPEG", "MPO")
        if is_jpeg:
            _check_scans(data, image.width * image.height)
        try:
            is_scaled = is_jpeg and min_size_px is not None and _scale(image, min_size_px)
            if is_jpeg and not is_scaled and image.mode in _FAST_JPEG_MODES:
                return decode_jpeg_rgb(data)
            return torch.from_numpy(_to_rgb(image)).permute(2, 0, 1)
        except Exception as error:
            # Damaged bytes make decoders raise anything; at this edge all of it means one bad image.
            reason = _CODE_PLACE.sub("", str(error))
            raise ImageError(f"the image does not decode ({type(error).__name__}: {reason})") from error


def _scale(image: Image.Image, min_size_px: int) -> bool:
    """Have a JPEG decoded at a fraction of its size; False when it is too small for that."""
    whole = image.size
    image.draft(None, (min_size_px, min_size_px))
    return image.size != whole


def _check_scans(data: bytes | bytearray, pixels: int) -> None:
    # Within a scan's data 0xff is followed by 0x00 or a restart marker, so these bytes are markers (or part of a
    # thumbnail, which has one of its own).
    scans = data.count(_START_OF_SCAN)
    if scans * pixels > MAX_SCANNED_PIXELS:
        raise ImageError(
            f"the image has {scans:,} scans of {pixels:,} pixels; at most {MAX_SCANNED_PIXELS:,} pixels are decoded"
        )


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
