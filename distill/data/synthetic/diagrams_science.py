"""Physics and chemistry for the multidisciplinary domain: circuits, free-body diagrams and periodic-table cells."""

from __future__ import annotations

import math

import numpy as np

from distill.data.synthetic.canvas import Canvas, Point, polar
from distill.data.synthetic.diagram_theme import Theme, caption
from distill.data.synthetic.rendered import between, chance, pick, whole
from distill.data.synthetic.words import Vocabulary

Rng = np.random.Generator
# Atomic number, symbol, name, standard atomic weight (IUPAC, abridged) and family.
_ELEMENTS: tuple[tuple[int, str, str, str, int], ...] = (
    (1, "H", "Hydrogen", "1.008", 0), (2, "He", "Helium", "4.003", 4), (3, "Li", "Lithium", "6.94", 1),
    (4, "Be", "Beryllium", "9.012", 1), (5, "B", "Boron", "10.81", 3), (6, "C", "Carbon", "12.011", 0),
    (7, "N", "Nitrogen", "14.007", 0), (8, "O", "Oxygen", "15.999", 0), (9, "F", "Fluorine", "18.998", 0),
    (10, "Ne", "Neon", "20.180", 4), (11, "Na", "Sodium", "22.990", 1), (12, "Mg", "Magnesium", "24.305", 1),
    (13, "Al", "Aluminium", "26.982", 2), (14, "Si", "Silicon", "28.085", 3), (15, "P", "Phosphorus", "30.974", 0),
    (16, "S", "Sulfur", "32.06", 0), (17, "Cl", "Chlorine", "35.45", 0), (18, "Ar", "Argon", "39.95", 4),
    (19, "K", "Potassium", "39.098", 1), (20, "Ca", "Calcium", "40.078", 1), (21, "Sc", "Scandium", "44.956", 2),
    (22, "Ti", "Titanium", "47.867", 2), (23, "V", "Vanadium", "50.942", 2), (24, "Cr", "Chromium", "51.996", 2),
    (25, "Mn", "Manganese", "54.938", 2), (26, "Fe", "Iron", "55.845", 2), (27, "Co", "Cobalt", "58.933", 2),
    (28, "Ni", "Nickel", "58.693", 2), (29, "Cu", "Copper", "63.546", 2), (30, "Zn", "Zinc", "65.38", 2),
    (31, "Ga", "Gallium", "69.723", 2), (32, "Ge", "Germanium", "72.630", 3), (33, "As", "Arsenic", "74.922", 3),
    (34, "Se", "Selenium", "78.971", 0), (35, "Br", "Bromine", "79.904", 0), (36, "Kr", "Krypton", "83.798", 4),
)  # fmt: skip
_PARTS = ("resistor", "resistor", "capacitor", "inductor", "lamp", "ammeter", "voltmeter", "switch", "diode")


def _along(start: Point, end: Point, share: float, off: float = 0.0) -> Point:
    """Returns the point at this share of the way, moved `off` to the right of the direction of travel."""
    length = math.dist(start, end)
    dx, dy = (end[0] - start[0]) / length, (end[1] - start[1]) / length
    return start[0] + (end[0] - start[0]) * share - dy * off, start[1] + (end[1] - start[1]) * share + dx * off


