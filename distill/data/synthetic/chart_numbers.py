"""Charts over a numeric axis: lines, areas, points and distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from distill.data.synthetic.chart_plan import (
    ChartPlan,
    Draw,
    Values,
    cartesian,
    categories,
    listed,
    magnitude,
    maybe_target,
    series,
    set_categories,
)
from distill.data.synthetic.chart_style import ChartStyle, legend
from distill.data.synthetic.rendered import between, chance, pick, whole
from distill.data.synthetic.words import Vocabulary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rng = np.random.Generator
_MARKERS = ("", "", "o", "s", "^", "D", "v")
_DASHES = ("-", "--", "-.", ":")


def _abscissa(rng: Rng, count: int) -> Values:
    """Returns increasing x values: years, steps of training, or a plain range."""
    start, step = pick(rng, ((whole(rng, 1950, 2000), 1), (0, 1), (0, 10), (0, 500), (0, 0.1)))
    return np.asarray(np.arange(count) * step + start, np.float64)


def _whole_years(axes: Axes, x: Values) -> None:
    """Keeps halves off an axis of years or counts."""
    if bool((x % 1 == 0).all()):
        axes.locator_params(axis="x", integer=True)


def _record(plan: ChartPlan, x: Values, y: Values, names: list[str] | None = None) -> None:
    plan.data.update({"x": listed(x), "y": listed(y)})
    if names is not None:
        plan.data["series"] = names


def _curves(rng: Rng, axes: Axes, style: ChartStyle, words: Vocabulary, plan: ChartPlan, parts: int) -> None:
    count = whole(rng, 8, 30)
    x, scale = _abscissa(rng, count), magnitude(rng)
    rows = np.stack([series(rng, count) for _ in range(parts)]) * scale
    names = [words.word().capitalize() for _ in range(parts)]
    _whole_years(axes, x)
    marker, dashed = pick(rng, _MARKERS), chance(rng, 0.35)
    for part, row in enumerate(rows):
        axes.plot(
            x, row, color=style.colours[part], linewidth=style.line_width, label=names[part],
            linestyle=_DASHES[part % 4] if dashed else "-", marker=marker if count < 20 else "", markersize=5,
        )  # fmt: skip
        if chance(rng, 0.2):
            spread = np.abs(rng.normal(0.15, 0.03, count)) * scale
            axes.fill_between(x, row - spread, row + spread, color=style.colours[part], alpha=0.2, linewidth=0)
    _record(plan, x, rows, names)
    maybe_target(rng, axes, style, float(np.median(rows)))


def line(figure: Figure, rng: Rng, words: Vocabulary, style: ChartStyle, plan: ChartPlan) -> Axes:
    """Draws one curve."""
    axes = cartesian(figure, style)
    _curves(rng, axes, style, words, plan, 1)
    return axes


def multi_line(figure: Figure, rng: Rng, words: Vocabulary, style: ChartStyle, plan: ChartPlan) -> Axes:
    """Draws two to five curves with a legend."""
    axes = cartesian(figure, style)
    _curves(rng, axes, style, words, plan, whole(rng, 2, 5))
    legend(axes, style, 1, pick(rng, ("upper left", "upper right", "lower right")))
    return axes


def area(figure: Figure, rng: Rng, words: Vocabulary, style: ChartStyle, plan: ChartPlan) -> Axes:
    """Draws one curve filled to zero."""
    axes = cartesian(figure, style)
    count = whole(rng, 10, 40)
    x, y = _abscissa(rng, count), np.abs(series(rng, count)) * magnitude(rng)
    _whole_years(axes, x)
    axes.fill_between(x, y, color=style.colours[0], alpha=between(rng, 0.35, 0.8), linewidth=0)
    if chance(rng, 0.7):
        axes.plot(x, y, color=style.colours[0], linewidth=style.line_width)
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(0, y.max() * 1.12)
    _record(plan, x, y)
    return axes


def stacked_area(figure: Figure, rng: Rng, words: Vocabulary, style: ChartStyle, plan: ChartPlan) -> Axes:
    """Draws three to five areas on top of each other."""
    axes = cartesian(figure, style)
    count, parts = whole(rng, 10, 30), whole(rng, 3, 5)
    x, scale = _abscissa(rng, count), magnitude(rng)
    rows = (np.abs(np.stack([series(rng, count) for _ in range(parts)])) + 0.2) * scale
    names = [words.word().capitalize() for _ in range(parts)]
    _whole_years(axes, x)
    axes.stackplot(x, rows, labels=names, colors=style.colours[:parts], alpha=max(style.alpha, 0.8))
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(0, rows.sum(0).max() * 1.05)
    legend(axes, style, 1, "upper left")
    _record(plan, x, rows, names)
    return axes


def step(figure: Figure, rng: Rng, words: Vocabulary, style: ChartStyle, plan: ChartPlan) -> Axes:
    """Draws one or two staircase curves."""
    axes = cartesian(figure, style)
    count, parts = whole(rng, 7, 16), whole(rng, 1, 2)
    x, scale = _abscissa(rng, count), magnitude(rng)
    rows = np.stack([np.cumsum(rng.choice([-1, 0, 1, 2], count) * between(rng, 0.3, 1)) for _ in range(parts)]) * scale
    names = [words.word().capitalize() for _ in range(parts)]
    _whole_years(axes, x)
    where = pick(rng, ("pre", "post", "mid"))
    for part, row in enumerate(rows):
        axes.step(x, row, where=where, color=style.colours[part], linewidth=style.line_width, label=names[part])
        if parts == 1 and chance(rng, 0.3):
            axes.fill_between(x, row, row.min(), step=where, color=style.colours[part], alpha=0.25)
    if parts > 1:
        legend(axes, style, 1, "upper left")
    _record(plan, x, rows, names)
    return axes


def _cloud(rng: Rng, count: int) -> tuple[Values, Values]:
    x = rng.normal(between(rng, 2, 8), between(rng, 0.6, 2), count)
    slope, spread = pick(rng, (-1.0, -0.4, 0.0, 0.5, 1.2)), between(rng, 0.2, 1.5)
    return x, slope * x + between(rng, 4, 12) + rng.normal(0, spread, count)


def scatter(figure: Figure, rng: Rng, words: Vocabulary, style: ChartStyle, plan: ChartPlan) -> Axes:
    """Draws one to three clouds of points, now and then with a fitted line."""
    axes = cartesian(figure, style)
    groups, marker = whole(rng, 1, 3), pick(rng, ("o", "o", "s", "^", "x", "+"))
    size, scale = between(rng, 12, 45), magnitude(rng)
    names = [words.word().capitalize() for _ in range(groups)]
    points: list[object] = []
    for group in range(groups):
        x, y = _cloud(rng, whole(rng, 15, 80))
        y = y * scale
        axes.scatter(x, y, s=size, c=style.colours[group], marker=marker, alpha=style.alpha, label=names[group])
        if chance(rng, 0.35):
            fit, ends = np.polyfit(x, y, 1), np.asarray((x.min(), x.max()))
            axes.plot(ends, np.polyval(fit, ends), color=style.ink, linestyle="--", linewidth=1.3)
        points.append({"name": names[group], "x": listed(x), "y": listed(y)})
    if groups > 1:
        legend(axes, style, 1, pick(rng, ("upper left", "upper right")))
    plan.data["groups"] = points
    return axes


def bubble(figure: Figure, rng: Rng, words: Vocabulary, style: ChartStyle, plan: ChartPlan) -> Axes:
    """Draws named, coloured discs whose area is a third value."""
    axes = cartesian(figure, style)
    count = whole(rng, 6, 14)
    x, y = rng.uniform(0, 10, count), rng.uniform(0, 10, count) * magnitude(rng)
    sizes = rng.uniform(60, 1500, count)
    colours = [style.colours[int(i)] for i in rng.integers(0, 5, count)]
    axes.scatter(x, y, s=sizes, c=colours, alpha=0.6, edgecolors=pick(rng, ("white", style.ink)), linewidths=1.0)
    axes.margins(0.16)
    if chance(rng, 0.6):
        font = style.font(0.75)
        for i in np.argsort(sizes)[-5:]:
            axes.text(
                float(x[i]),
                float(y[i]),
                words.name()[:7],
                ha="center",
                va="center",
                fontproperties=font,
                color=style.ink,
            )
    plan.data.update({"x": listed(x), "y": listed(y), "size": listed(sizes)})
    return axes


def _sample(rng: Rng, count: int) -> Values:
    shape = whole(rng, 0, 3)
    if shape == 0:
        return rng.normal(between(rng, -2, 8), between(rng, 0.5, 2.5), count)
    if shape == 1:
        return rng.gamma(between(rng, 1.2, 4), 1.5, count)
    if shape == 2:
        return np.concatenate([rng.normal(0, 1, count // 2), rng.normal(4, 0.8, count - count // 2)])
    return rng.uniform(0, 6, count)


def histogram(figure: Figure, rng: Rng, words: Vocabulary, style: ChartStyle, plan: ChartPlan) -> Axes:
    """Draws the distribution of one or two samples in touching bins."""
    axes = cartesian(figure, style)
    bins, parts = whole(rng, 12, 34), 1 + int(chance(rng, 0.3))
    names = [words.word().capitalize() for _ in range(parts)]
    for part in range(parts):
        values = _sample(rng, whole(rng, 150, 900))
        heights, edges = np.histogram(values, bins)
        colour, alpha = style.colours[part], 0.6 if parts > 1 else style.alpha
        axes.stairs(heights, edges, fill=True, color=colour, alpha=alpha, label=names[part])
        axes.vlines(edges[1:-1], 0, np.minimum(heights[1:], heights[:-1]), color=style.panel, linewidth=0.8)
        plan.data[f"counts_{part}"] = listed(heights.astype(np.float64))
        plan.data[f"edges_{part}"] = listed(edges)
        if parts == 1 and chance(rng, 0.3):
            axes.axvline(float(values.mean()), color=style.colours[1], linestyle="--", linewidth=1.5)
    if parts > 1:
        legend(axes, style, 1, "upper right")
    return axes


def _groups(rng: Rng, words: Vocabulary) -> tuple[list[str], list[Values]]:
    count = whole(rng, 3, 6)
    names = categories(rng, words, count)
    return names, [rng.normal(between(rng, 2, 6), between(rng, 0.4, 1.4), 60) for _ in range(count)]


def box(figure: Figure, rng: Rng, words: Vocabulary, style: ChartStyle, plan: ChartPlan) -> Axes:
    """Draws boxes with quartiles, whiskers and outliers."""
    axes = cartesian(figure, style)
    names, samples = _groups(rng, words)
    ink = style.ink
    drawn = axes.boxplot(
        samples, positions=range(len(names)), widths=between(rng, 0.35, 0.7), patch_artist=True,
        notch=chance(rng, 0.25), showmeans=chance(rng, 0.25),
        medianprops={"color": ink, "linewidth": 1.6}, whiskerprops={"color": ink},
        capprops={"color": ink}, flierprops={"marker": "o", "markersize": 4, "markeredgecolor": ink},
    )  # fmt: skip
    many = chance(rng, 0.6)
    for number, patch in enumerate(drawn["boxes"]):
        patch.set(facecolor=style.colours[number if many else 0], edgecolor=ink, alpha=0.85)
    set_categories(axes, names, style)
    plan.data.update({"categories": names, "quartiles": listed(np.percentile(np.stack(samples), (25, 50, 75), 1).T)})
    return axes


def violin(figure: Figure, rng: Rng, words: Vocabulary, style: ChartStyle, plan: ChartPlan) -> Axes:
    """Draws mirrored density shapes with a median bar, computed by a Gaussian kernel on a grid."""
    axes = cartesian(figure, style)
    names, samples = _groups(rng, words)
    many, width = chance(rng, 0.6), between(rng, 0.3, 0.45)
    for number, values in enumerate(samples):
        spread = 1.06 * values.std() * len(values) ** -0.2
        grid = np.linspace(values.min() - 2 * spread, values.max() + 2 * spread, 60)
        density = np.exp(-0.5 * ((grid[:, None] - values[None]) / spread) ** 2).sum(1)
        half = width * density / density.max()
        colour = style.colours[number if many else 0]
        axes.fill_betweenx(grid, number - half, number + half, facecolor=colour, edgecolor=style.ink, alpha=0.75)
        low, middle, high = np.percentile(values, (25, 50, 75))
        axes.plot((number, number), (low, high), color=style.ink, linewidth=4, solid_capstyle="butt")
        axes.plot(number, middle, marker="o", color="white", markersize=4)
    set_categories(axes, names, style)
    plan.data.update({"categories": names, "quartiles": listed(np.percentile(np.stack(samples), (25, 50, 75), 1).T)})
    return axes


DRAW: dict[str, Draw] = {
    "line": line,
    "multi_line": multi_line,
    "area": area,
    "stacked_area": stacked_area,
    "step": step,
    "scatter": scatter,
    "bubble": bubble,
    "histogram": histogram,
    "box": box,
    "violin": violin,
}
