"""Charts of twenty types drawn by matplotlib's Agg backend with random data and looks.

One figure is cleared and drawn again for every chart, without pyplot: creating figures costs more than most charts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from distill.data.synthetic import chart_categories, chart_numbers
from distill.data.synthetic.chart_plan import ChartPlan, Draw
from distill.data.synthetic.chart_style import ChartStyle, draw_style
from distill.data.synthetic.rendered import Rendered, Split, chance
from distill.data.synthetic.words import Vocabulary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg

_INCHES = 4.48
_DRAW: dict[str, Draw] = {**chart_categories.DRAW, **chart_numbers.DRAW}


def kinds(split: Split) -> tuple[str, ...]:
    """Returns the chart types, the same for both splits."""
    return tuple(_DRAW)


@lru_cache(maxsize=1)
def _agg(size_px: int) -> FigureCanvasAgg:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(figsize=(_INCHES, _INCHES), dpi=size_px / _INCHES))


def _headed(axes: Axes, rng: np.random.Generator, words: Vocabulary, style: ChartStyle, plan: ChartPlan) -> None:
    """Adds the title and, on cartesian axes, the axis names."""
    if plan.title:
        axes.set_title(plan.title, fontproperties=style.font(1.18), color=style.ink, pad=plan.title_pad)
    if plan.names_axes and chance(rng, 0.75):
        axes.set_xlabel(words.title(1, 2), fontproperties=style.font(), color=style.ink, labelpad=2)
    if plan.names_axes and chance(rng, 0.75):
        unit = " (%)" if chance(rng, 0.2) else ""
        axes.set_ylabel(words.title(1, 2) + unit, fontproperties=style.font(), color=style.ink, labelpad=2)


def render(kind: str, rng: np.random.Generator, split: Split, size_px: int, variant: int) -> Rendered:
    """Returns one chart with the values behind it.

    Args:
        kind: one of `kinds(split)`.
        rng: the sample's generator.
        split: palettes, fonts and words of the two splits are disjoint.
        size_px: side of the image.
        variant: unused: every sample is its own.
    """
    from matplotlib import rc_context

    canvas = _agg(size_px)
    figure = canvas.figure
    figure.clear()
    style, words = draw_style(rng, split), Vocabulary(rng, split)
    figure.set_facecolor(style.ground)
    plan = ChartPlan(title=words.title(2, 4) if chance(rng, 0.85) else "")
    # cmss10 has no minus sign, only a hyphen.
    with rc_context({"axes.unicode_minus": False}):
        axes = _DRAW[kind](figure, rng, words, style, plan)
        _headed(axes, rng, words, style, plan)
        _apply_fonts(axes, style)
        canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    # A figure side in inches times dpi may round to one pixel off for unusual sizes.
    if image.size != (size_px, size_px):
        image = image.resize((size_px, size_px), Image.Resampling.LANCZOS)
    return Rendered(image, None, {"title": plan.title, "data": plan.data})


def _apply_fonts(axes: Axes, style: ChartStyle) -> None:
    font = style.font(0.9)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_fontproperties(font)
