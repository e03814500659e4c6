"""What a chart is, before it is drawn: plain descriptions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from distill.probe.results import Score
from distill.report.metrics_csv import Series

LineStyle = Literal["main", "thin", "dashed"]


@dataclass(frozen=True)
class Line:
    """One curve; `colour` is a position in the palette."""

    label: str
    series: Series
    style: LineStyle = "main"
    colour: int = 0


@dataclass(frozen=True)
class CurveChart:
    """Curves over training steps.

    Attributes:
        key: file name of the static image, without suffix.
        title: what it shows.
        lines: drawn in this order.
        marks_ends: whether the first and last value of each main line are written beside it.
        y_range: the vertical axis, the same for charts that are to be compared; None fits the lines.
    """

    key: str
    title: str
    lines: tuple[Line, ...]
    marks_ends: bool = False
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class IntervalChart:
    """Figures with intervals, one row for each scope and one mark for each encoder.

    Attributes:
        key: file name of the static image, without suffix.
        title: what it shows.
        scopes: rows, from top to bottom.
        encoders: (name, role, scores by scope); values as they are drawn, accuracies in per cent.
    """

    key: str
    title: str
    scopes: tuple[str, ...]
    encoders: tuple[tuple[str, str, dict[str, Score]], ...]


@dataclass(frozen=True)
class AxisLine:
    """One encoder's figures at the points of an axis, x ascending."""

    name: str
    role: str
    points: tuple[tuple[float, Score], ...]


@dataclass(frozen=True)
class AxisChart:
    """Figures with intervals over an axis such as the font size, one curve for each encoder.

    Attributes:
        key: file name of the static image, without suffix.
        title: what it shows.
        axis: what the horizontal axis is, with its unit.
        lines: values as they are drawn, accuracies in per cent.
    """

    key: str
    title: str
    axis: str
    lines: tuple[AxisLine, ...]


Chart = CurveChart | IntervalChart | AxisChart


def file_key(text: str) -> str:
    """Return text as part of a file name: ASCII letters, digits and dashes."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()[:80] or "unnamed"
