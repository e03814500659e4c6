"""Driving: six camera views as one image, and objects told by camera and pixel as places in it.

As Mini-InternVL does for DriveLM (arXiv 2410.16261, section 3.3; the layout is that of
`internvl_chat/eval/domain_specific/drivelm/evaluate.py`): each view is resized to 896 x 448 and the six make 2688 x
896, front views above back views. At tiles of 448 px that is a grid of 6 x 2 and the thumbnail: every view is two
tiles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from distill.errors import DataError
from distill.vlm.adapt.boxes import FULL_SCALE
from distill.vlm.image_sources import ImageSource

VIEW_SIZE = (896, 448)
CAMERA_PLACES = {
    "CAM_FRONT_LEFT": (0, 0),
    "CAM_FRONT": (1, 0),
    "CAM_FRONT_RIGHT": (2, 0),
    "CAM_BACK_LEFT": (0, 1),
    "CAM_BACK": (1, 1),
    "CAM_BACK_RIGHT": (2, 1),
}
"""Column and row of each camera, by nuScenes' names."""

STITCHED_SIZE = (3 * VIEW_SIZE[0], 2 * VIEW_SIZE[1])
CAMERA_PIXELS = (1600, 900)
"""Size of nuScenes' camera images, in which DriveLM gives places."""

_NAME_PX = 32
_NUMBER = r"-?\d{1,5}(?:\.\d{1,10})?"
_PIXEL_OBJECT = re.compile(rf"<(c\d+),\s*(CAM_[A-Z_]+),\s*({_NUMBER}),\s*({_NUMBER})>")


@dataclass(frozen=True)
class StitchedViews:
    """Six views as one image, each with its camera's name in its upper left corner.

    Attributes:
        views: an image for every camera of `CAMERA_PLACES`.
        name: what messages call the whole.

    Raises:
        DataError: a camera is missing or unknown.
    """

    views: Mapping[str, ImageSource]
    name: str

    def __post_init__(self) -> None:
        if set(self.views) != set(CAMERA_PLACES):
            raise DataError(f"{self.name}: the views are {', '.join(self.views)}; give {', '.join(CAMERA_PLACES)}.")

    def size(self) -> tuple[int, int]:
        """Return width and height of the whole: 2688 x 896."""
        return STITCHED_SIZE

    def read(self) -> Image.Image:
        """Return the whole, RGB.

        Raises:
            DataError: a view cannot be read.
        """
        whole = Image.new("RGB", STITCHED_SIZE)
        pen, font = ImageDraw.Draw(whole), ImageFont.load_default(_NAME_PX)
        for camera, (column, row) in CAMERA_PLACES.items():
            left, top = column * VIEW_SIZE[0], row * VIEW_SIZE[1]
            view = self.views[camera].read().resize(VIEW_SIZE, Image.Resampling.BICUBIC)
            whole.paste(view, (left, top))
            # Outlined, so that it can be read on sky and road alike.
            pen.text((left + 8, top + 4), camera, "white", font, stroke_width=3, stroke_fill="black")
        return whole


def scale_objects(text: str, where: str) -> str:
    """Return a DriveLM text with its objects' places in thousandths of the stitched image.

    Args:
        text: with objects such as `<c1,CAM_BACK,1088.3,497.5>`, in pixels of a 1600 x 900 view.
        where: file and record, for messages.

    Returns:
        The same with `<c1,CAM_BACK,[560, 776]>`.

    Raises:
        DataError: a camera is unknown.

    Example:
        >>> scale_objects("What does <c1,CAM_BACK,1088.3,497.5> do?", "")
        'What does <c1,CAM_BACK,[560, 776]> do?'
    """

    def scaled(found: re.Match[str]) -> str:
        name, camera, x, y = found.groups()
        column, row = _place(camera, where)
        across = (column + float(x) / CAMERA_PIXELS[0]) / 3
        down = (row + float(y) / CAMERA_PIXELS[1]) / 2
        return f"<{name},{camera},[{round(across * FULL_SCALE)}, {round(down * FULL_SCALE)}]>"

    return _PIXEL_OBJECT.sub(scaled, text)


def _place(camera: str, where: str) -> tuple[int, int]:
    if camera not in CAMERA_PLACES:
        raise DataError(f"{where}: unknown camera {camera!r}; the cameras are {', '.join(CAMERA_PLACES)}.")
    return CAMERA_PLACES[camera]
