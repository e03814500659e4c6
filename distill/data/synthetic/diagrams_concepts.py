"""Maps, timelines, flow charts, trees and sheet music for the multidisciplinary domain."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from distill.data.synthetic.canvas import Canvas, Point, polar, wrapped
from distill.data.synthetic.diagram_theme import Theme, blend, caption
from distill.data.synthetic.rendered import between, chance, pick, whole
from distill.data.synthetic.textures import Colour, noise
from distill.data.synthetic.words import Vocabulary

Rng = np.random.Generator
_GRID = 256
_RELIEFS: tuple[tuple[Colour, Colour], ...] = (
    ((120, 180, 110), (190, 140, 90)),
    ((60, 110, 170), (235, 240, 245)),
    ((235, 235, 225), (235, 235, 225)),
)


def _political(rng: Rng, theme: Theme) -> tuple[np.ndarray, list[Point]]:
    """Returns the colours `[_GRID, _GRID, 3]` of warped Voronoi countries in a sea, and their seats."""
    count = whole(rng, 6, 11)
    seats = rng.uniform(0.12, 0.88, (count, 2))
    line = np.linspace(0, 1, _GRID, dtype=np.float32)
    x = line[None, :] + 0.05 * noise(rng, _GRID, (6, 17))
    y = line[:, None] + 0.05 * noise(rng, _GRID, (6, 17))
    distance = np.stack([(x - sx) ** 2 + (y - sy) ** 2 for sx, sy in seats])
    owner = distance.argmin(0)
    coast = noise(rng, _GRID, (3, 7, 19)) + between(rng, 0.9, 1.4)
    sea = coast - 2.2 * ((x - 0.5) ** 2 + (y - 0.5) ** 2) * 2 < 0
    paint = np.asarray([theme.tint(i, 0.25 + 0.12 * (i // 5)) for i in range(count)], np.uint8)
    image = paint[owner]
    border = np.zeros((_GRID, _GRID), bool)
    border[1:] |= owner[1:] != owner[:-1]
    border[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    image[border] = theme.ink
    image[sea] = blend(theme.ground, (80, 150, 215), 0.45)
    shore = np.zeros_like(border)
    shore[1:] |= sea[1:] != sea[:-1]
    shore[:, 1:] |= sea[:, 1:] != sea[:, :-1]
    image[shore] = theme.ink
    pixel = (seats * (_GRID - 1)).astype(np.int64)
    dry = ~sea[pixel[:, 1], pixel[:, 0]]
    return image, [(float(sx) * 448, float(sy) * 448) for (sx, sy), land in zip(seats, dry, strict=True) if land]


def _relief(rng: Rng, theme: Theme) -> tuple[np.ndarray, list[Point]]:
    """Returns the colours `[_GRID, _GRID, 3]` of a height map with contour lines, and its summits."""
    height = noise(rng, _GRID, (4, 8))
    levels = np.floor((height - height.min()) / (np.ptp(height) + 1e-6) * whole(rng, 7, 12)).astype(np.int64)
    low, high = pick(rng, _RELIEFS)
    shades = np.asarray([blend(theme.ground, blend(low, high, i / 12), 0.6) for i in range(14)], np.uint8)
    image = shades[levels]
    contour = np.zeros((_GRID, _GRID), bool)
    contour[1:] |= levels[1:] != levels[:-1]
    contour[:, 1:] |= levels[:, 1:] != levels[:, :-1]
    image[contour] = blend(theme.ground, theme.ink, 0.6)
    spots: list[Point] = []
    for _ in range(whole(rng, 3, 6)):
        x, y = between(rng, 40, 408), between(rng, 40, 400)
        if all(math.dist((x, y), other) > 70 for other in spots):
            spots.append((x, y))
    return image, spots


def atlas(canvas: Canvas, rng: Rng, words: Vocabulary, theme: Theme) -> dict[str, object]:
    """Draws a political or a relief map with names, a route, a compass and a scale."""
    is_political = chance(rng, 0.6)
    pixels, places = (_political if is_political else _relief)(rng, theme)
    canvas.image.paste(Image.fromarray(pixels).resize(canvas.image.size, Image.Resampling.BICUBIC))
    if len(places) > 2 and chance(rng, 0.5):
        canvas.line(places[:3], theme.accents[1], 2.6, dash=7)
    names: list[str] = []
    for number, place in enumerate(places):
        # Names that would lie on top of each other are left out.
        if any(abs(place[0] - x) < 96 and abs(place[1] - y) < 20 for x, y in places[:number]):
            continue
        name = words.name() if is_political else f"{words.name()} {whole(rng, 180, 4200)} m"
        marker = chance(rng, 0.7)
        if marker:
            canvas.circle(place, 4, fill=theme.accents[1], outline=theme.ink, width=1.4)
        label = (place[0], place[1] - (13 if marker else 0))
        canvas.text(label, name, theme.bold if is_political else theme.font, 14, theme.ink, halo=theme.ground)
        names.append(name)
    x, y = pick(rng, ((404.0, 56.0), (44.0, 56.0), (404.0, 380.0)))
    canvas.circle((x, y), 24, fill=theme.ground, outline=theme.ink)
    canvas.polygon(((x, y - 19), (x + 6, y), (x, y + 19), (x - 6, y)), fill=theme.accents[1])
    canvas.text((x, y - 34), "N", theme.bold, 17, theme.ink, halo=theme.ground)
    length = pick(rng, (60, 80, 100))
    canvas.rectangle((14, 414, length + 34, 442), fill=theme.ground, outline=theme.ink, width=1.2)
    canvas.rectangle((24, 434, 24 + length / 2, 438), fill=theme.ink)
    canvas.rectangle((24 + length / 2, 434, 24 + length, 438), outline=theme.ink, width=1.2)
    distance = pick(rng, ("50 km", "100 km", "500 m", "20 mi", "250 km"))
    canvas.text((24 + length / 2, 424), distance, theme.font, 13, theme.ink)
    return {"places": names}


def _event_box(
    canvas: Canvas, theme: Theme, at: Point, half: float, texts: tuple[str, str], number: int, is_filled: bool
) -> None:
    year, text = texts
    lines = wrapped(canvas, text, theme.font, 12.5, 2 * half - 8)[:2]
    height = 18 + 15 * len(lines)
    box = (at[0] - half, at[1] - height / 2 - 4, at[0] + half, at[1] + height / 2 + 4)
    colour = theme.accents[number % 5]
    canvas.rectangle(box, fill=theme.tint(number, 0.2) if is_filled else theme.ground, outline=colour, radius=5)
    canvas.text((at[0], box[1] + 11), year, theme.bold, 14.5, theme.ink)
    for row, line in enumerate(lines):
        size = canvas.fitted(line, theme.font, 12.5, 2 * half - 6)
        canvas.text((at[0], box[1] + 27 + 15 * row), line, theme.font, size, theme.ink)


def timeline(canvas: Canvas, rng: Rng, words: Vocabulary, theme: Theme) -> dict[str, object]:
    """Draws dated events along a horizontal or a vertical axis."""
    top = caption(canvas, rng, words, theme, 0.75)
    count, is_filled = whole(rng, 4, 6), chance(rng, 0.6)
    years = np.sort(rng.choice(np.arange(1700, 2030), count, replace=False)).tolist()
    events = [words.words(whole(rng, 2, 3)).capitalize() for _ in years]
    middle = (top + 440) / 2
    if chance(rng, 0.55):
        canvas.arrow((14, middle), (436, middle), theme.ink, 3.4, 15)
        for i, texts in enumerate(zip(map(str, years), events, strict=True)):
            x = 56 + i * 330 / (count - 1)
            y = middle + (-1 if i % 2 else 1) * (60 + 44 * (i // 2 % 2))
            canvas.line(((x, middle), (x, y)), theme.accents[i % 5], 1.8)
            canvas.circle((x, middle), 7, fill=theme.accents[i % 5], outline=theme.ink)
            _event_box(canvas, theme, (x, y), 50, texts, i, is_filled)
        return {"years": years, "events": events}
    x = pick(rng, (224.0, 224.0, 90.0))
    canvas.line(((x, top), (x, 438)), theme.ink, 3.4)
    for i, texts in enumerate(zip(map(str, years), events, strict=True)):
        y = top + 30 + i * (380 - top) / (count - 1)
        side = -1 if x > 200 and i % 2 else 1
        centre = (x + side * (112 if x > 200 else 170), y)
        canvas.line(((x, y), centre), theme.accents[i % 5], 1.8)
        canvas.circle((x, y), 7, fill=theme.accents[i % 5], outline=theme.ink)
        _event_box(canvas, theme, centre, 88 if x > 200 else 130, texts, i, is_filled)
    return {"years": years, "events": events}


def _node(canvas: Canvas, theme: Theme, at: Point, half: Point, text: str, shape: str, number: int) -> None:
    (x, y), (w, h) = at, half
    fill, outline = theme.tint(number, 0.3), theme.ink
    room = 2 * w - 12
    if shape == "diamond":
        canvas.polygon(((x - w, y), (x, y - h), (x + w, y), (x, y + h)), fill=fill, outline=outline, width=2)
        room = 1.2 * w
    elif shape == "slanted":
        canvas.polygon(
            ((x - w + 10, y - h), (x + w, y - h), (x + w - 10, y + h), (x - w, y + h)), fill, outline, width=2
        )
    elif shape == "ellipse":
        canvas.circle(at, w, fill=fill, outline=outline, squash=h / w, width=2)
        room = 1.6 * w
    else:
        canvas.rectangle((x - w, y - h, x + w, y + h), fill, outline, 2, radius=h if shape == "pill" else 3)
    canvas.text(at, text, theme.font, canvas.fitted(text, theme.font, 15, room), theme.ink)


def flow_chart(canvas: Canvas, rng: Rng, words: Vocabulary, theme: Theme) -> dict[str, object]:
    """Draws steps and decisions joined by arrows, with a side branch for each decision."""
    top = caption(canvas, rng, words, theme, 0.35)
    count = whole(rng, 4, 6)
    step = (436 - top) / count
    half_h, x = step * 0.3, pick(rng, (150.0, 170.0, 290.0))
    side = 1 if x < 224 else -1
    texts = [pick(rng, ("Start", "Begin", "Input"))]
    texts += [words.words(2).capitalize() for _ in range(count - 2)] + [pick(rng, ("End", "Stop", "Output"))]
    for i, text in enumerate(texts):
        y = top + (i + 0.5) * step
        inner = 0 < i < count - 1
        is_decision = inner and chance(rng, 0.45)
        shape = "diamond" if is_decision else pick(rng, ("box", "box", "slanted")) if inner else "pill"
        half = (92.0, half_h * 1.22) if is_decision else (80.0, half_h)
        if i:
            previous = y - step + half_h * 1.22
            canvas.arrow((x, previous - 3), (x, y - half[1]), theme.ink, 2)
        if is_decision:
            branch = (x + side * 178, y)
            canvas.arrow((x + side * 90, y), (branch[0] - side * 62, y), theme.ink, 2)
            canvas.text((x + side * 102, y - 11), "no", theme.font, 14, theme.ink)
            canvas.text((x + 18, y + half[1] + 5), "yes", theme.font, 14, theme.ink)
            _node(canvas, theme, branch, (60, half_h), words.word().capitalize(), "box", 3)
            text += "?"
        _node(canvas, theme, (x, y), half, text, shape, 1 if is_decision else 0 if inner else 2)
    return {"steps": texts}


def tree(canvas: Canvas, rng: Rng, words: Vocabulary, theme: Theme) -> dict[str, object]:
    """Draws a tree of three or four levels: an organisation chart, a taxonomy or a search tree."""
    top = caption(canvas, rng, words, theme, 0.4)
    numeric = chance(rng, 0.35)
    levels: list[list[int]] = [[-1]]
    while len(levels) < 3 + int(numeric):
        parents = range(len(levels[-1]))
        children = [p for p in parents for _ in range(whole(rng, 1, 2) if len(levels) > 1 else whole(rng, 2, 3))]
        levels.append(children[: 8 if numeric else 5])
    step = (440 - top) / len(levels)
    shape, is_angular = pick(rng, ("box", "pill", "ellipse")), chance(rng, 0.5)
    above: list[Point] = []
    shown: list[str] = []
    for depth, parents in enumerate(levels):
        width = 436 / len(parents)
        places = [(6 + (i + 0.5) * width, top + (depth + 0.5) * step) for i in range(len(parents))]
        half = (17.0, 17.0) if numeric else (min(width / 2 - 4, 72), 17.0)
        for place, parent in zip(places, parents, strict=True):
            if parent >= 0:
                start, end = (above[parent][0], above[parent][1] + 17), (place[0], place[1] - 17)
                bend = [(start[0], (start[1] + end[1]) / 2), (end[0], (start[1] + end[1]) / 2)] if is_angular else []
                canvas.line([start, *bend, end], theme.ink, 2)
            name = words.name() if chance(rng, 0.5) else words.word().capitalize()
            text = str(whole(rng, 1, 99)) if numeric else name
            _node(canvas, theme, place, half, text, "ellipse" if numeric else shape, depth)
            shown.append(text)
        above = places
    return {"nodes": shown, "parents": levels}


def _clef(canvas: Canvas, at: Point, gap: float, ink: Colour) -> None:
    """Draws a treble clef as one stroke: a spiral around the second line, a loop above and a tail."""
    x, y = at
    spiral = [polar((x, y), gap * (0.25 + 0.95 * t), -90 + 460 * t) for t in np.linspace(0, 1, 30).tolist()]
    tall = [(x - gap * 0.6, y - gap * 2.2), (x + gap * 0.7, y - gap * 3.6), (x + gap * 0.5, y - gap * 4.6)]
    tail = [(x, y - gap * 3.6), (x + gap * 0.25, y + gap * 1.9), (x - gap * 0.3, y + gap * 2.5)]
    canvas.line([*spiral, *tall, *tail], ink, 2.2)
    canvas.circle((x - gap * 0.5, y + gap * 2.3), gap * 0.35, fill=ink)


def music(canvas: Canvas, rng: Rng, words: Vocabulary, theme: Theme) -> dict[str, object]:
    """Draws staves with clef, metre, bars and notes of several lengths."""
    top = caption(canvas, rng, words, theme, 0.7) + 34
    staves, gap = whole(rng, 2, 4), between(rng, 8, 10)
    pitches: list[int] = []
    for number in range(staves):
        base = top + number * (410 - top) / staves + 4 * gap
        for row in range(5):
            canvas.line(((16, base - row * gap), (432, base - row * gap)), theme.ink, 1.3)
        _clef(canvas, (34, base - gap), gap, theme.ink)
        if number == 0:
            for value, y in ((pick(rng, "2346"), base - 3 * gap), (pick(rng, "48"), base - gap)):
                canvas.text((62, y), value, theme.bold, gap * 2.4, theme.ink)
        bars = whole(rng, 2, 4)
        for bar in range(bars + 1):
            x = 82 + bar * 350 / bars
            canvas.line(((x, base), (x, base - 4 * gap)), theme.ink, 2 if bar else 0.5)
        notes = bars * whole(rng, 2, 4)
        for note in range(notes):
            pitch = whole(rng, -1, 9)
            _note(canvas, rng, theme, (96 + note * 338 / notes, base - pitch * gap / 2), gap, pitch)
            pitches.append(pitch)
    return {"staves": staves, "pitches": pitches}


def _note(canvas: Canvas, rng: Rng, theme: Theme, at: Point, gap: float, pitch: int) -> None:
    x, y = at
    length = pick(rng, ("whole", "half", "quarter", "quarter", "eighth", "eighth"))
    is_open = length in ("whole", "half")
    canvas.circle(at, gap * 0.68, None if is_open else theme.ink, theme.ink, 1.8, squash=0.72)
    if pitch <= -1:
        canvas.line(((x - gap, y), (x + gap, y)), theme.ink, 1.3)
    if length == "whole":
        return
    up = -1 if pitch < 4 else 1
    stem_x = x - up * gap * 0.62
    end = y + up * gap * 3.2
    canvas.line(((stem_x, y), (stem_x, end)), theme.ink, 1.8)
    if length == "eighth":
        flag = ((stem_x, end), (stem_x + gap * 0.9, end - up * gap), (stem_x + gap, end - up * gap * 1.8))
        canvas.line(flag, theme.ink, 2.2)
