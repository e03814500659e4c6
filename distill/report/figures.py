"""Charts and map sheets drawn by matplotlib: themed SVG for the page, PNG for everything else.

Figures are made as objects, never through pyplot, so drawing keeps no global state and needs no display.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from distill.report.charts import Chart
from distill.report.drawing import draw_chart
from distill.report.palette import LIGHT, THEMED, VARIABLES

PNG_DPI = 200
MAX_SHEET_IN = 24.0
"""Longest side of a sheet of pictures; larger ones are drawn smaller."""

SOFTWARE = "encoder-distill report"

# Domain and metric names are user text: a dollar sign must not start a formula.
SETTINGS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.0,
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "svg.fonttype": "none",
}


def chart_svg(chart: Chart) -> str:
    """Return a chart as an SVG element for direct use inside HTML, coloured by the page's CSS variables."""
    with mpl.rc_context({**SETTINGS, "svg.hashsalt": chart.key}):
        buffer = io.StringIO()
        draw_chart(chart, THEMED).savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return inline_svg(buffer.getvalue(), chart.title)


def chart_png(chart: Chart) -> bytes:
    """Return a chart as PNG, light, at 200 dots an inch."""
    with mpl.rc_context(SETTINGS):
        return _png(draw_chart(chart, LIGHT))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PNG_DPI, facecolor=LIGHT.surface, metadata={"Software": SOFTWARE})
    return buffer.getvalue()


def inline_svg(svg: str, title: str) -> str:
    """Return matplotlib's SVG file as an element of an HTML page: themed, scalable, without outside names.

    Group ids go, because they repeat from figure to figure; those of markers and clip paths are hashes and stay.
    """
    match = re.search(r'<svg[^>]*viewBox="([\d. ]+)"[^>]*>(.*)</svg>', svg, flags=re.DOTALL)
    if match is None:
        raise ValueError("matplotlib wrote no <svg> element with a viewBox")
    body = re.sub(r"<metadata>.*?</metadata>", "", match[2], flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    label = html.escape(title, quote=True)
    return f'<svg role="img" aria-label="{label}" viewBox="{match[1]}">{body.strip()}</svg>'


Mark = tuple[float, float, float, float]


def map_sheet_png(
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]],
    marks: Sequence[Sequence[Mark | None]] = (),
) -> bytes:
    """Return pictures as one PNG: a row for each image, a column for each encoder.

    Args:
        columns: headings.
        rows: (caption, one picture `[h, w, 3]` for each column).
        marks: for each picture a frame to draw on it: left, top, width and height in per cent; none when empty.
    """
    shapes = [image.shape for image in rows[0][1]]
    ratios = [shape[1] / shape[0] for shape in shapes]
    with mpl.rc_context(SETTINGS):
        size = (1.7 * sum(ratios), 1.78 * len(rows) + 0.3)
        scale = min(1.0, MAX_SHEET_IN / max(size))
        figure = Figure(figsize=(size[0] * scale, size[1] * scale), layout="constrained")
        grid = figure.subplots(len(rows), len(columns), squeeze=False, width_ratios=ratios)
        for i, (caption, images) in enumerate(rows):
            for j, image in enumerate(images):
                axes: Axes = grid[i, j]
                _draw_picture(axes, image, marks[i][j] if marks else None)
                if i == 0:
                    axes.set_title(columns[j], fontsize=8, color=LIGHT.ink)
                if j == 0:
                    axes.set_ylabel(caption, fontsize=7, color=LIGHT.muted)
        return _png(figure)


def _draw_picture(axes: Axes, image: NDArray[np.uint8], mark: Mark | None) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if mark is not None:
        height, width = image.shape[:2]
        left, top, wide, high = (part / 100 for part in mark)
        place = (left * width - 0.5, top * height - 0.5)
        axes.add_patch(Rectangle(place, wide * width, high * height, fill=False, edgecolor="white", linewidth=1.2))
