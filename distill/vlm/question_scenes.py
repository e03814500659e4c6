"""What the generated questions show: scenes described by a few whole numbers, and how each is drawn.

A scene is drawn from its description alone, in units of which an image is 448 wide. Which split an image belongs to is
a function of its pixels: train and held-out sets of one image size have no image in common, whatever their seeds. (Two
descriptions can give equal pixels, so the description would not do.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from distill.data.synthetic.canvas import DESIGN_UNITS, Canvas, polar
from distill.data.synthetic.rendered import Split, pick, whole
from distill.data.synthetic.textures import Colour

Scene = dict[str, Any]
"""A scene's description. The key `answer` is what is asked for."""

WORDS = ("sun", "map", "tree", "box", "fish", "lamp", "key", "road")
CHART_TYPES = ("bar", "line", "pie", "scatter")
CHART_VALUES = ("20", "40", "60", "80", "100")
COUNTS = ("1", "2", "3", "4", "5")

HELD_OUT_SHARE = 0.25

_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif-Bold")
_PAPERS: tuple[Colour, ...] = ((255, 255, 255), (247, 247, 240), (232, 238, 246), (253, 246, 227))
_INKS: tuple[Colour, ...] = ((20, 20, 20), (16, 60, 140), (150, 20, 30), (10, 95, 55), (90, 30, 120), (140, 80, 10))
_AXIS: Colour = (60, 60, 60)
_GRID: Colour = (205, 205, 205)
_LEFT, _TOP, _RIGHT, _BOTTOM = 70, 60, 400, 380
_MAX_TRIES = 1000


def split_of(image: Image.Image) -> Split:
    """Return the one split that an image belongs to."""
    digest = hashlib.sha256(image.tobytes()).digest()
    return "heldout" if int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32 else "train"


def draw_image(kind: str, answer: str, split: Split, size_px: int, rng: np.random.Generator) -> Image.Image:
    """Return an image of a kind with a given answer that belongs to a split.

    Args:
        kind: one of `MAKERS`.
        answer: what is to be seen.
        split: "train" or "heldout".
        size_px: side of the image.
        rng: draws everything else.
    """
    for _ in range(_MAX_TRIES):
        scene = {"kind": kind, "answer": answer, **_colours(rng), **MAKERS[kind](answer, rng)}
        image = draw_scene(scene, size_px)
        if split_of(image) == split:
            return image
    raise AssertionError("a quarter of all images is held out, so a thousand in a row cannot all miss")


def draw_scene(scene: Scene, size_px: int) -> Image.Image:
    """Return a scene as an RGB image.

    Args:
        scene: what to draw, see `MAKERS`.
        size_px: side of the image.
    """
    canvas = Canvas(DESIGN_UNITS, DESIGN_UNITS, 2 * size_px / DESIGN_UNITS, _PAPERS[scene["paper"]])
    _DRAW[scene["kind"]](canvas, scene, _INKS[scene["ink"]])
    return canvas.finish(size_px)


def _colours(rng: np.random.Generator) -> Scene:
    return {"paper": whole(rng, 0, len(_PAPERS) - 1), "ink": whole(rng, 0, len(_INKS) - 1)}


def _word(answer: str, rng: np.random.Generator) -> Scene:
    return {
        "font": pick(rng, _FONTS),
        "size": whole(rng, 120, 160),
        "x": whole(rng, 190, 258),
        "y": whole(rng, 150, 298),
    }


def _draw_word(canvas: Canvas, scene: Scene, ink: Colour) -> None:
    canvas.text((scene["x"], scene["y"]), scene["answer"], scene["font"], scene["size"], ink)


def _levels(answer: str, rng: np.random.Generator) -> Scene:
    return {"levels": [whole(rng, 15, 100) for _ in range(4)], "grid": whole(rng, 0, 1), "width": whole(rng, 8, 16)}


