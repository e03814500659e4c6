"""Charts over named categories: bars, pies, lollipops, waterfalls, radars and heat maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from distill.data.synthetic.chart_plan import (
    ChartPlan,
    Draw,
    Values,
    amounts,
    cartesian,
    categories,
    label_values,
    listed,
    magnitude,
    maybe_target,
    set_categories,
)
from distill.data.synthetic.chart_style import ChartStyle, brightness, legend
from distill.data.synthetic.rendered import between, chance, pick, whole
from distill.data.synthetic.words import Vocabulary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rng = np.random.Generator


def _record(plan: ChartPlan, names: list[str], values: Values, series: list[str] | None = None) -> None:
    plan.data.update({"categories": names, "values": listed(values)})
    if series is not None:
        plan.data["series"] = series


def _head_room(axes: Axes, top: float) -> None:
    axes.set_ylim(0, top * 1.12)


def bar(figure: Figure, rng: Rng, words: Vocabulary, style: ChartStyle, plan: ChartPlan) -> Axes:
    """Draws upright bars of one series."""
    count = whole(rng, 3, 9)
    names, values = categories(rng, words, count), amounts(rng, count)
    axes = cartesian(figure, style)
    many = chance(rng, 0.4)
    colours = [style.colours[i % 7] if many else style.colours[0] for i in range(count)]
    width = between(rng, 0.5, 0.9)
    axes.bar(range(count), values, width, color=colours, edgecolor=style.edge, hatch=style.hatch, alpha=style.alpha)
    set_categories(axes, names, style)
    _head_room(axes, values.max())
    if chance(rng, 0.45):
        label_values(axes, style, np.arange(count, dtype=np.float64), values)
    maybe_target(rng, axes, style, float(values.mean()))
    _record(plan, names, values)
    return axes


def horizontal_bar(figure: Figure, rng: Rng, words: Vocabulary, style: ChartStyle, plan: ChartPlan) -> Axes:
    """Draws lying bars of one series."""
    count = whole(rng, 3, 10)
    names, values = categories(rng, words, count), amounts(rng, count)
    axes = cartesian(figure, style, left=0.26, grid="x" if style.grid else "")
    colours = [style.colours[i % 7] if chance(rng, 0.1) else style.colours[0] for i in range(count)]
    height = between(rng, 0.5, 0.85)
    axes.barh(range(count), values, height, color=colours, edgecolor=style.edge, hatch=style.hatch, alpha=style.alpha)
    axes.set_yticks(range(count), names)
    axes.set_xlim(0, values.max() * 1.16)
    if chance(rng, 0.5):
        axes.invert_yaxis()
    if chance(rng, 0.45):
        label_values(axes, style, np.arange(count, dtype=np.float64), values, sideways=True)
    _record(plan, names, values)
    return axes


def _several(rng: Rng, words: Vocabulary) -> tuple[list[str], list[str], Values]:
    count, parts = whole(rng, 3, 6), whole(rng, 2, 4)
    rows = np.stack([rng.uniform(0.2, 1, count) for _ in range(parts)]) * magnitude(rng) * 2
    series = [words.word().capitalize() for _ in range(parts)]
    return categories(rng, words, count), series, np.round(rows, 2)


def stacked_bar(figure: Figure, rng: Rng, words: Vocabulary, style: ChartStyle, plan: ChartPlan) -> Axes:
    """Draws bars of several series on top of each other, now and then as shares of 100 %."""
    names, series, rows = _several(rng, words)
    if chance(rng, 0.3):
        rows = np.round(100 * rows / rows.sum(0), 1)
    axes, base = cartesian(figure, style), np.zeros(rows.shape[1])
    width = between(rng, 0.5, 0.85)
    for part, row in enumerate(rows):
        axes.bar(range(len(row)), row, width, base, color=style.colours[part], edgecolor=style.edge, label=series[part])
        base = base + row
    set_categories(axes, names, style)
    axes.set_ylim(0, base.max() * 1.24)
    legend(axes, style, len(series), "upper center")
    _record(plan, names, rows, series)
    return axes


def grouped_bar(figure: Figure, rng: Rng, words: Vocabulary, style: ChartStyle, plan: ChartPlan) -> Axes:
    """Draws bars of several series side by side."""
    names, series, rows = _several(rng, words)
    axes = cartesian(figure, style)
    width = 0.82 / len(series)
    at = np.arange(rows.shape[1])
    for part, row in enumerate(rows):
        place = at + (part - (len(series) - 1) / 2) * width
        axes.bar(place, row, width * 0.94, color=style.colours[part], hatch=style.hatch, label=series[part])
    set_categories(axes, names, style)
    axes.set_ylim(0, rows.max() * 1.24)
    legend(axes, style, len(series), "upper center")
    _record(plan, names, rows, series)
    return axes


def lollipop(figure: Figure, rng: Rng, words: Vocabulary, style: ChartStyle, plan: ChartPlan) -> Axes:
    """Draws dots on stems, upright or lying."""
    count = whole(rng, 5, 10)
    names, values = categories(rng, words, count), amounts(rng, count)
    size, place = between(rng, 40, 130), np.arange(count)
    if chance(rng, 0.35):
        axes = cartesian(figure, style, left=0.26)
        axes.hlines(place, 0, values, color=style.colours[1], linewidth=style.line_width)
        axes.scatter(values, place, s=size, color=style.colours[0], zorder=3)
        axes.set_yticks(place, names)
        axes.set_xlim(0, values.max() * 1.1)
    else:
        axes = cartesian(figure, style)
        axes.vlines(place, 0, values, color=style.colours[1], linewidth=style.line_width)
        axes.scatter(place, values, s=size, color=style.colours[0], zorder=3)
        set_categories(axes, names, style)
        _head_room(axes, values.max())
    _record(plan, names, values)
    return axes


def waterfall(figure: Figure, rng: Rng, words: Vocabulary, style: ChartStyle, plan: ChartPlan) -> Axes:
    """Draws a start, rises and falls that hang in the air, and the total."""
    count = whole(rng, 4, 7)
    steps = np.append(rng.uniform(1.0, 2.0), rng.uniform(0.15, 0.7, count) * rng.choice([-1, 1], count, p=[0.45, 0.55]))
    steps = np.round(steps * magnitude(rng), 2)
    ends = np.cumsum(steps)
    names = ["Start", *categories(rng, words, count), "Total"]
    rise, fall, total = pick(rng, (("#2ca02c", "#d62728", "#1f77b4"), style.colours[:3]))
    axes = cartesian(figure, style)
    base = np.append(np.concatenate([[0.0], ends[:-1]]), 0.0)
    height = np.append(steps, ends[-1])
    colours = [total, *(rise if step > 0 else fall for step in steps[1:]), total]
    axes.bar(range(count + 2), height, 0.68, base, color=colours, edgecolor=style.edge)
    for i, end in enumerate(ends):
        axes.plot((i + 0.34, i + 0.66), (end, end), color=style.ink, linewidth=0.8)
    set_categories(axes, names, style)
    low = min(float((base + height).min()), 0.0)
    axes.set_ylim(low * 1.1, max(float(ends.max()), float(steps[0])) * 1.12)
    if low < 0:
        axes.axhline(0, color=style.ink, linewidth=0.8)
    _record(plan, names, height)
    return axes


def _write_shares(axes: Axes, shares: Values, style: ChartStyle, radius: float) -> None:
    """Writes each wedge's percentage in its middle, in black or white, whichever reads better."""
    from matplotlib.patches import Wedge

    font = style.font(0.85)
    for share, wedge, colour in zip(shares, axes.patches, style.colours, strict=False):
        if share < 5 or not isinstance(wedge, Wedge):
            continue
        angle = np.radians((wedge.theta1 + wedge.theta2) / 2)
        x, y = wedge.center[0] + radius * np.cos(angle), wedge.center[1] + radius * np.sin(angle)
        ink = "black" if brightness(colour) > 0.5 else "white"
        axes.text(x, y, f"{share:.0f}%", ha="center", va="center", fontproperties=font, color=ink)


