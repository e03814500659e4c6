"""What an encoded image's header says, read before any pixel is decoded."""

from __future__ import annotations

import warnings
from io import BytesIO

from PIL import Image

from distill.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
"""The only decoders that are ever tried, whatever a file calls itself."""

MAX_PIXELS = 64_000_000
"""More would cost 200 MB as RGB for a view of 448 x 448; a 21 kB PNG can announce 169 million."""


class ImageError(DataError):
    """One image cannot be used: damaged, of an unknown format, or too large. Training puts another in its place."""


def open_image(data: bytes | bytearray) -> Image.Image:
    """Return an image of which only the header has been read, if its format and size are allowed.

    Args:
        data: an encoded JPEG, PNG or WebP image; its beginning is enough.

    Raises:
        ImageError: the header is damaged, the format is another, or the image has more than `MAX_PIXELS` pixels.
    """
    try:
        with warnings.catch_warnings():
            # The limit below is stricter than Pillow's, which only warns.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"the image is larger than {MAX_PIXELS:,} pixels ({error})") from error
    except Exception as error:
        # Damaged bytes make decoders raise anything; at this edge all of it means one bad image.
        raise ImageError(f"no readable JPEG, PNG or WebP header ({type(error).__name__}: {error})") from error
    width, height = image.size
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise ImageError(f"the image is {width} x {height}; at most {MAX_PIXELS:,} pixels are allowed")
    return image
