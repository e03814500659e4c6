"""Pictures inside the page: WebP as data URIs, and style rules for pictures that stand in several places."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

THUMBNAIL_PX = 224
SMALL_PX = 88
PHOTO_QUALITY = 82
SMALL_QUALITY = 72


def photo_of(image: Tensor, size_px: int = THUMBNAIL_PX) -> Image.Image:
    """Return an image `[3, S, S]`, uint8, at another size."""
    photo = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return photo.resize((size_px, size_px), Image.Resampling.LANCZOS)


def enlarged(pixels: NDArray[np.uint8], size_px: int = THUMBNAIL_PX) -> Image.Image:
    """Return a map `[h, w, 3]` enlarged without smoothing: each square is one token, nothing between is made up."""
    return Image.fromarray(pixels).resize((size_px, size_px), Image.Resampling.NEAREST)


def webp_uri(image: Image.Image, quality: int | None) -> str:
    """Return an image as a data URI, WebP of the given quality, or lossless for None."""
    buffer = io.BytesIO()
    if quality is None:
        image.save(buffer, format="WEBP", lossless=True, method=4)
    else:
        image.save(buffer, format="WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


class SmallPictures:
    """Pictures that may stand in several places: each is written once, as the background of a style class."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}

    def add(self, name: str, image: Tensor) -> str:
        """Return the style class of an image `[3, S, S]`, uint8; `name` tells images apart, letters and digits."""
        if name not in self._rules:
            self._rules[name] = webp_uri(photo_of(image, SMALL_PX), SMALL_QUALITY)
        return name

    def css(self) -> str:
        """Return the rules."""
        return "\n".join(f".{name}{{background-image:url({uri})}}" for name, uri in self._rules.items())
