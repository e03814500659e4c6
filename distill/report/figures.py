"""Charts and map sheets drawn by matplotlib: themed SVG for the page, PNG for everything else.

Figures are made as objects, never through pyplot, so drawing keeps no global state and needs no display.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from distill.report.curves import Chart, CurveChart, IntervalChart, Line

WIDTH_IN = 3.6
HEIGHT_IN = 2.5
PNG_DPI = 200
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


@dataclass(frozen=True)
class Palette:
    """Colours of a figure, as matplotlib takes them."""

    ink: str
    muted: str
    grid: str
    surface: str
    series: tuple[str, ...]

    def of(self, position: int) -> str:
        """The colour of a curve; after the last one they start again."""
        return self.series[position % len(self.series)]


LIGHT = Palette(
    # The series are Okabe and Ito's colours (jfly.uni-koeln.de/color), told apart under every colour-vision deficiency.
    "#1c2024",
    "#6b7280",
    "#e3e6ea",
    "#ffffff",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7a5195"),
)

# Stand-ins that no figure uses otherwise; the page replaces each by the CSS variable named, so that one drawing serves
# light and dark.
_THEMED = Palette("#010203", "#010204", "#010205", "#010206", tuple(f"#0102{10 + i:02d}" for i in range(7)))
_VARIABLES = {
    _THEMED.ink: "--ink",
    _THEMED.muted: "--muted",
    _THEMED.grid: "--line",
    _THEMED.surface: "--surface",
    **{colour: f"--c{i}" for i, colour in enumerate(_THEMED.series)},
}

MARKERS = {"initial": "o", "student": "s", "teacher": "D", "other": "^"}


def chart_svg(chart: Chart) -> str:
    """Return a chart as an SVG element for direct use inside HTML, coloured by the page's CSS variables."""
    with mpl.rc_context({**SETTINGS, "svg.hashsalt": chart.key}):
        buffer = io.StringIO()
        _draw(chart, _THEMED).savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return inline_svg(buffer.getvalue(), chart.title)


def chart_png(chart: Chart) -> bytes:
    """Return a chart as PNG, light, at 200 dots an inch."""
    with mpl.rc_context(SETTINGS):
        return _png(_draw(chart, LIGHT))


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
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    label = html.escape(title, quote=True)
    return f'<svg role="img" aria-label="{label}" viewBox="{match[1]}">{body.strip()}</svg>'


def _draw(chart: Chart, palette: Palette) -> Figure:
    rows = len(chart.scopes) if isinstance(chart, IntervalChart) else 0
    height = max(HEIGHT_IN, 0.85 + 0.34 * rows)
    figure = Figure(figsize=(WIDTH_IN, height), layout="constrained")
    axes = figure.add_subplot()
    _style(axes, palette)
    if isinstance(chart, IntervalChart):
        _draw_intervals(axes, chart, palette)
    else:
        _draw_curves(axes, chart, palette)
    axes.set_title(chart.title, loc="left", color=palette.ink, fontsize=9, fontweight="bold", pad=8)
    return figure


