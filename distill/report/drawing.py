"""Charts as matplotlib figures: curves over steps, figures with intervals, figures over an axis."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from distill.probe.number_text import axis_text
from distill.report.charts import AxisChart, Chart, CurveChart, IntervalChart, Line
from distill.report.palette import MARKERS, Palette

WIDTH_IN = 3.6
HEIGHT_IN = 2.5
LOG_FROM_RATIO = 8.0
"""An axis whose largest point is this many times its smallest is drawn logarithmic, or small points would touch."""
TITLE_WIDTH = 44
"""Characters of a title's line."""
TITLE_LINE_IN = 0.15
SHORT_NAME, LONG_NAME = 18, 30
"""Longest names, in characters, of which three and two stand beside each other under a figure."""


def draw_chart(chart: Chart, palette: Palette) -> Figure:
    """Return a chart as a figure in the given colours."""
    rows = len(chart.scopes) if isinstance(chart, IntervalChart) else 0
    title = textwrap.wrap(chart.title, TITLE_WIDTH) or [""]
    height = max(HEIGHT_IN, 0.85 + 0.34 * rows) + TITLE_LINE_IN * (len(title) - 1)
    figure = Figure(figsize=(WIDTH_IN, height), layout="constrained")
    axes = figure.add_subplot()
    _style(axes, palette)
    if isinstance(chart, IntervalChart):
        _draw_intervals(axes, chart, palette)
    elif isinstance(chart, AxisChart):
        _draw_axis(axes, chart, palette)
    else:
        _draw_curves(axes, chart, palette)
    # At the figure's edge, not the axes': the names of scopes would push a long title out of the picture.
    figure.suptitle("\n".join(title), x=0.02, ha="left", color=palette.ink, fontsize=9, fontweight="bold")
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


def encoder_colours(roles: Sequence[str], palette: Palette) -> list[str]:
    """Return one colour for each encoder: grey for initialisations, the first for the first student, and so on."""
    free = iter(range(2, 2 + len(roles)))
    firsts = {"student": 0, "teacher": 1}
    return [
        palette.muted if role == "initial" else palette.of(firsts.pop(role) if role in firsts else next(free))
        for role in roles
    ]


def _draw_intervals(axes: Axes, chart: IntervalChart, palette: Palette) -> None:
    count = len(chart.encoders)
    spread = 0.5 if count > 1 else 0.0
    colours = encoder_colours([role for _, role, _ in chart.encoders], palette)
    for i, ((name, role, scores), colour) in enumerate(zip(chart.encoders, colours, strict=True)):
        offset = -spread / 2 + spread * i / max(1, count - 1)
        rows = [(y + offset, scores[scope]) for y, scope in enumerate(chart.scopes) if scope in scores]
        for y, score in rows:
            if score.low is not None and score.high is not None:
                axes.plot([score.low, score.high], [y, y], color=colour, linewidth=1.6, alpha=0.55)
        axes.plot(
            [score.value for _, score in rows],
            [y for y, _ in rows],
            linestyle="none",
            label=_label(name),
            **_marker(role, colour, palette),
        )
    axes.set_ylim(len(chart.scopes) - 0.45, -0.55)
    axes.set_yticks(range(len(chart.scopes)), chart.scopes)
    axes.tick_params(axis="y", labelcolor=palette.ink)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=palette.grid, linewidth=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _legend_below(axes, [name for name, _, _ in chart.encoders], palette)


def _draw_axis(axes: Axes, chart: AxisChart, palette: Palette) -> None:
    for line, colour in zip(chart.lines, encoder_colours([line.role for line in chart.lines], palette), strict=True):
        xs = [x for x, _ in line.points]
        axes.plot(
            xs,
            [score.value for _, score in line.points],
            linewidth=1.6,
            linestyle=(0, (4, 3)) if line.role == "initial" else "-",
            **_marker(line.role, colour, palette),
            label=_label(line.name),
        )
        for x, score in line.points:
            if score.low is not None and score.high is not None:
                axes.plot([x, x], [score.low, score.high], color=colour, linewidth=1.4, alpha=0.45)
    points = sorted({x for line in chart.lines for x, _ in line.points})
    if points[0] > 0 and points[-1] / points[0] >= LOG_FROM_RATIO:
        axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(points, [axis_text(x) for x in points])
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(chart.axis, color=palette.muted, fontsize=8)
    _legend_below(axes, [line.name for line in chart.lines], palette, drop=0.24)


def _label(name: str) -> str:
    # matplotlib keeps a label that starts with an underscore out of the legend.
    return name.lstrip("_") or "unnamed"


def _marker(role: str, colour: str, palette: Palette) -> dict[str, Any]:
    return {
        "marker": MARKERS.get(role, "^"),
        "markersize": 4.6,
        "color": colour,
        "markerfacecolor": palette.surface if role == "initial" else colour,
        "markeredgewidth": 1.2,
    }


def _legend_below(axes: Axes, names: Sequence[str], palette: Palette, drop: float = 0.12) -> None:
    longest = max(map(len, names), default=0)
    columns = 3 if longest <= SHORT_NAME else 2 if longest <= LONG_NAME else 1
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.45, -drop),
        ncols=min(columns, len(names)),
        frameon=False,
        fontsize=7.5,
        labelcolor=palette.muted,
        handletextpad=0.2,
        columnspacing=1.0,
    )
