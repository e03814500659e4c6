"""The skeleton of a chart: its axes, categories and values, before any mark is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from distill.data.synthetic.chart_style import ChartStyle, dress
from distill.data.synthetic.rendered import between, chance, pick, whole
from distill.data.synthetic.words import Vocabulary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = npt.NDArray[np.float64]

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


@dataclass
class ChartPlan:
    """What one chart decides while it is drawn.

    Args:
        title: heading, or "" for none.
        title_pad: distance of the heading from the axes in points.
        names_axes: whether axis names make sense.
        data: the values behind the chart, JSON-serialisable.
    """

    title: str
    title_pad: float = 6.0
    names_axes: bool = True
    data: dict[str, object] = field(default_factory=lambda: {})


Draw = Callable[["Figure", np.random.Generator, Vocabulary, ChartStyle, ChartPlan], "Axes"]


def cartesian(
    figure: Figure, style: ChartStyle, left: float = 0.16, bottom: float = 0.135, grid: str | None = None
) -> Axes:
    """Adds axes whose left and lower margins (parts of the figure) hold the tick labels and axis names."""
    axes = figure.add_axes((left, bottom, 0.955 - left, 0.895 - bottom))
    dress(axes, style, grid)
    axes.locator_params(nbins=5)
    return axes


def categories(rng: np.random.Generator, words: Vocabulary, count: int) -> list[str]:
    """Returns `count` different category names: months, days, years, quarters or words."""
    style = whole(rng, 0, 6)
    if style == 0 and count <= 12:
        start = whole(rng, 0, 12 - count)
        return list(_MONTHS[start : start + count])
    if style == 1 and count <= 7:
        return list(_DAYS[:count])
    if style == 2:
        start = whole(rng, 1985, 2024 - count)
        return [str(start + i) for i in range(count)]
    if style == 3 and count <= 8:
        return [f"Q{i % 4 + 1} '{20 + i // 4}" for i in range(count)]
    names: list[str] = []
    while len(names) < count:
        name = (words.name() if style == 4 else words.word().capitalize())[:10]
        if name not in names:
            names.append(name)
    return names


def set_categories(axes: Axes, names: list[str], style: ChartStyle) -> None:
    """Labels the x axis with names at 0, 1, 2, ...; slanted and with more room below where they would touch."""
    crowded = sum(len(name) + 1.5 for name in names) * style.font_size * 0.056 > 30 * 0.145
    if not crowded:
        axes.set_xticks(range(len(names)), names)
        return
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    box = axes.get_position()
    drop = 0.004 * style.font_size * max(len(name) for name in names) * 0.35
    axes.set_position((box.x0, box.y0 + drop, box.width, box.height - drop))


def magnitude(rng: np.random.Generator) -> float:
    """Returns the scale of a chart's values: 1, 10, 100, 1000 or 10000."""
    return pick(rng, (1.0, 10.0, 100.0, 100.0, 1000.0, 10000.0))


def amounts(rng: np.random.Generator, count: int) -> Values:
    """Returns positive values of mixed shape: even, trending or with one clear winner, `[count]`."""
    shape = whole(rng, 0, 3)
    values = rng.uniform(0.25, 1.0, count)
    if shape == 1:
        values = np.linspace(0.3, 1, count) * rng.uniform(0.8, 1.2, count)
    elif shape == 2:
        values = np.sort(values)[::-1]
    elif shape == 3:
        values[whole(rng, 0, count - 1)] = between(rng, 1.2, 1.8)
    return np.round(values * magnitude(rng) * between(rng, 1, 5), 2)


def series(rng: np.random.Generator, count: int) -> Values:
    """Returns a curve of `count` points: a random walk, a growth, a wave or a decay, all with noise."""
    at = np.linspace(0, 1, count)
    shape = whole(rng, 0, 4)
    if shape == 0:
        curve = 2 + np.cumsum(rng.normal(0, 0.35, count))
    elif shape == 1:
        curve = np.exp(between(rng, 0.8, 2.2) * at)
    elif shape == 2:
        curve = 2.5 + np.sin(2 * np.pi * (at * between(rng, 0.8, 3) + rng.random()))
    elif shape == 3:
        curve = 4 * np.exp(-between(rng, 1, 5) * at) + 0.4
    else:
        curve = 1 + between(rng, 1, 4) / (1 + np.exp(-between(rng, 6, 14) * (at - between(rng, 0.3, 0.7))))
    return curve + rng.normal(0, between(rng, 0.01, 0.15), count)


def listed(values: Values) -> list[object]:
    """Returns the values as nested lists of numbers with five significant digits."""
    return [listed(row) for row in values] if values.ndim > 1 else [float(f"{v:.5g}") for v in values]


def label_values(axes: Axes, style: ChartStyle, at: Values, heights: Values, sideways: bool = False) -> None:
    """Writes each value at the end of its bar."""
    font = style.font(0.78)
    digits = 0 if np.abs(heights).max() >= 100 else 1
    for place, height in zip(at, heights, strict=True):
        text = f"{height:.{digits}f}"
        below = height < 0
        if sideways:
            axes.annotate(
                text, (height, place), (3, 0), textcoords="offset points", va="center", fontproperties=font,
                color=style.ink, annotation_clip=False,
            )  # fmt: skip
        else:
            axes.annotate(
                text, (place, height), (0, -2 if below else 2), textcoords="offset points", ha="center",
                va="top" if below else "bottom", fontproperties=font, color=style.ink,
            )  # fmt: skip


def maybe_target(rng: np.random.Generator, axes: Axes, style: ChartStyle, level: float) -> None:
    """Now and then adds a dashed reference line."""
    if chance(rng, 0.15):
        axes.axhline(level, color=style.colours[-1], linestyle="--", linewidth=1.2)