def _style(axes: Axes, palette: Palette) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(palette.grid)
    axes.tick_params(colors=palette.muted, length=0, labelsize=8)
    axes.grid(axis="y", color=palette.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_offset_text().set_color(palette.muted)


def _draw_curves(axes: Axes, chart: CurveChart, palette: Palette) -> None:
    for line in chart.lines:
        _draw_line(axes, line, palette)
        if chart.marks_ends and line.style == "main":
            _mark_ends(axes, line, palette)
    axes.set_xlabel("step", color=palette.muted, fontsize=8)
    if not chart.marks_ends:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if chart.marks_ends:
        _leave_room(axes, chart)
    if chart.y_range is not None:
        axes.set_ylim(*chart.y_range)
    if sum(1 for line in chart.lines if line.label) > 1:
        axes.legend(
            loc="best", frameon=False, fontsize=7.5, labelcolor=palette.muted, handlelength=1.4, borderaxespad=0.2
        )


def _leave_room(axes: Axes, chart: CurveChart) -> None:
    """Widen the horizontal axis on the left, where the first values are written."""
    steps = [step for line in chart.lines for step in line.series.steps]
    span = (max(steps) - min(steps)) or 1.0
    axes.set_xticks(
        [
            tick
            for tick in MaxNLocator(4, integer=True).tick_values(min(steps), max(steps))
            if min(steps) <= tick <= max(steps)
        ]
    )
    axes.set_xlim(min(steps) - 0.2 * span, max(steps) + 0.06 * span)


def _draw_line(axes: Axes, line: Line, palette: Palette) -> None:
    single = "o" if len(line.series.steps) == 1 else None
    styles: dict[str, dict[str, Any]] = {
        "main": {"linewidth": 1.8, "color": palette.of(line.colour)},
        "thin": {"linewidth": 0.9, "color": palette.of(line.colour), "alpha": 0.45},
        "dashed": {"linewidth": 1.2, "color": palette.muted, "linestyle": (0, (4, 3))},
    }
    # matplotlib keeps a label that starts with an underscore out of the legend.
    label = line.label.lstrip("_") or "_none"
    axes.plot(
        line.series.steps,
        line.series.values,
        label=label,
        marker=single,
        markersize=4,
        solid_capstyle="round",
        **styles[line.style],
    )


def _mark_ends(axes: Axes, line: Line, palette: Palette) -> None:
    """Mark and write the first value, at the left of its dot where no curve runs, and the last, above its own."""
    steps, values = line.series.steps, line.series.values
    colour = palette.of(line.colour)
    first = "initial" if line.series.has_initial else "first logged"
    for at, label, surface in ((0, first, palette.surface), (-1, "_none", colour)):
        axes.plot(
            [steps[at]],
            [values[at]],
            marker="o",
            markersize=5,
            color=colour,
            markeredgewidth=1.4,
            markerfacecolor=surface,
            linestyle="none",
            label=label,
        )
    style: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "color": palette.ink, "fontsize": 8}
    axes.annotate(f"{values[0]:.3f}", (steps[0], values[0]), xytext=(-6, -3), **style)
    if len(values) > 1:
        axes.annotate(f"{values[-1]:.3f}", (steps[-1], values[-1]), xytext=(4, 7), **style)


def _draw_intervals(axes: Axes, chart: IntervalChart, palette: Palette) -> None:
    count = len(chart.encoders)
    spread = 0.5 if count > 1 else 0.0
    order = {"student": 0, "teacher": 1}
    extra = 2
    for i, (name, role, scores) in enumerate(chart.encoders):
        offset = -spread / 2 + spread * i / max(1, count - 1)
        colour = palette.muted if role == "initial" else palette.of(order.get(role, extra))
        extra += role == "other"
        rows = [(y + offset, scores[scope]) for y, scope in enumerate(chart.scopes) if scope in scores]
        for y, score in rows:
            if score.low is not None and score.high is not None:
                axes.plot([score.low, score.high], [y, y], color=colour, linewidth=1.6, alpha=0.55)
        axes.plot(
            [score.value for _, score in rows],
            [y for y, _ in rows],
            linestyle="none",
            marker=MARKERS.get(role, "^"),
            markersize=4.6,
            color=colour,
            markerfacecolor=palette.surface if role == "initial" else colour,
            markeredgewidth=1.2,
            label=name.lstrip("_") or "unnamed",
        )
    axes.set_ylim(len(chart.scopes) - 0.45, -0.55)
    axes.set_yticks(range(len(chart.scopes)), chart.scopes)
    axes.tick_params(axis="y", labelcolor=palette.ink)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=palette.grid, linewidth=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.45, -0.12),
        ncols=min(3, count),
        frameon=False,
        fontsize=7.5,
        labelcolor=palette.muted,
        handletextpad=0.2,
        columnspacing=1.0,
    )


def map_sheet_png(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]]) -> bytes:
    """Return image maps as one PNG: a row for each image, a column for each encoder.

    Args:
        columns: headings.
        rows: (caption, one `[S, S, 3]` image for each column).
    """
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(1.7 * len(columns), 1.78 * len(rows) + 0.3), layout="constrained")
        grid = figure.subplots(len(rows), len(columns), squeeze=False)
        for i, (caption, images) in enumerate(rows):
            for j, image in enumerate(images):
                axes: Axes = grid[i, j]
                axes.imshow(image, interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                for spine in axes.spines.values():
                    spine.set_visible(False)
                if i == 0:
                    axes.set_title(columns[j], fontsize=8, color=LIGHT.ink)
                if j == 0:
                    axes.set_ylabel(caption, fontsize=7, color=LIGHT.muted)
        return _png(figure)