def _round_chart(figure: Figure, rng: Rng, words: Vocabulary, style: ChartStyle, plan: ChartPlan, hole: float) -> Axes:
    count = whole(rng, 3, 7)
    shares = np.round(100 * rng.dirichlet(np.full(count, 3.0)), 1)
    names = categories(rng, words, count)
    outside = chance(rng, 0.5)
    side = 0.6 if outside else 0.72
    axes = figure.add_axes((0.5 - side / 2, 0.47 - side / 2 + (0 if outside else 0.04), side, side))
    explode = [0.0] * count
    if not hole and chance(rng, 0.35):
        explode[whole(rng, 0, count - 1)] = 0.09
    axes.pie(
        shares, explode=explode, labels=names if outside else None, colors=list(style.colours[:count]),
        startangle=between(rng, 0, 360), labeldistance=1.08, counterclock=chance(rng, 0.5), radius=1.0,
        wedgeprops={"width": 1 - hole, "edgecolor": pick(rng, (style.ground, style.ink)), "linewidth": 1.0},
        textprops={"fontproperties": style.font(0.88), "color": style.ink},
    )  # fmt: skip
    if chance(rng, 0.7):
        _write_shares(axes, shares, style, (1 + hole) / 2 if hole else 0.68)
    if not outside:
        axes.legend(
            axes.patches, names, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=min(count, 4),
            prop=style.font(0.82), frameon=False, labelcolor=style.ink, handlelength=1.0, columnspacing=0.9,
        )  # fmt: skip
    if hole and chance(rng, 0.5):
        total = f"{whole(rng, 12, 980)}k"
        axes.text(0, 0, total, ha="center", va="center", fontproperties=style.font(1.6), color=style.ink)
    plan.names_axes = False
    plan.title_pad = 16.0 if outside else 4.0
    _record(plan, names, shares)
    return axes


