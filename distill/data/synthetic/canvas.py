"""A drawing surface in design units that records where its text went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from distill.data.synthetic.fonts import load_font
from distill.data.synthetic.textures import Colour

DESIGN_UNITS = 448.0
Point = tuple[float, float]


class Canvas:
    """An RGB image drawn in design units, of which a whole sample image is 448 wide.

    Args:
        width: width in design units.
        height: height in design units.
        pixels_per_unit: resolution; twice the final one gives smooth edges after `finish`.
        background: one colour.
    """

    def __init__(self, width: float, height: float, pixels_per_unit: float, background: Colour) -> None:
        self.width = width
        self.height = height
        self.pixels_per_unit = pixels_per_unit
        self.image = Image.new("RGB", (round(width * pixels_per_unit), round(height * pixels_per_unit)), background)
        self.text_lines: list[tuple[str, tuple[float, float, float, float]]] = []
        self._draw = ImageDraw.Draw(self.image)

    def _scaled(self, points: Sequence[Point]) -> list[Point]:
        k = self.pixels_per_unit
        return [(x * k, y * k) for x, y in points]

    def _stroke(self, width: float) -> int:
        return max(1, round(width * self.pixels_per_unit))

    def line(self, points: Sequence[Point], colour: Colour, width: float = 1.6, dash: float = 0.0) -> None:
        """Draws a polyline; `dash` is the length of a dash and of a gap, 0 for a solid line."""
        if dash:
            for start, end in pairwise(points):
                self._dashed(start, end, colour, width, dash)
            return
        self._draw.line(self._scaled(points), fill=colour, width=self._stroke(width), joint="curve")

    def _dashed(self, start: Point, end: Point, colour: Colour, width: float, dash: float) -> None:
        length = math.dist(start, end)
        if length == 0:
            return
        dx, dy = (end[0] - start[0]) / length, (end[1] - start[1]) / length
        at = 0.0
        while at < length:
            stop = min(at + dash, length)
            piece = ((start[0] + dx * at, start[1] + dy * at), (start[0] + dx * stop, start[1] + dy * stop))
            self._draw.line(self._scaled(piece), fill=colour, width=self._stroke(width))
            at += 2 * dash

    def polygon(
        self, points: Sequence[Point], fill: Colour | None = None, outline: Colour | None = None, width: float = 1.6
    ) -> None:
        """Draws a closed polygon."""
        scaled = self._scaled(points)
        if fill is not None:
            self._draw.polygon(scaled, fill=fill)
        if outline is not None:
            self._draw.line([*scaled, scaled[0], scaled[1]], fill=outline, width=self._stroke(width), joint="curve")

    def circle(
        self,
        centre: Point,
        radius: float,
        fill: Colour | None = None,
        outline: Colour | None = None,
        width: float = 1.6,
        squash: float = 1.0,
    ) -> None:
        """Draws a circle, or an ellipse of height `squash * 2 * radius`."""
        x, y = centre
        box = self._scaled([(x - radius, y - radius * squash), (x + radius, y + radius * squash)])
        self._draw.ellipse(box, fill=fill, outline=outline, width=self._stroke(width) if outline else 0)

    def arc(
        self, centre: Point, radius: float, start_deg: float, end_deg: float, colour: Colour, width: float = 1.6
    ) -> None:
        """Draws a circular arc; angles run clockwise from the x axis, as y points down."""
        x, y = centre
        box = self._scaled([(x - radius, y - radius), (x + radius, y + radius)])
        self._draw.arc(box, start_deg, end_deg, fill=colour, width=self._stroke(width))

    def rectangle(
        self,
        box: tuple[float, float, float, float],
        fill: Colour | None = None,
        outline: Colour | None = None,
        width: float = 1.6,
        radius: float = 0.0,
    ) -> None:
        """Draws an upright rectangle (x0, y0, x1, y1), with round corners if `radius` is positive."""
        corners = self._scaled([(box[0], box[1]), (box[2], box[3])])
        stroke = self._stroke(width) if outline is not None else 0
        self._draw.rounded_rectangle(
            corners, radius=radius * self.pixels_per_unit, fill=fill, outline=outline, width=stroke
        )

    def arrow(self, start: Point, end: Point, colour: Colour, width: float = 1.8, head: float = 9.0) -> None:
        """Draws a straight arrow with a filled head of length `head`."""
        length = math.dist(start, end) or 1.0
        dx, dy = (end[0] - start[0]) / length, (end[1] - start[1]) / length
        neck = (end[0] - dx * head * 0.8, end[1] - dy * head * 0.8)
        self.line((start, neck), colour, width)
        left = (end[0] - dx * head - dy * head * 0.42, end[1] - dy * head + dx * head * 0.42)
        right = (end[0] - dx * head + dy * head * 0.42, end[1] - dy * head - dx * head * 0.42)
        self.polygon((end, left, neck, right), fill=colour)

    def text_width(self, text: str, font: str, size: float) -> float:
        """Returns the advance width of the text in design units."""
        loaded = load_font(font, round(size * self.pixels_per_unit))
        return loaded.getlength(text) / self.pixels_per_unit

    def fitted(self, text: str, font: str, size: float, width: float) -> float:
        """Returns `size`, or the smaller size at which the text is `width` wide."""
        return min(size, size * width / max(self.text_width(text, font, size), 1e-6))

    def text(
        self,
        at: Point,
        text: str,
        font: str,
        size: float,
        colour: Colour,
        anchor: str = "mm",
        halo: Colour | None = None,
        margin: float = 4.0,
    ) -> tuple[float, float, float, float]:
        """Draws one line of text, moved inwards where it would leave the canvas.

        Args:
            at: the anchor's position in design units.
            text: the line.
            font: font file name without its ending.
            size: font size in design units.
            colour: fill.
            anchor: Pillow's two-letter anchor.
            halo: colour of a patch behind the text that keeps it readable on lines.
            margin: smallest distance from the canvas's edge.

        Returns:
            The text's box (x0, y0, x1, y1) in design units.
        """
        k = self.pixels_per_unit
        loaded = load_font(font, round(size * k))
        x, y = at[0] * k, at[1] * k
        left, top, right, bottom = self._draw.textbbox((x, y), text, font=loaded, anchor=anchor)
        dx = max(margin * k - left, 0) or min((self.width - margin) * k - right, 0)
        dy = max(margin * k - top, 0) or min((self.height - margin) * k - bottom, 0)
        box = ((left + dx) / k, (top + dy) / k, (right + dx) / k, (bottom + dy) / k)
        if halo is not None:
            self.rectangle((box[0] - 2, box[1] - 1.5, box[2] + 2, box[3] + 1.5), fill=halo)
        self._draw.text((x + dx, y + dy), text, font=loaded, fill=colour, anchor=anchor)
        self.text_lines.append((text, box))
        return box

    def paste(self, mask: Image.Image, at: tuple[int, int], colour: Colour) -> None:
        """Lays a colour through a mask whose upper left corner is at this pixel."""
        self.image.paste(colour, at, mask)

    def annotated_lines(self, size_px: int) -> list[dict[str, object]]:
        """Returns the text lines with their boxes in pixels of the final, `size_px` wide image."""
        k = size_px / DESIGN_UNITS
        return [{"text": text, "box": [round(v * k, 1) for v in box]} for text, box in self.text_lines]

    def finish(self, size_px: int) -> Image.Image:
        """Returns the drawing at its final size, smoothed."""
        if self.image.size == (2 * size_px, 2 * size_px):
            return self.image.reduce(2)
        return self.image.resize((size_px, size_px), Image.Resampling.LANCZOS)


def polar(centre: Point, radius: float, angle_deg: float) -> Point:
    """Returns the point at this distance and angle; angles run clockwise on the page, 0 points right."""
    angle = math.radians(angle_deg)
    return centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)


def wrapped(canvas: Canvas, text: str, font: str, size: float, width: float) -> list[str]:
    """Returns the text broken into lines no wider than `width` design units."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and canvas.text_width(longer, font, size) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line] if line else lines


def homography(source: Sequence[Point], target: Sequence[Point]) -> np.ndarray:
    """Returns the `[3, 3]` float64 matrix that takes the four source points to the four target points."""
    rows: list[list[float]] = []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
    flat = np.asarray([c for point in target for c in point], np.float64)
    return np.append(np.linalg.solve(np.asarray(rows, np.float64), flat), 1.0).reshape(3, 3)
