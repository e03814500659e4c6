"""Skeletal formulas of invented molecules: rings, chains, double bonds and hetero atoms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from distill.data.synthetic.canvas import Canvas, Point, polar
from distill.data.synthetic.diagram_theme import Theme, caption
from distill.data.synthetic.rendered import chance, pick, whole
from distill.data.synthetic.textures import Colour
from distill.data.synthetic.words import Vocabulary

Rng = np.random.Generator
_ENDS = ("OH", "NH2", "Cl", "F", "Br", "CH3", "", "", "CN", "OMe", "NO2", "SH")


@dataclass
class _Skeleton:
    """Atoms at positions with a bond length of 1, and bonds as (atom, atom, order)."""

    atoms: list[Point] = field(default_factory=lambda: [])
    labels: list[str] = field(default_factory=lambda: [])
    bonds: list[tuple[int, int, int]] = field(default_factory=lambda: [])
    ring_centres: list[Point] = field(default_factory=lambda: [])

    def add(self, at: Point, label: str = "") -> int:
        self.atoms.append(at)
        self.labels.append(label)
        return len(self.atoms) - 1

    def is_free(self, at: Point) -> bool:
        return all(math.dist(at, other) > 0.8 for other in self.atoms)

    def find(self, at: Point) -> int | None:
        return next((i for i, other in enumerate(self.atoms) if math.dist(at, other) < 0.2), None)

    def unsaturated(self) -> set[int]:
        return {atom for a, b, order in self.bonds if order == 2 for atom in (a, b)}

    def mend_valences(self) -> None:
        """Turns a divalent ring atom that has gained a third neighbour into nitrogen or carbon."""
        for atom, label in enumerate(self.labels):
            if label in ("O", "S", "NH", "N") and len(self.neighbours(atom)) > 2:
                self.labels[atom] = "" if atom in self.unsaturated() else "N"

    def neighbours(self, atom: int) -> list[int]:
        return [b if a == atom else a for a, b, _ in self.bonds if atom in (a, b)]


def _add_ring(skeleton: _Skeleton, rng: Rng, centre: Point, sides: int, turn: float, is_aromatic: bool) -> list[int]:
    """Adds a regular ring, sharing atoms that exist already, and returns its atoms."""
    radius = 0.5 / math.sin(math.pi / sides)
    ring: list[int] = []
    for i in range(sides):
        at = polar(centre, radius, turn + 360 * i / sides)
        known = skeleton.find(at)
        ring.append(skeleton.add(at) if known is None else known)
    known_bonds = {frozenset((a, b)) for a, b, _ in skeleton.bonds}
    for i in range(sides):
        a, b = ring[i], ring[(i + 1) % sides]
        if frozenset((a, b)) not in known_bonds:
            # No atom takes part in two double bonds.
            order = 2 if is_aromatic and i % 2 == 0 and not {a, b} & skeleton.unsaturated() else 1
            skeleton.bonds.append((a, b, order))
    skeleton.ring_centres.append(centre)
    if not is_aromatic or chance(rng, 0.35):
        hetero = pick(rng, ring)
        if len(skeleton.neighbours(hetero)) == 2:
            skeleton.labels[hetero] = "N" if hetero in skeleton.unsaturated() else pick(rng, ("O", "NH", "S", "O"))
    return ring


def _outward(skeleton: _Skeleton, atom: int) -> float:
    """Returns the direction in degrees that leads away from the atom's neighbours."""
    x, y = skeleton.atoms[atom]
    away = [(x - skeleton.atoms[n][0], y - skeleton.atoms[n][1]) for n in skeleton.neighbours(atom)]
    return math.degrees(math.atan2(sum(dy for _, dy in away), sum(dx for dx, _ in away)))


def _grow_chain(skeleton: _Skeleton, rng: Rng, atom: int, direction: float, length: int) -> None:
    """Adds a zigzag chain with perhaps a carbonyl group, a double bond and a named end."""
    bend = 30 if chance(rng, 0.5) else -30
    for step in range(length):
        angle = direction if step == 0 else direction + (bend if step % 2 else -bend)
        at = polar(skeleton.atoms[atom], 1, angle)
        if not skeleton.is_free(at):
            return
        is_last = step == length - 1
        label = pick(rng, _ENDS) if is_last else "O" if 0 < step < length - 1 and chance(rng, 0.12) else ""
        double = not is_last and step > 0 and not label and not skeleton.labels[atom] and chance(rng, 0.15)
        fresh = skeleton.add(at, label)
        skeleton.bonds.append((atom, fresh, 2 if double else 1))
        carbonyl = polar(at, 1, angle + (60 if step % 2 else -60) * (1 if bend > 0 else -1))
        if not label and not double and chance(rng, 0.25) and skeleton.is_free(carbonyl):
            skeleton.bonds.append((fresh, skeleton.add(carbonyl, "O"), 2))
        atom = fresh