def pie(figure: Figure, rng: Rng, words: Vocabulary, style: ChartStyle, plan: ChartPlan) -> Axes:
    """Draws a pie, labelled around it or by a legend."""
    return _round_chart(figure, rng, words, style, plan, 0.0)


def donut(figure: Figure, rng: Rng, words: Vocabulary, style: ChartStyle, plan: ChartPlan) -> Axes:
    """Draws a ring, now and then with a total in its middle."""
    return _round_chart(figure, rng, words, style, plan, between(rng, 0.45, 0.7))


def radar(figure: Figure, rng: Rng, words: Vocabulary, style: ChartStyle, plan: ChartPlan) -> Axes:
    """Draws one to three closed profiles over spokes."""
    count, parts = whole(rng, 4, 8), whole(rng, 1, 3)
    names, rows = categories(rng, words, count), np.round(rng.uniform(1.5, 5, (parts, count)), 1)
    axes = figure.add_axes((0.17, 0.14, 0.66, 0.66), projection="polar")
    axes.set_facecolor(style.panel)
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
    series = [words.word().capitalize() for _ in range(parts)]
    for part, row in enumerate(rows):
        ring, loop = np.append(row, row[0]), np.append(angles, angles[0])
        axes.plot(loop, ring, color=style.colours[part], linewidth=style.line_width, label=series[part])
        axes.fill(loop, ring, color=style.colours[part], alpha=0.22)
    axes.set_xticks(angles, names)
    axes.set_yticks((1, 2, 3, 4, 5), ("", "2", "", "4", ""))
    axes.set_ylim(0, 5.2)
    axes.tick_params(colors=style.ink, grid_color="#b0b0b0", grid_linewidth=0.7, pad=3)
    axes.spines["polar"].set_color(style.ink)
    if parts > 1:
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, prop=style.font(0.82), frameon=False,
            labelcolor=style.ink,
        )  # fmt: skip
    plan.names_axes, plan.title_pad = False, 14.0
    _record(plan, names, rows, series)
    return axes


def heatmap(figure: Figure, rng: Rng, words: Vocabulary, style: ChartStyle, plan: ChartPlan) -> Axes:
    """Draws a matrix of coloured cells, often with the numbers written in, and a colour bar."""
    rows, columns = whole(rng, 4, 8), whole(rng, 4, 8)
    values = rng.normal(0, 1, (rows, columns))
    if chance(rng, 0.4):
        columns = rows
        mixed = np.corrcoef(rng.normal(0, 1, (rows, rows + 2)) + rng.normal(0, 1, rows + 2))
        values = mixed
    values = np.round(values, 2)
    axes = figure.add_axes((0.22, 0.2, 0.6, 0.68))
    image = axes.imshow(values, cmap=style.colour_map, aspect="auto")
    across, down = categories(rng, words, columns), categories(rng, words, rows)
    axes.set_xticks(range(columns), across, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(rows), down)
    axes.tick_params(colors=style.ink, length=0)
    span = float(np.ptp(values)) or 1.0
    if rows * columns <= 30 and chance(rng, 0.7):
        font = style.font(0.75)
        for (y, x), value in np.ndenumerate(values):
            dark = image.cmap((value - values.min()) / span)
            ink = "black" if 0.3 * dark[0] + 0.59 * dark[1] + 0.11 * dark[2] > 0.5 else "white"
            axes.text(x, y, f"{value:.1f}", ha="center", va="center", fontproperties=font, color=ink)
    bar_axes = figure.add_axes((0.85, 0.2, 0.035, 0.68))
    bar_axes.imshow(np.linspace(1, 0, 64)[:, None], cmap=style.colour_map, aspect="auto")
    bar_axes.set_xticks(())
    bar_axes.yaxis.tick_right()
    ends = (f"{values.max():.1f}", f"{np.median(values):.1f}", f"{values.min():.1f}")
    bar_axes.set_yticks((0, 32, 63), ends, fontproperties=style.font(0.78), color=style.ink)
    plan.names_axes = False
    _record(plan, across, values, down)
    return axes


DRAW: dict[str, Draw] = {
    "bar": bar,
    "horizontal_bar": horizontal_bar,
    "stacked_bar": stacked_bar,
    "grouped_bar": grouped_bar,
    "lollipop": lollipop,
    "waterfall": waterfall,
    "pie": pie,
    "donut": donut,
    "radar": radar,
    "heatmap": heatmap,
}
