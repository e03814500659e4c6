"""Boxes in answers, as InternVL writes them: `[[x1, y1, x2, y2]]`, in thousandths of the image's sides."""

from __future__ import annotations

import re
from collections.abc import Sequence

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2, in any one unit."""

IOU_THRESHOLD = 0.5
"""RefCOCO's: a box that overlaps the right one so far is right."""

_NUMBER = r"\s*(-?\d{1,6}(?:\.\d{1,20})?)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


def parse_boxes(text: str) -> list[Box]:
    """Return the boxes that stand in an answer, in their order: `[[1, 2, 3, 4], [5, 6, 7, 8]]` has two."""
    return [(float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in _BOX.findall(text)]


def box_iou(first: Box, second: Box) -> float:
    """Return intersection over union of two boxes, from 0 to 1; 0 where a box has no area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    intersection = max(width, 0.0) * max(height, 0.0)
    union = _area(first) + _area(second) - intersection
    return intersection / union if union > 0 else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def box_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 where the first box of a prediction overlaps the first of an answer by an IoU of 0.5 at least.

    As RefCOCO is scored (Acc@0.5). A prediction without a box is wrong.

    Args:
        prediction: the model's answer.
        answers: reference answers, a box in each.
    """
    predicted = parse_boxes(prediction)[:1]
    wanted = [box for answer in answers for box in parse_boxes(answer)[:1]]
    return float(any(box_iou(predicted[0], box) >= IOU_THRESHOLD for box in wanted) if predicted else False)