def _symbol(canvas: Canvas, theme: Theme, part: str, start: Point, end: Point) -> None:
    """Draws one component's symbol between two points that are its full length apart."""
    ink, wide = theme.ink, 2.2
    if part == "resistor":
        zigzag = [_along(start, end, (i + 0.5) / 8, 9 if i % 2 else -9) for i in range(8)]
        canvas.line([start, *zigzag, end], ink, wide)
    elif part in ("capacitor", "battery"):
        for share, half in ((0.42, 14), (0.58, 8 if part == "battery" else 14)):
            canvas.line((_along(start, end, share, -half), _along(start, end, share, half)), ink, wide + 0.8)
        canvas.line((start, _along(start, end, 0.42)), ink, wide)
        canvas.line((_along(start, end, 0.58), end), ink, wide)
    elif part == "inductor":
        angle = math.degrees(math.atan2(end[1] - start[1], end[0] - start[0]))
        radius = math.dist(start, end) / 8
        for i in range(4):
            canvas.arc(_along(start, end, (2 * i + 1) / 8), radius, angle + 180, angle + 360, ink, wide)
    elif part == "switch":
        canvas.circle(start, 3.5, fill=ink)
        canvas.circle(end, 3.5, fill=ink)
        canvas.line((start, _along(start, end, 0.9, -16)), ink, wide)
    elif part == "diode":
        tip = _along(start, end, 0.7)
        canvas.line((start, end), ink, wide)
        canvas.polygon((_along(start, end, 0.3, -11), _along(start, end, 0.3, 11), tip), fill=theme.tint(1, 0.5))
        canvas.polygon((_along(start, end, 0.3, -11), _along(start, end, 0.3, 11), tip), outline=ink, width=wide)
        canvas.line((_along(start, end, 0.7, -11), _along(start, end, 0.7, 11)), ink, wide)
    else:
        centre, radius = _along(start, end, 0.5), math.dist(start, end) / 2
        canvas.circle(centre, radius, fill=theme.ground, outline=ink, width=wide)
        if part == "lamp":
            for angle in (45, 135):
                canvas.line((polar(centre, radius, angle), polar(centre, radius, angle + 180)), ink, wide)
        else:
            canvas.text(centre, "A" if part == "ammeter" else "V", theme.bold, 19, ink)


def _value(rng: Rng, part: str, number: int) -> str:
    values = {
        "resistor": f"R{number} = {whole(rng, 1, 99) * 10} Ω",
        "capacitor": f"C{number} = {whole(rng, 1, 99)} µF",
        "inductor": f"L{number} = {whole(rng, 1, 99)} mH",
        "battery": f"{whole(rng, 1, 24)} V",
        "switch": f"S{number}",
        "lamp": f"Lamp {number}",
        "diode": f"D{number}",
    }
    return values.get(part, "")


def _component(canvas: Canvas, theme: Theme, ends: tuple[Point, Point], part: str, label: str) -> None:
    """Draws a wire between two nodes with a component in its middle and a label beside it."""
    start, end = ends
    length, size = math.dist(start, end), 44.0 if part not in ("lamp", "ammeter", "voltmeter") else 34.0
    share = min(size / length, 0.7) / 2
    inner = (_along(start, end, 0.5 - share), _along(start, end, 0.5 + share))
    canvas.line((start, inner[0]), theme.ink, 2.2)
    canvas.line((inner[1], end), theme.ink, 2.2)
    _symbol(canvas, theme, part, *inner)
    flat = abs(end[0] - start[0]) > abs(end[1] - start[1])
    middle = _along(start, end, 0.5)
    if flat:
        canvas.text((middle[0], middle[1] - 20), label, theme.font, 15, theme.ink, "mb")
    else:
        canvas.text((middle[0] + 20, middle[1]), label, theme.font, 15, theme.ink, "lm")


def _draw_branches(
    canvas: Canvas, rng: Rng, theme: Theme, branches: list[tuple[Point, Point, str | None]], is_crowded: bool
) -> list[str]:
    """Draws wires and components, numbers the components of a kind, and returns their labels."""
    counts: dict[str, int] = {}
    labels: list[str] = []
    for start, end, part in branches:
        if part is None:
            canvas.line((start, end), theme.ink, 2.2)
            continue
        counts[part] = counts.get(part, 0) + 1
        label = _value(rng, part, counts[part])
        if is_crowded:
            label = label.split(" = ")[0]
        _component(canvas, theme, (start, end), part, label)
        labels.append(label or part)
    return labels