def _build(rng: Rng) -> _Skeleton:
    skeleton = _Skeleton()
    turn = pick(rng, (0.0, 30.0, 90.0))
    rings = whole(rng, 0, 3)
    centre: Point = (0.0, 0.0)
    for number in range(rings):
        if number:
            centre = polar(centre, math.sqrt(3), turn + 30 + 60 * whole(rng, 0, 1))
        if all(math.dist(centre, other) > 1 for other in skeleton.ring_centres):
            _add_ring(skeleton, rng, centre, 6, turn, chance(rng, 0.7))
    if rings == 0:
        first = skeleton.add((0, 0), pick(rng, _ENDS))
        _grow_chain(skeleton, rng, first, pick(rng, (-30.0, 30.0)), whole(rng, 6, 10))
        for atom in range(2, len(skeleton.atoms) - 1, 2):
            if chance(rng, 0.5) and len(skeleton.neighbours(atom)) == 2 and not skeleton.labels[atom]:
                _grow_chain(skeleton, rng, atom, _outward(skeleton, atom), whole(rng, 1, 2))
        return skeleton
    free = [a for a in range(len(skeleton.atoms)) if len(skeleton.neighbours(a)) == 2 and not skeleton.labels[a]]
    for atom in rng.permutation(free)[: whole(rng, 1, 4)].tolist():
        direction = _outward(skeleton, atom)
        at = polar(skeleton.atoms[atom], 1 + math.sqrt(3) / 2, direction)
        if chance(rng, 0.2) and all(skeleton.is_free(polar(at, 1, angle)) for angle in range(0, 360, 30)):
            joint = polar(skeleton.atoms[atom], 1, direction)
            ring_centre = polar(skeleton.atoms[atom], 2, direction)
            ring = _add_ring(skeleton, rng, ring_centre, 6, direction + 180, chance(rng, 0.6))
            end = skeleton.find(joint)
            skeleton.bonds.append((atom, ring[0] if end is None else end, 1))
        else:
            _grow_chain(skeleton, rng, atom, direction, whole(rng, 1, 5))
    return skeleton


def _draw_bond(
    canvas: Canvas, theme: Theme, ends: tuple[Point, Point], order: int, towards: Point | None, width: float
) -> None:
    (x0, y0), (x1, y1) = ends
    canvas.line(ends, theme.ink, width)
    if order == 1:
        return
    length = math.dist(*ends)
    nx, ny = -(y1 - y0) / length, (x1 - x0) / length
    middle = ((x0 + x1) / 2, (y0 + y1) / 2)
    if towards is not None and (towards[0] - middle[0]) * nx + (towards[1] - middle[1]) * ny < 0:
        nx, ny = -nx, -ny
    gap, trim = length * 0.15, 0.12
    inner = (
        (x0 + (x1 - x0) * trim + nx * gap, y0 + (y1 - y0) * trim + ny * gap),
        (x1 - (x1 - x0) * trim + nx * gap, y1 - (y1 - y0) * trim + ny * gap),
    )
    canvas.line(inner, theme.ink, width)


def _write_atom(canvas: Canvas, theme: Theme, at: Point, label: str, size: float, colour: Colour) -> None:
    """Writes an atom's label with its digit as a subscript, its first letter on the atom."""
    letters, digit = label.rstrip("23"), label[len(label.rstrip("23")) :]
    left = at[0] - canvas.text_width(label[0], theme.font, size) / 2
    box = canvas.text((left, at[1]), letters, theme.font, size, colour, "lm", halo=theme.ground)
    if digit:
        canvas.text((box[2] + 1, at[1] + size * 0.62), digit, theme.font, size * 0.68, colour, "ls", halo=theme.ground)


def molecule(canvas: Canvas, rng: Rng, words: Vocabulary, theme: Theme) -> dict[str, object]:
    """Draws the skeletal formula of one invented molecule, perhaps with a name."""
    skeleton = _build(rng)
    skeleton.mend_valences()
    top = caption(canvas, rng, words, theme, 0.25)
    bottom = 440.0
    if chance(rng, 0.4):
        name = words.word() + pick(rng, ("ol", "ine", "one", "ate", "ane", "ide"))
        canvas.text((224, 424), name, theme.font, 20, theme.ink)
        bottom = 404.0
    xs, ys = zip(*skeleton.atoms, strict=True)
    span = max((max(xs) - min(xs)) / 350, (max(ys) - min(ys)) / (bottom - top - 60), 1 / 74)
    shift_x, shift_y = 224 - (max(xs) + min(xs)) / 2 / span, (top + bottom) / 2 - (max(ys) + min(ys)) / 2 / span
    points = [(x / span + shift_x, y / span + shift_y) for x, y in skeleton.atoms]
    centres = [(x / span + shift_x, y / span + shift_y) for x, y in skeleton.ring_centres]
    width = pick(rng, (2.0, 2.6, 3.2))
    for a, b, order in skeleton.bonds:
        middle = ((points[a][0] + points[b][0]) / 2, (points[a][1] + points[b][1]) / 2)
        near = [centre for centre in centres if math.dist(centre, middle) < 0.95 / span]
        _draw_bond(canvas, theme, (points[a], points[b]), order, near[0] if near else None, width)
    coloured = chance(rng, 0.5)
    for label, point in zip(skeleton.labels, points, strict=True):
        if label:
            colour = theme.accents[{"O": 1, "N": 0}.get(label[0], 2)] if coloured else theme.ink
            size = min(22.0, 0.42 / span)
            _write_atom(canvas, theme, point, label, size, colour)
    return {"atoms": len(points), "labels": [label for label in skeleton.labels if label]}
