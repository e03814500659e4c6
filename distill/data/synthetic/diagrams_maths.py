"""Mathematics for the multidisciplinary domain: geometry, function plots, formulas and tables of results."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from distill.data.synthetic.canvas import Canvas, Point, polar
from distill.data.synthetic.diagram_theme import Theme, caption, is_legible, write_formula
from distill.data.synthetic.rendered import between, chance, pick, pick_some, whole
from distill.data.synthetic.words import Vocabulary

Rng = np.random.Generator
_LETTERS = "ABCDEFGHKLMNPQRST"


def _outside(canvas: Canvas, theme: Theme, at: Point, centre: Point, text: str, distance: float = 15) -> None:
    length = math.dist(at, centre) or 1
    x, y = (at[0] + (at[0] - centre[0]) / length * distance, at[1] + (at[1] - centre[1]) / length * distance)
    canvas.text((x, y), text, theme.font, 19, theme.ink, "mm")


def _polygon(canvas: Canvas, rng: Rng, theme: Theme, centre: Point, radius: float) -> dict[str, object]:
    """Draws a labelled polygon with some angles and side lengths."""
    count = pick(rng, (3, 3, 3, 4, 4, 5))
    turn = between(rng, 0, 360)
    gaps = rng.uniform(0.7, 1.3, count)
    angles = turn + 360 * np.cumsum(gaps) / gaps.sum()
    corners = [polar(centre, radius * between(rng, 0.85, 1.0), float(angle)) for angle in angles]
    fill = theme.tint(0, 0.18) if chance(rng, 0.5) else None
    canvas.polygon(corners, fill=fill, outline=theme.ink, width=2.2)
    names = list(_LETTERS[whole(rng, 0, len(_LETTERS) - count) :][:count])
    facts: dict[str, object] = {"vertices": names}
    for i, corner in enumerate(corners):
        before, after = corners[i - 1], corners[(i + 1) % count]
        _outside(canvas, theme, corner, centre, names[i])
        start = math.degrees(math.atan2(before[1] - corner[1], before[0] - corner[0]))
        end = math.degrees(math.atan2(after[1] - corner[1], after[0] - corner[0]))
        if (end - start) % 360 > 180:
            start, end = end, start
        opening = (end - start) % 360
        if chance(rng, 0.6):
            canvas.arc(corner, 26, start, start + opening, theme.accents[1], 2)
            at = polar(corner, 46, start + opening / 2)
            text = pick(rng, (f"{opening:.0f}°", f"{opening:.0f}°", "x", "\u03b1", "\u03b2", "\u03b8"))
            canvas.text(at, text, theme.font, 16, theme.accents[1], "mm")
            facts[f"angle_{names[i]}"] = round(opening, 1)
        if chance(rng, 0.6):
            middle = ((corner[0] + after[0]) / 2, (corner[1] + after[1]) / 2)
            length = f"{math.dist(corner, after) / 20:.1f}{pick(rng, ('', ' cm', ' m'))}"
            _outside(canvas, theme, middle, centre, length, 21)
    if count == 3 and chance(rng, 0.4):
        a, b, c = (np.asarray(corner) for corner in corners)
        foot = b + (c - b) * float(np.dot(a - b, c - b) / np.dot(c - b, c - b))
        canvas.line(((float(a[0]), float(a[1])), (float(foot[0]), float(foot[1]))), theme.accents[2], 2, dash=6)
    return facts


def _circle(canvas: Canvas, rng: Rng, theme: Theme, centre: Point, radius: float) -> dict[str, object]:
    """Draws a circle with radius, chords, perhaps an inscribed angle and a tangent."""
    radius *= 0.86
    fill = theme.tint(1, 0.15) if chance(rng, 0.4) else None
    canvas.circle(centre, radius, fill=fill, outline=theme.ink, width=2.2)
    canvas.circle(centre, 3, fill=theme.ink)
    canvas.text((centre[0] - 11, centre[1] + 12), "O", theme.font, 19, theme.ink)
    angles = np.sort(rng.uniform(0, 360, 3) / 3 + np.asarray((0, 120, 240)))
    points = [polar(centre, radius, float(angle)) for angle in angles]
    for point, name in zip(points, pick_some(rng, _LETTERS, 3), strict=True):
        canvas.circle(point, 3.2, fill=theme.accents[0])
        _outside(canvas, theme, point, centre, name, 14)
    canvas.line((centre, points[0]), theme.accents[1], 2)
    middle = ((centre[0] + points[0][0]) / 2, (centre[1] + points[0][1]) / 2)
    size = whole(rng, 2, 15)
    canvas.text(middle, f"r = {size}", theme.font, 16, theme.accents[1], "mm", halo=theme.ground)
    canvas.line((points[1], points[2]), theme.ink, 2)
    if chance(rng, 0.5):
        canvas.line((points[1], points[0], points[2]), theme.ink, 2)
    if chance(rng, 0.5):
        angle = float(angles[1])
        canvas.line([polar(points[1], 90, angle + 90), polar(points[1], 90, angle - 90)], theme.accents[2], 2)
    return {"radius": size}


def _parallels(canvas: Canvas, rng: Rng, theme: Theme, centre: Point, radius: float) -> dict[str, object]:
    """Draws two parallel lines cut by a transversal, with the angles at the crossings."""
    tilt, slope = between(rng, -12, 12), between(rng, 45, 75)
    reach = 180.0
    crossings = [polar(centre, s * radius * 0.5, slope) for s in (-1, 1)]
    for name, crossing in zip(("m", "n"), crossings, strict=True):
        start, end = polar(crossing, reach, tilt + 180), polar(crossing, reach, tilt)
        canvas.line((start, end), theme.ink, 2.2)
        canvas.text((end[0] - 8, end[1] - 13), name, theme.font, 18, theme.ink)
        canvas.arc(crossing, 28, tilt, slope, theme.accents[1], 2)
    canvas.line((polar(centre, radius, slope + 180), polar(centre, radius, slope)), theme.accents[0], 2.2)
    angle = slope - tilt
    canvas.text(polar(crossings[0], 52, (tilt + slope) / 2), f"{angle:.0f}°", theme.font, 17, theme.accents[1])
    canvas.text(polar(crossings[1], 50, (tilt + slope) / 2), "x", theme.font, 18, theme.accents[1])
    return {"angle": round(angle, 1)}


def _solid(canvas: Canvas, rng: Rng, theme: Theme, centre: Point, radius: float) -> dict[str, object]:
    """Draws a box or a cylinder with hidden edges dashed and its sizes."""
    a, b, depth = between(rng, 0.7, 1.1) * radius, between(rng, 0.5, 0.9) * radius, between(rng, 0.3, 0.5) * radius
    sizes = [whole(rng, 2, 20) for _ in range(3)]
    x0, y1 = centre[0] - (a + depth) / 2, centre[1] + (b + depth * 0.6) / 2
    if chance(rng, 0.35):
        top, low = centre[1] - b * 0.7, centre[1] + b * 0.7
        canvas.polygon(((x0, top), (x0 + a, top), (x0 + a, low), (x0, low)), fill=theme.tint(0, 0.2))
        canvas.circle((x0 + a / 2, low), a / 2, fill=theme.tint(0, 0.2), outline=theme.ink, squash=0.28, width=2)
        canvas.circle((x0 + a / 2, top), a / 2, fill=theme.tint(0, 0.35), outline=theme.ink, squash=0.28, width=2)
        canvas.line(((x0, top), (x0, low)), theme.ink, 2.2)
        canvas.line(((x0 + a, top), (x0 + a, low)), theme.ink, 2.2)
        canvas.line(((x0 + a / 2, top), (x0 + a, top)), theme.accents[1], 2)
        canvas.text((x0 + a * 0.72, top - 10), f"{sizes[0]}", theme.font, 17, theme.accents[1])
        canvas.text((x0 + a + 8, centre[1]), f"h = {sizes[1]}", theme.font, 17, theme.ink, "lm")
        return {"radius": sizes[0], "height": sizes[1]}
    front = [(x0, y1), (x0 + a, y1), (x0 + a, y1 - b), (x0, y1 - b)]
    back = [(x + depth, y - depth * 0.6) for x, y in front]
    canvas.polygon((front[3], front[2], back[2], back[3]), fill=theme.tint(0, 0.35))
    canvas.polygon((front[1], back[1], back[2], front[2]), fill=theme.tint(0, 0.5))
    canvas.polygon(front, fill=theme.tint(0, 0.2), outline=theme.ink, width=2.2)
    for i in (1, 2, 3):
        canvas.line((front[i], back[i]), theme.ink, 2.2)
    canvas.line((back[1], back[2], back[3]), theme.ink, 2.2)
    for end in (front[0], back[1], back[3]):
        canvas.line((back[0], end), theme.ink, 1.4, dash=5)
    canvas.text((x0 + a / 2, y1 + 14), f"{sizes[0]} cm", theme.font, 17, theme.ink)
    canvas.text((x0 - 8, y1 - b / 2), f"{sizes[1]} cm", theme.font, 17, theme.ink, "rm")
    canvas.text((x0 + a + depth / 2 + 8, y1 - depth * 0.3 + 8), f"{sizes[2]} cm", theme.font, 17, theme.ink, "lm")
    return {"sizes": sizes}


def geometry(canvas: Canvas, rng: Rng, words: Vocabulary, theme: Theme) -> dict[str, object]:
    """Draws a plane or solid figure with labelled angles and lengths, perhaps with a question below."""
    top = caption(canvas, rng, words, theme, 0.3)
    ask = chance(rng, 0.5)
    bottom = 400.0 if ask else 430.0
    figure = pick(rng, (_polygon, _polygon, _circle, _parallels, _solid))
    facts = figure(canvas, rng, theme, (224, (top + bottom) / 2), (bottom - top) / 2 - 34)
    if ask:
        texts = ("Find the value of x.", "Find the marked angle.")
        if figure is not _parallels:
            texts = ("Work out the area.", "Calculate the total length.", "Find the missing side.")
        canvas.text((224, 424), f"{whole(rng, 1, 30)}. {pick(rng, texts)}", theme.font, 18, theme.ink)
    return facts


_Array = npt.NDArray[np.float64]


def _function(rng: Rng) -> tuple[str, Callable[[_Array], _Array]]:
    a, b, c = whole(rng, 1, 3), whole(rng, -3, 3), whole(rng, -2, 2)
    sign = f"{b:+d}" if b else ""
    forms: tuple[tuple[str, Callable[[_Array], _Array]], ...] = (
        (f"x^2 {b:+d}x {c:+d}", lambda x: x**2 + b * x + c),
        (rf"{a}\,\sin(x) {c:+d}", lambda x: a * np.sin(x) + c),
        (rf"\cos({a}x){sign}", lambda x: np.cos(a * x) + b),
        (rf"\frac{{1}}{{{a}}}x^3 - 2x", lambda x: x**3 / a - 2 * x),
        (rf"e^{{-x/{a}}}{sign}", lambda x: np.exp(-x / a) + b),
        (rf"\frac{{{a}}}{{x}}", lambda x: a / np.where(np.abs(x) < 1e-3, np.nan, x)),
        (rf"{a}\sqrt{{x+4}}{sign}", lambda x: a * np.sqrt(np.maximum(x + 4, 0)) + b),
        (rf"|x{sign}| {c:+d}", lambda x: np.abs(x + b) + c),
        (rf"\frac{{{a + 2}}}{{1+e^{{-{a}x}}}}", lambda x: (a + 2) / (1 + np.exp(-a * x))),
        (rf"-\frac{{x}}{{{a}}} {c:+d}", lambda x: -x / a + c),
        (rf"{a}e^{{-x^2}}", lambda x: a * np.exp(-(x**2))),
    )
    return pick(rng, forms)


def function_plot(canvas: Canvas, rng: Rng, words: Vocabulary, theme: Theme) -> dict[str, object]:
    """Draws one or two functions in a coordinate system through the origin, with their formulas."""
    reach = pick(rng, (4, 5, 6))
    unit = 190.0 / reach
    origin = (224.0 + whole(rng, -1, 1) * unit, 224.0 + whole(rng, -1, 1) * unit)
    _coordinate_axes(canvas, rng, theme, origin, unit)
    x = np.linspace((14 - origin[0]) / unit, (434 - origin[0]) / unit, 240)
    names: list[str] = []
    for number in range(whole(rng, 1, 2)):
        name, function = _function(rng)
        y = origin[1] - function(x) * unit
        points = [(origin[0] + float(u) * unit, float(v)) for u, v in zip(x, y, strict=True)]
        colour = theme.accents[number]
        if number == 0 and chance(rng, 0.3):
            low, high = sorted(rng.integers(60, 180, 2).tolist())
            part = [p for p in points[low : high + 12] if 0 < p[1] < 448]
            if len(part) > 2:
                canvas.polygon([(part[0][0], origin[1]), *part, (part[-1][0], origin[1])], fill=theme.tint(0, 0.3))
        for start, end in pairwise(points):
            if all(-20 < p[1] < 468 for p in (start, end)) and abs(start[1] - end[1]) < 120:
                canvas.line((start, end), colour, 2.8)
        names.append(f"{pick(rng, ('f(x)', 'y', 'g(x)'))} = {name}")
    for number, name in enumerate(names):
        colour = theme.accents[number]
        ink = colour if is_legible(colour, theme.ground) else theme.ink
        write_formula(canvas, theme, name, (26, 34 + 40 * number), 17, ink, "l", has_patch=True)
    return {"functions": names}


def _coordinate_axes(canvas: Canvas, rng: Rng, theme: Theme, origin: Point, unit: float) -> None:
    grid = chance(rng, 0.6)
    faint = theme.tint(4, 0.3)
    for step in range(-12, 13):
        x, y = origin[0] + step * unit, origin[1] + step * unit
        if grid and theme.pattern != "squares":
            canvas.line(((x, 10), (x, 438)), faint, 0.8)
            canvas.line(((10, y), (438, y)), faint, 0.8)
        if step == 0 or step % 2:
            continue
        if 20 < x < 420:
            canvas.line(((x, origin[1] - 4), (x, origin[1] + 4)), theme.ink, 1.4)
            canvas.text((x, origin[1] + 14), str(step), theme.font, 13, theme.ink)
        if 28 < y < 430:
            canvas.line(((origin[0] - 4, y), (origin[0] + 4, y)), theme.ink, 1.4)
            canvas.text((origin[0] - 8, y), str(-step), theme.font, 13, theme.ink, "rm")
    canvas.arrow((10, origin[1]), (440, origin[1]), theme.ink, 1.8, 11)
    canvas.arrow((origin[0], 438), (origin[0], 8), theme.ink, 1.8, 11)
    canvas.text((430, origin[1] + 16), "x", theme.font, 17, theme.ink)
    canvas.text((origin[0] + 14, 14), "y", theme.font, 17, theme.ink)


def _formulas(rng: Rng) -> list[str]:
    a, b, c, n = pick_some(rng, "abckpquvw", 1)[0], whole(rng, 2, 9), whole(rng, 2, 9), pick(rng, "nmkN")
    x, t = pick(rng, "xyzts"), pick(rng, (r"\theta", r"\phi", r"\omega", r"\alpha", r"\lambda"))
    return [
        rf"{x} = \frac{{-b \pm \sqrt{{b^2 - 4ac}}}}{{2a}}",
        rf"\int_{{0}}^{{{b}}} \frac{{{x}^{c}}}{{1+{x}^2}}\, d{x}",
        rf"\sum_{{i=1}}^{{{n}}} i^{b} = \frac{{{n}({n}+1)}}{{2}}",
        rf"\lim_{{{x} \to \infty}} \left(1 + \frac{{{b}}}{{{x}}}\right)^{{{x}}} = e^{{{b}}}",
        rf"\frac{{\partial u}}{{\partial t}} = {a} \nabla^2 u + {b}u",
        r"\nabla \times E = -\frac{\partial B}{\partial t}",
        rf"\sin^2 {t} + \cos^2 {t} = 1",
        rf"f({x}) = \frac{{1}}{{\sigma\sqrt{{2\pi}}}}\, e^{{-\frac{{({x}-\mu)^2}}{{2\sigma^2}}}}",
        rf"E_{{{n}}} = -\frac{{13.{c}}}{{{n}^2}}\ \mathrm{{eV}}",
        r"P(A|B) = \frac{P(B|A)\,P(A)}{P(B)}",
        rf"\sqrt[{b}]{{{x}^{c} + {b}}} \leq {x} + {c}",
        rf"{b}{x}^2 - {c}{x} + {b + c} = 0",
        rf"\frac{{d}}{{d{x}}}\left[{x}^{b} e^{{{c}{x}}}\right]",
        r"i\hbar \frac{\partial \psi}{\partial t} = \hat{H}\psi",
        r"\Delta G = \Delta H - T\Delta S",
        rf"{b}\,\mathrm{{H}}_2 + \mathrm{{O}}_2 \rightarrow {b}\,\mathrm{{H}}_2\mathrm{{O}}",
        rf"F = G\,\frac{{m_1 m_2}}{{r^{{2}}}} + {a}_{c}",
        rf"\prod_{{j=1}}^{{{b}}} \left({x}_j - {t}\right) \neq 0",
        rf"\forall\, \epsilon > 0\ \exists\, \delta : |{x} - {a}| < \delta",
        rf"\oint_C {t}\, d{x} = {b}\pi i \sum_k r_k",
    ]


def formula(canvas: Canvas, rng: Rng, words: Vocabulary, theme: Theme) -> dict[str, object]:
    """Writes two to five typeset formulas, perhaps numbered or with a sentence between them."""
    top = caption(canvas, rng, words, theme, 0.3)
    chosen = pick_some(rng, _formulas(rng), whole(rng, 2, 5))
    step = (440 - top) / len(chosen)
    size, numbered, talk = between(rng, 24, 32), chance(rng, 0.4), chance(rng, 0.5) and step > 78
    colour = theme.accents[0] if chance(rng, 0.15) else theme.ink
    for row, tex in enumerate(chosen):
        y = top + (row + 0.5) * step
        write_formula(canvas, theme, tex, (212 if numbered else 224, y + (10 if talk else 0)), size, colour)
        if numbered:
            canvas.text((436, y), f"({row + 1})", theme.font, 17, theme.ink, "rm")
        if talk:
            canvas.text((20, y - step / 2 + 8), words.sentence(4, 7), theme.font, 14, theme.ink, "lm")
    return {"formulas": chosen}


def table(canvas: Canvas, rng: Rng, words: Vocabulary, theme: Theme) -> dict[str, object]:
    """Draws a table of results: three rules, a full grid or striped rows, with means and spreads."""
    rows, columns = whole(rng, 5, 10), whole(rng, 3, 5)
    top = caption(canvas, rng, words, theme, 0.85) + 8
    step = min((430 - top) / (rows + 1), 38.0)
    left, first = 20.0, 104.0
    width = (408 - first) / (columns - 1)
    style, spread = pick(rng, ("rules", "grid", "stripes")), chance(rng, 0.4) and columns < 5
    bottom = top + step * (rows + 1)
    if style != "rules":
        canvas.rectangle((left, top, 428, top + step), fill=theme.tint(0, 0.4))
    for row in range(1, rows + 1):
        if style == "stripes" and row % 2 == 0:
            canvas.rectangle((left, top + row * step, 428, top + (row + 1) * step), fill=theme.tint(0, 0.12))
        if style == "grid":
            canvas.line(((left, top + row * step), (428, top + row * step)), theme.ink, 1)
    if style == "grid":
        for x in (left, *(left + first + i * width for i in range(columns))):
            canvas.line(((x, top), (x, bottom)), theme.ink, 1)
    for y, weight in ((top, 2.2), (top + step, 1.2), (bottom, 2.2)):
        canvas.line(((left, y), (428, y)), theme.ink, weight)
    values = np.round(rng.uniform(1, 99, (rows, columns - 1)), 1)
    _write_cells(canvas, rng, words, theme, (left, first, top, step), values, spread)
    return {"values": values.tolist()}


def _write_cells(
    canvas: Canvas,
    rng: Rng,
    words: Vocabulary,
    theme: Theme,
    frame: tuple[float, float, float, float],
    values: _Array,
    spread: bool,
) -> None:
    """Writes row names, column names and values; the best value of a column is bold."""
    left, first, top, step = frame
    rows, columns = values.shape[0], values.shape[1] + 1
    width = (408 - first) / (columns - 1)
    for row in range(rows + 1):
        y = top + (row + 0.5) * step
        name = words.word().capitalize() if row else pick(rng, ("Sample", "Group", "Method", "Region", "Year"))
        canvas.text((left + 6, y), name, theme.font if row else theme.bold, min(15, step * 0.6), theme.ink, "lm")
        for column in range(columns - 1):
            text = f"{values[row - 1, column]:.1f}" if row else words.word().capitalize()[:8]
            if row and spread:
                text += f" ± {rng.random() * 3:.1f}"
            best = row > 0 and values[row - 1, column] == values[:, column].max()
            font = theme.bold if row == 0 or best else theme.font
            size = canvas.fitted(text, font, min(15, step * 0.6), width - 6)
            canvas.text((left + first + (column + 0.5) * width, y), text, font, size, theme.ink, "mm")
