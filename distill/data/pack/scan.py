"""Hash and header of each image of a listing: what the plan needs to know before anything is written."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.data.image_header import ImageError, open_image
from distill.data.pack.listing import read_rows
from distill.data.pack.reading import read_places
from distill.data.pack.roots import UnusableError

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}

# Pillow names the object that it could not read; equal sources must give equal lists.
_ADDRESS = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")


@dataclass(frozen=True)
class ScanUnit:
    """Consecutive rows of a listing.

    Attributes:
        root: the source's root.
        listing: path of the listing.
        offset: where its first row's line begins.
        count: number of rows.
    """

    root: str
    listing: str
    offset: int
    count: int


def scan_rows(unit: ScanUnit) -> list[list[Any]]:
    """Return [sha256, extension, None] or [None, None, reason] for each row; depends on the source alone.

    Raises:
        DataError: the storage fails, or a tar or table is damaged.
    """
    rows = read_rows(Path(unit.listing), unit.offset, unit.count)
    places = [row.place for row in rows if row.place is not None]
    contents = read_places(Path(unit.root), places)
    return [[None, None, row.problem] if row.place is None else _scan(next(contents)) for row in rows]


def _scan(content: bytes | UnusableError) -> list[Any]:
    try:
        if isinstance(content, UnusableError):
            raise content
        with open_image(content) as image:
            # The ending follows the header, whatever the file was called.
            extension = _EXTENSIONS[str(image.format)]
    except (UnusableError, ImageError) as error:
        return [None, None, _ADDRESS.sub("", str(error))]
    return [hashlib.sha256(content).hexdigest(), extension, None]
