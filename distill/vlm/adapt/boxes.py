"""Boxes as InternVL writes them: `<box>[[x1, y1, x2, y2]]</box>`, whole thousandths of the image's width and height."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

from distill.errors import DataError

BoxFormat = Literal["xyxy", "xywh"]
"""How annotations give boxes: two corners, or a corner and width and height as in COCO; in pixels."""

FULL_SCALE = 1000

ScaledBox = tuple[int, int, int, int]


def read_box(values: object, box_format: BoxFormat, where: str) -> tuple[float, float, float, float]:
    """Return an annotated box as two corners in pixels.

    Args:
        values: four numbers, as the annotation has them.
        box_format: what they are.
        where: file and record, for messages.

    Raises:
        DataError: they are no four finite numbers, or the box is empty.
    """
    items = cast(list[Any], values) if isinstance(values, list) else []
    if len(items) != 4 or any(isinstance(v, bool) or not isinstance(v, int | float) or v != v for v in items):
        raise DataError(
            f"{where}: the box is {values!r:.80}; it must be a list of four numbers ({box_format}, pixels)."
        )
    x1, y1, third, fourth = (float(item) for item in items)
    x2, y2 = (x1 + third, y1 + fourth) if box_format == "xywh" else (third, fourth)
    if not (x1 < x2 and y1 < y2):
        raise DataError(
            f"{where}: the box {values} is empty as {box_format}; its second corner must lie right of and below the "
            "first. Look whether the annotations are of the other format."
        )
    return x1, y1, x2, y2


def scale_box(box: tuple[float, float, float, float], size: tuple[int, int], where: str) -> ScaledBox:
    """Return a box in thousandths of the image, rounded; what lies outside the image is cut off.

    Args:
        box: two corners in pixels.
        size: the image's width and height in pixels.
        where: file and record, for messages.

    Raises:
        DataError: the box lies outside the image altogether.
    """
    x1, y1, x2, y2 = box
    width, height = size
    if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        raise DataError(f"{where}: the box {list(box)} lies outside the image of {width} x {height} px.")
    return _scale(x1, width), _scale(y1, height), _scale(x2, width), _scale(y2, height)


def _scale(value: float, side: float) -> int:
    return round(min(max(value / side, 0.0), 1.0) * FULL_SCALE)


def box_text(boxes: Sequence[ScaledBox]) -> str:
    """Return boxes as text.

    Example:
        >>> box_text([(10, 20, 500, 1000)])
        '<box>[[10, 20, 500, 1000]]</box>'
    """
    return f"<box>[{', '.join(str(list(box)) for box in boxes)}]</box>"