def circuit(canvas: Canvas, rng: Rng, words: Vocabulary, theme: Theme) -> dict[str, object]:
    """Draws a circuit of one to three meshes with labelled components."""
    top = caption(canvas, rng, words, theme, 0.4) + 36
    columns, rows = pick(rng, ((1, 1), (2, 1), (2, 1), (3, 1), (2, 2)))
    xs = np.linspace(64, 330, columns + 1).tolist()
    ys = np.linspace(top, 404, rows + 1).tolist()
    branches: list[tuple[Point, Point, str | None]] = []
    for row, y in enumerate(ys):
        for column in range(columns):
            has_part = chance(rng, 0.75 if row == 0 else 0.35)
            branches.append(((xs[column], y), (xs[column + 1], y), pick(rng, _PARTS) if has_part else None))
    for column, x in enumerate(xs):
        for row in range(rows):
            part = "battery" if column == row == 0 else pick(rng, _PARTS) if chance(rng, 0.85) else None
            branches.append(((x, ys[row + 1]), (x, ys[row]), part))
    parts = _draw_branches(canvas, rng, theme, branches, is_crowded=columns > 2)
    for x in xs[1:-1]:
        for y in ys:
            canvas.circle((x, y), 4, fill=theme.ink)
    if chance(rng, 0.4):
        canvas.arrow((xs[0] - 22, ys[-1] - 20), (xs[0] - 22, ys[-1] - 70), theme.accents[1], 2.2)
        canvas.text((xs[0] - 36, ys[-1] - 46), "I", theme.font, 18, theme.accents[1])
    return {"components": parts}


def _force(canvas: Canvas, theme: Theme, start: Point, length: float, angle: float, name: str, colour: int) -> None:
    end = polar(start, length, angle)
    canvas.arrow(start, end, theme.accents[colour % 5], 3.2, 13)
    canvas.text(polar(end, 16, angle), name, theme.bold, 18, theme.accents[colour % 5])


def _incline(canvas: Canvas, rng: Rng, theme: Theme) -> dict[str, object]:
    angle = between(rng, 18, 40)
    left, base = 50.0, 380.0
    rise = 330 * math.tan(math.radians(angle))
    top = (left + 330, base - min(rise, 270))
    angle = math.degrees(math.atan2(base - top[1], 330))
    canvas.polygon(((left, base), (left + 330, base), top), fill=theme.tint(2, 0.25), outline=theme.ink, width=2.4)
    canvas.arc((left, base), 56, 360 - angle, 360, theme.ink, 2)
    canvas.text(polar((left, base), 80, -angle / 2), f"{angle:.0f}°", theme.font, 17, theme.ink)
    foot = _along((left, base), top, between(rng, 0.45, 0.65))
    up, along = -90.0 - angle, -angle
    corners = [polar(foot, 36, along), polar(foot, 36, along + 180)]
    roof = [polar(corner, 48, up) for corner in corners]
    canvas.polygon((corners[0], roof[0], roof[1], corners[1]), fill=theme.tint(0, 0.5), outline=theme.ink, width=2.2)
    centre = polar(foot, 24, up)
    mass = whole(rng, 1, 40)
    _force(canvas, theme, centre, between(rng, 85, 110), 90, "mg", 1)
    _force(canvas, theme, centre, between(rng, 80, 100), up, "N", 3)
    _force(canvas, theme, corners[chance(rng, 0.5)], between(rng, 45, 70), along + 180 * chance(rng, 0.5), "f", 4)
    canvas.text((440, 420), f"m = {mass} kg,  μ = {rng.uniform(0.05, 0.6):.2f}", theme.font, 17, theme.ink, "rm")
    return {"angle": round(angle, 1), "mass": mass}


def _pulley(canvas: Canvas, rng: Rng, theme: Theme) -> dict[str, object]:
    radius, centre = between(rng, 34, 50), (224.0, 110.0)
    canvas.rectangle((110, 40, 338, 52), fill=theme.tint(4, 0.5), outline=theme.ink)
    for x in range(114, 338, 14):
        canvas.line(((x, 40), (x + 9, 30)), theme.ink, 1.5)
    canvas.line((centre, (224, 52)), theme.ink, 3)
    canvas.circle(centre, radius, fill=theme.tint(2, 0.3), outline=theme.ink, width=2.4)
    canvas.circle(centre, 5, fill=theme.ink)
    masses = [whole(rng, 1, 12), whole(rng, 1, 12)]
    for number, side in enumerate((-1, 1)):
        x, y, half = centre[0] + side * radius, between(rng, 215, 290), 20 + masses[number] * 1.4
        canvas.line(((x, centre[1]), (x, y)), theme.ink, 2)
        canvas.rectangle(
            (x - half, y, x + half, y + 1.5 * half), fill=theme.tint(number, 0.5), outline=theme.ink, width=2.2
        )
        canvas.text((x, y + 0.75 * half), f"{masses[number]} kg", theme.font, 16, theme.ink)
        _force(canvas, theme, (x + side * (half + 18), y - 6), 55, 270, "T", 3)
        _force(canvas, theme, (x, y + 1.5 * half), 52, 90, f"m{number + 1}g", 1)
    return {"masses": masses}


