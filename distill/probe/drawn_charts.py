"""Drawn charts whose type and values are known: data for the chart probe.

Every chart shows four values from 0 to 1: a height or length as part of its axis, or a share of a whole. Colours,
margins, grounds, grids and marks are drawn independently of type and values; no number is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from distill.data.synthetic.canvas import DESIGN_UNITS, Canvas, Point, polar
from distill.data.synthetic.rendered import between, chance, pick
from distill.data.synthetic.textures import Colour
from distill.probe.drawn import drawing_rng, require_drawable, to_tensor
from distill.probe.intervals import FloatArray

NUM_VALUES = 4

FAMILIES: dict[str, tuple[str, ...]] = {
    "upright": ("bar", "line", "area", "lollipop"),
    "lying": ("horizontal_bar", "horizontal_lollipop"),
    "round": ("pie", "donut"),
}
"""Chart types by how values are shown; values are read by one regression a family."""

TYPES = tuple(kind for kinds in FAMILIES.values() for kind in kinds)

_LIGHT: tuple[Colour, ...] = ((255, 255, 255), (247, 247, 245), (234, 234, 242), (253, 246, 227))
_DARK: tuple[Colour, ...] = ((29, 31, 39), (18, 38, 58))
_INKS: tuple[Colour, ...] = (
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75), (23, 190, 207),
    (230, 171, 2), (231, 41, 138), (102, 166, 30),
)  # fmt: skip


@dataclass(frozen=True)
class ChartSettings:
    """What is drawn.

    Attributes:
        num_charts: 80 at least, so that each part of the split has every type; a real study wants thousands.
        img_size_px: side of the square images.
        seed: another seed draws other charts.
    """

    num_charts: int = 200
    img_size_px: int = 448
    seed: int = 0

    def __post_init__(self) -> None:
        require_drawable("num_charts", self.num_charts, 10 * len(TYPES), self.img_size_px)


@dataclass(frozen=True, eq=False)
class Charts:
    """Drawn charts; chart i is of type i modulo the number of types.

    Attributes:
        images: `[N, 3, S, S]`, uint8.
        types: `[N]`, int64, position in `TYPES`.
        values: `[N, 4]`, float64, from 0 to 1: from left to right, top to bottom, or clockwise from the top.
    """

    images: Tensor
    types: Tensor
    values: FloatArray


@dataclass(frozen=True)
class _Frame:
    """Where a chart is drawn, and in which colours."""

    canvas: Canvas
    left: float
    top: float
    right: float
    bottom: float
    ink: Colour
    ground: Colour
    fills: tuple[Colour, ...]

    def x(self, part: float) -> float:
        return self.left + part * (self.right - self.left)

    def y(self, part: float) -> float:
        """The height of a part of the axis, which starts at the bottom."""
        return self.bottom - part * (self.bottom - self.top)


@lru_cache(maxsize=1)
def draw_charts(settings: ChartSettings) -> Charts:
    """Draw the charts; the last set is kept in memory, because every encoder is shown the same."""
    count, size = settings.num_charts, settings.img_size_px
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    values = np.empty((count, NUM_VALUES))
    for number in range(count):
        rng = drawing_rng(settings.seed, "charts", number)
        images[number], values[number] = _draw_chart(TYPES[number % len(TYPES)], rng, size)
    return Charts(images, torch.arange(count) % len(TYPES), values)


def _draw_chart(kind: str, rng: np.random.Generator, size: int) -> tuple[Tensor, FloatArray]:
    dark = chance(rng, 0.2)
    ground = pick(rng, _DARK if dark else _LIGHT)
    canvas = Canvas(DESIGN_UNITS, DESIGN_UNITS, 2 * size / DESIGN_UNITS, ground)
    ink: Colour = (225, 225, 225) if dark else (45, 45, 45)
    order = rng.permutation(len(_INKS)).tolist()
    is_round = kind in FAMILIES["round"]
    one_colour = chance(rng, 0.6) and not is_round
    fills = tuple(_INKS[order[0 if one_colour else i]] for i in range(NUM_VALUES))
    left, top = between(rng, 40, 64), between(rng, 28, 52)
    right, bottom = DESIGN_UNITS - between(rng, 20, 44), DESIGN_UNITS - between(rng, 36, 60)
    frame = _Frame(canvas, left, top, right, bottom, ink, ground, fills)
    values = rng.uniform(0.08, 1.0, NUM_VALUES)
    if is_round:
        values = values / values.sum()
    else:
        _draw_axes(frame, rng, lying=kind in FAMILIES["lying"])
    _DRAW[kind](frame, rng, values)
    return to_tensor(canvas.finish(size)), values


def _draw_axes(frame: _Frame, rng: np.random.Generator, *, lying: bool) -> None:
    canvas = frame.canvas
    if chance(rng, 0.5):
        for part in (0.25, 0.5, 0.75, 1.0):
            start = (frame.x(part), frame.bottom) if lying else (frame.left, frame.y(part))
            stop = (frame.x(part), frame.top) if lying else (frame.right, frame.y(part))
            canvas.line((start, stop), (150, 150, 150), 0.8)
    canvas.line(((frame.left, frame.top), (frame.left, frame.bottom), (frame.right, frame.bottom)), frame.ink, 1.6)


def _places() -> list[float]:
    return [(i + 0.5) / NUM_VALUES for i in range(NUM_VALUES)]


def _bar(frame: _Frame, rng: np.random.Generator, values: FloatArray) -> None:
    half = between(rng, 0.25, 0.45) / NUM_VALUES
    for at, value, fill in zip(_places(), values.tolist(), frame.fills, strict=True):
        frame.canvas.rectangle((frame.x(at - half), frame.y(value), frame.x(at + half), frame.bottom), fill)


def _horizontal_bar(frame: _Frame, rng: np.random.Generator, values: FloatArray) -> None:
    half = between(rng, 0.25, 0.45) / NUM_VALUES
    for at, value, fill in zip(_places(), values.tolist(), frame.fills, strict=True):
        low, high = frame.y(1 - at - half), frame.y(1 - at + half)
        frame.canvas.rectangle((frame.left, high, frame.x(value), low), fill)


def _corners(frame: _Frame, values: FloatArray) -> list[Point]:
    return [(frame.x(at), frame.y(value)) for at, value in zip(_places(), values.tolist(), strict=True)]


def _line(frame: _Frame, rng: np.random.Generator, values: FloatArray) -> None:
    corners = _corners(frame, values)
    frame.canvas.line(corners, frame.fills[0], between(rng, 2, 5))
    if chance(rng, 0.5):
        for corner in corners:
            frame.canvas.circle(corner, 6, frame.fills[0])


def _area(frame: _Frame, rng: np.random.Generator, values: FloatArray) -> None:
    corners = _corners(frame, values)
    feet = [(corners[-1][0], frame.bottom), (corners[0][0], frame.bottom)]
    frame.canvas.polygon([*corners, *feet], frame.fills[0], frame.ink if chance(rng, 0.5) else None)


def _lollipop(frame: _Frame, rng: np.random.Generator, values: FloatArray) -> None:
    radius = between(rng, 7, 13)
    for (x, y), fill in zip(_corners(frame, values), frame.fills, strict=True):
        frame.canvas.line(((x, frame.bottom), (x, y)), fill, 3)
        frame.canvas.circle((x, y), radius, fill)


def _horizontal_lollipop(frame: _Frame, rng: np.random.Generator, values: FloatArray) -> None:
    radius = between(rng, 7, 13)
    for at, value, fill in zip(_places(), values.tolist(), frame.fills, strict=True):
        y = frame.y(1 - at)
        frame.canvas.line(((frame.left, y), (frame.x(value), y)), fill, 3)
        frame.canvas.circle((frame.x(value), y), radius, fill)


def _slices(frame: _Frame, rng: np.random.Generator, values: FloatArray) -> tuple[Point, float]:
    """Draw slices clockwise from the top; return centre and radius."""
    centre = ((frame.left + frame.right) / 2, (frame.top + frame.bottom) / 2)
    radius = between(rng, 0.38, 0.48) * min(frame.right - frame.left, frame.bottom - frame.top)
    edges = (-90 + 360 * np.concatenate([[0.0], values.cumsum()])).tolist()
    for (start, stop), fill in zip(pairwise(edges), frame.fills, strict=True):
        rim = [polar(centre, radius, angle) for angle in np.linspace(start, stop, 48).tolist()]
        frame.canvas.polygon([centre, *rim], fill)
    return centre, radius


def _pie(frame: _Frame, rng: np.random.Generator, values: FloatArray) -> None:
    _slices(frame, rng, values)


def _donut(frame: _Frame, rng: np.random.Generator, values: FloatArray) -> None:
    centre, radius = _slices(frame, rng, values)
    frame.canvas.circle(centre, between(rng, 0.45, 0.6) * radius, frame.ground)


_DRAW: dict[str, Callable[[_Frame, np.random.Generator, FloatArray], None]] = {
    "bar": _bar,
    "line": _line,
    "area": _area,
    "lollipop": _lollipop,
    "horizontal_bar": _horizontal_bar,
    "horizontal_lollipop": _horizontal_lollipop,
    "pie": _pie,
    "donut": _donut,
}
