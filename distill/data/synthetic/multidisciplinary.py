"""Diagrams of many subjects, drawn at twice the size and reduced: geometry, circuits, molecules, maps and more."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops

from distill.data.synthetic import diagrams_concepts, diagrams_maths, diagrams_science, molecule
from distill.data.synthetic.canvas import DESIGN_UNITS, Canvas
from distill.data.synthetic.diagram_theme import Painter, draw_sheet, draw_theme
from distill.data.synthetic.rendered import Rendered, Split, chance, pick
from distill.data.synthetic.textures import light, noise, paper
from distill.data.synthetic.words import Vocabulary

_PAINTERS: dict[str, Painter] = {
    "geometry": diagrams_maths.geometry,
    "function_plot": diagrams_maths.function_plot,
    "formula": diagrams_maths.formula,
    "table": diagrams_maths.table,
    "circuit": diagrams_science.circuit,
    "free_body": diagrams_science.free_body,
    "periodic_cell": diagrams_science.periodic_cell,
    "molecule": molecule.molecule,
    "map": diagrams_concepts.atlas,
    "timeline": diagrams_concepts.timeline,
    "flow_chart": diagrams_concepts.flow_chart,
    "tree": diagrams_concepts.tree,
    "music": diagrams_concepts.music,
}


def kinds(split: Split) -> tuple[str, ...]:
    """Returns the kinds of diagram, the same for both splits."""
    return tuple(_PAINTERS)


def _finished(rng: np.random.Generator, image: Image.Image, pattern: str) -> Image.Image:
    """Returns the drawing as a clean rendering, a scan on paper or, for a blackboard, with smeared chalk."""
    size_px = image.width
    if pattern == "chalk":
        smear = np.clip(14 + 9 * noise(rng, size_px, (3, 9, 60)), 0, 60).astype(np.uint8)
        return ImageChops.add(image, Image.fromarray(np.repeat(smear[..., None], 3, 2)))
    if chance(rng, 0.4):
        sheet = paper(rng, size_px, pick(rng, ((252, 250, 244), (244, 240, 230), (240, 240, 240))))
        return light(rng, ImageChops.multiply(image, sheet), 0.15)
    return image


def render(kind: str, rng: np.random.Generator, split: Split, size_px: int, variant: int) -> Rendered:
    """Returns one diagram with its text lines and the facts drawn.

    Args:
        kind: one of `kinds(split)`.
        rng: the sample's generator.
        split: fonts, accents and words of the two splits are disjoint.
        size_px: side of the image.
        variant: unused: every sample is its own.
    """
    theme = draw_theme(rng, split)
    canvas = Canvas(DESIGN_UNITS, DESIGN_UNITS, 2 * size_px / DESIGN_UNITS, theme.ground)
    draw_sheet(canvas, theme)
    data = _PAINTERS[kind](canvas, rng, Vocabulary(rng, split), theme)
    image = _finished(rng, canvas.finish(size_px), theme.pattern)
    return Rendered(image, None, {"lines": canvas.annotated_lines(size_px), "data": data})