def _beam(canvas: Canvas, rng: Rng, theme: Theme) -> dict[str, object]:
    y, left, right = 240.0, 50.0, 398.0
    canvas.rectangle((left, y - 8, right, y + 8), fill=theme.tint(2, 0.5), outline=theme.ink, width=2.2)
    for number, x in enumerate((left + 20, right - between(rng, 20, 110))):
        triangle = ((x, y + 8), (x - 18, y + 42), (x + 18, y + 42))
        canvas.polygon(triangle, fill=theme.tint(0, 0.4), outline=theme.ink, width=2)
        canvas.text((x, y + 58), "AB"[number], theme.bold, 18, theme.ink)
    loads: list[int] = []
    for x in np.linspace(left + 40, right - 20, whole(rng, 2, 3)).tolist():
        load = whole(rng, 2, 60)
        length = 60 + load
        canvas.arrow((x, y - 10 - length), (x, y - 10), theme.accents[1], 3.2, 13)
        canvas.text((x, y - 24 - length), f"{load} kN", theme.font, 17, theme.accents[1])
        loads.append(load)
    level = y + 92
    canvas.arrow((left + 30, level), (left, level), theme.ink, 1.6)
    canvas.arrow((right - 30, level), (right, level), theme.ink, 1.6)
    canvas.line(((left, level), (right, level)), theme.ink, 1.4)
    length_m = whole(rng, 2, 18)
    canvas.text((224, level), f"{length_m} m", theme.font, 17, theme.ink, halo=theme.ground)
    return {"loads_kn": loads, "length_m": length_m}


def free_body(canvas: Canvas, rng: Rng, words: Vocabulary, theme: Theme) -> dict[str, object]:
    """Draws a block on a slope, two masses on a pulley or a loaded beam, with the forces as arrows."""
    if chance(rng, 0.4):
        canvas.text((224, 16), f"Problem {whole(rng, 1, 60)}: {words.title(1, 2)}", theme.bold, 16, theme.ink)
    return pick(rng, (_incline, _pulley, _beam))(canvas, rng, theme)


def periodic_cell(canvas: Canvas, rng: Rng, words: Vocabulary, theme: Theme) -> dict[str, object]:
    """Draws one large cell, or a block of cells, of the periodic table."""
    columns, rows = pick(rng, ((1, 1), (2, 2), (3, 2), (3, 3), (4, 4)))
    top = caption(canvas, rng, words, theme, 0.3) if columns > 1 else 18.0
    start = whole(rng, 0, len(_ELEMENTS) - columns * rows)
    side_x, side_y = (412 if columns > 1 else 330) / columns, (436 - top) / rows
    left = 224 - side_x * columns / 2
    shown: list[str] = []
    gap, radius = between(rng, 1, 5), pick(rng, (0.0, 0.0, 8.0))
    for number in range(columns * rows):
        z, symbol, name, weight, family = _ELEMENTS[start + number]
        x, y = left + number % columns * side_x, top + number // columns * side_y
        box = (x + gap, y + gap, x + side_x - gap, y + side_y - gap)
        canvas.rectangle(box, fill=theme.tint(family, 0.35), outline=theme.ink, width=1.8, radius=radius)
        unit = min(side_x, side_y)
        pad = unit * 0.09
        canvas.text((box[0] + pad, box[1] + pad), str(z), theme.font, unit * 0.15, theme.ink, "lt")
        canvas.text((x + side_x / 2, y + side_y * 0.45), symbol, theme.bold, unit * 0.4, theme.ink)
        size = canvas.fitted(name, theme.font, unit * 0.13, side_x - 2 * gap - 8)
        canvas.text((x + side_x / 2, y + side_y * 0.74), name, theme.font, size, theme.ink)
        canvas.text((x + side_x / 2, y + side_y * 0.87), weight, theme.font, unit * 0.11, theme.ink)
        shown.append(symbol)
    return {"elements": shown}