def _draw_chart(canvas: Canvas, scene: Scene, ink: Colour) -> None:
    if scene["answer"] == "pie":
        _draw_pie(canvas, scene, ink)
        return
    _draw_axes(canvas, has_grid=bool(scene["grid"]))
    step = (_RIGHT - _LEFT) / 4
    tops = [(_LEFT + (i + 0.5) * step, _height(level)) for i, level in enumerate(scene["levels"])]
    if scene["answer"] == "line":
        canvas.line(tops, ink, scene["width"])
        return
    for x, y in tops:
        if scene["answer"] == "bar":
            canvas.rectangle((x - 2 * scene["width"], y, x + 2 * scene["width"], _BOTTOM), ink)
        else:
            canvas.circle((x, y), 1.6 * scene["width"], ink)


def _draw_pie(canvas: Canvas, scene: Scene, ink: Colour) -> None:
    centre, radius, start = (224.0, 224.0), 120 + 3 * scene["width"], -90.0
    for number, level in enumerate(scene["levels"]):
        stop = start + 360 * level / sum(scene["levels"])
        rim = [polar(centre, radius, angle) for angle in np.linspace(start, stop, 40).tolist()]
        part = 0.2 * number
        red, green, blue = (round(value + (255 - value) * part) for value in ink)
        canvas.polygon([centre, *rim], (red, green, blue), (255, 255, 255))
        start = stop


def _draw_axes(canvas: Canvas, *, has_grid: bool) -> None:
    if has_grid:
        for level in (20, 40, 60, 80, 100):
            canvas.line(((_LEFT, _height(level)), (_RIGHT, _height(level))), _GRID, 3)
    canvas.line(((_LEFT, _TOP - 20), (_LEFT, _BOTTOM), (_RIGHT, _BOTTOM)), _AXIS, 5)


def _height(level: float) -> float:
    """Return where a value from 0 to 100 lies on the axis."""
    return _BOTTOM - level / 100 * (_BOTTOM - _TOP)


def _value(answer: str, rng: np.random.Generator) -> Scene:
    """Three bars of which the tallest has the value; the others are clearly lower, but not at 0."""
    lower = [whole(rng, 4, int(answer) - 10) for _ in range(2)]
    return {"lower": lower, "place": whole(rng, 0, 2), "width": whole(rng, 26, 44)}


def _draw_value(canvas: Canvas, scene: Scene, ink: Colour) -> None:
    _draw_axes(canvas, has_grid=True)
    for level in (20, 40, 60, 80, 100):
        canvas.text((_LEFT - 8, _height(level)), str(level), _FONTS[0], 26, _AXIS, anchor="rm")
    levels = list(scene["lower"])
    levels.insert(scene["place"], int(scene["answer"]))
    for number, level in enumerate(levels):
        x = _LEFT + (number + 0.5) * (_RIGHT - _LEFT) / 3
        canvas.rectangle((x - scene["width"], _height(level), x + scene["width"], _BOTTOM), ink)


def _count(answer: str, rng: np.random.Generator) -> Scene:
    """Discs in cells of a grid of 3 x 3, so that none touches another."""
    cells = sorted(int(cell) for cell in rng.permutation(9)[: int(answer)])
    moves = [[whole(rng, -18, 18), whole(rng, -18, 18)] for _ in cells]
    return {"cells": cells, "moves": moves, "radius": whole(rng, 34, 48)}


def _draw_count(canvas: Canvas, scene: Scene, ink: Colour) -> None:
    for cell, (across, down) in zip(scene["cells"], scene["moves"], strict=True):
        canvas.circle((84 + 140 * (cell % 3) + across, 84 + 140 * (cell // 3) + down), scene["radius"], ink)


MAKERS: dict[str, Callable[[str, np.random.Generator], Scene]] = {
    "word": _word,
    "chart_type": _levels,
    "chart_value": _value,
    "count": _count,
}
"""What each kind of scene has beside its answer and colours."""

_DRAW: dict[str, Callable[[Canvas, Scene, Colour], None]] = {
    "word": _draw_word,
    "chart_type": _draw_chart,
    "chart_value": _draw_value,
    "count": _draw_count,
}
