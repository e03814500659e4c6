"""How a diagram looks: sheet, ink, accent colours, fonts; and the captions and formulas that diagrams share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from distill.data.synthetic.canvas import Canvas, Point
from distill.data.synthetic.rendered import Split, chance, pick
from distill.data.synthetic.textures import Colour
from distill.data.synthetic.words import Vocabulary

# Fonts with Greek letters, degree and ohm signs.
_FONTS: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (("DejaVuSans", "DejaVuSans-Bold"), ("DejaVuSerif", "DejaVuSerif-Bold")),
    "heldout": (("STIXGeneral", "STIXGeneralBol"), ("STIXGeneralItalic", "STIXGeneralBolIta")),
}
_MATH: dict[Split, tuple[str, ...]] = {"train": ("cm", "dejavuserif", "dejavusans"), "heldout": ("stix", "stixsans")}
_SHEETS: tuple[tuple[Colour, Colour, str], ...] = (
    ((255, 255, 255), (20, 20, 24), "plain"),
    ((255, 255, 255), (24, 30, 60), "plain"),
    ((252, 250, 243), (30, 30, 32), "plain"),
    ((247, 248, 250), (34, 40, 49), "plain"),
    ((253, 253, 250), (28, 40, 96), "squares"),
    ((250, 251, 246), (36, 36, 40), "dots"),
    ((244, 236, 216), (62, 44, 28), "plain"),
    ((34, 60, 50), (238, 242, 232), "chalk"),
    ((22, 58, 110), (232, 240, 250), "squares"),
    ((30, 32, 40), (226, 228, 234), "plain"),
)
_ACCENTS: dict[Split, tuple[tuple[Colour, ...], ...]] = {
    "train": (
        ((31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189)),
        ((38, 70, 83), (42, 157, 143), (231, 111, 81), (233, 196, 106), (244, 162, 97)),
        ((70, 70, 74), (110, 110, 116), (150, 150, 156), (90, 90, 94), (130, 130, 134)),
    ),
    "heldout": (
        ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0)),
        ((94, 60, 153), (230, 97, 1), (33, 102, 172), (77, 146, 33), (197, 27, 125)),
    ),
}


@dataclass(frozen=True)
class Theme:
    """One diagram's look.

    Args:
        ground: colour of the sheet.
        ink: colour of lines and text.
        pattern: "plain", "squares", "dots" or "chalk".
        accents: five colours for emphasis; light ones on a dark sheet.
        font: font file name of the text.
        bold: its bold companion.
        math: matplotlib's name of the font set for formulas.
    """

    ground: Colour
    ink: Colour
    pattern: str
    accents: tuple[Colour, ...]
    font: str
    bold: str
    math: str

    def tint(self, number: int, strength: float = 0.25) -> Colour:
        """Returns an accent colour thinned with the sheet's colour, for areas."""
        return blend(self.ground, self.accents[number % len(self.accents)], strength)


def blend(low: Colour, high: Colour, share: float) -> Colour:
    """Returns the mixture of two colours; share 1 gives `high`."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return red, green, blue


def is_legible(colour: Colour, ground: Colour) -> bool:
    """Returns whether text of this colour stands out from the ground (Rec. 601 luma apart by over 90 of 255)."""
    weights = (0.299, 0.587, 0.114)
    return abs(sum(w * (a - b) for w, a, b in zip(weights, colour, ground, strict=True))) > 90


def draw_theme(rng: np.random.Generator, split: Split) -> Theme:
    """Returns a random look; fonts, formula fonts and accents of the two splits are disjoint."""
    ground, ink, pattern = pick(rng, _SHEETS)
    accents = pick(rng, _ACCENTS[split])
    if sum(ground) < 300:
        accents = tuple(blend(colour, (255, 255, 255), 0.45) for colour in accents)
    shift = int(rng.integers(len(accents)))
    font, bold = pick(rng, _FONTS[split])
    return Theme(ground, ink, pattern, accents[shift:] + accents[:shift], font, bold, pick(rng, _MATH[split]))


Painter = Callable[[Canvas, np.random.Generator, Vocabulary, Theme], dict[str, object]]


def draw_sheet(canvas: Canvas, theme: Theme) -> None:
    """Draws the sheet's pattern."""
    faint = blend(theme.ground, theme.ink, 0.13)
    steps = range(0, 449, 22)
    if theme.pattern == "squares":
        for at in steps:
            canvas.line(((at, 0), (at, canvas.height)), faint, 0.7)
            canvas.line(((0, at), (canvas.width, at)), faint, 0.7)
    elif theme.pattern == "dots":
        for x in steps:
            for y in steps:
                canvas.circle((x, y), 0.8, fill=faint)


def caption(canvas: Canvas, rng: np.random.Generator, words: Vocabulary, theme: Theme, probability: float) -> float:
    """Writes a heading with the given probability and returns the y where the diagram may begin."""
    if not chance(rng, probability):
        return 18.0
    text = words.title(2, 4)
    if chance(rng, 0.4):
        text = f"{pick(rng, ('Figure', 'Fig.', 'Diagram'))} {int(rng.integers(1, 30))}: {text}"
    size = canvas.fitted(text, theme.bold, 19, canvas.width - 40)
    canvas.text((canvas.width / 2, 22), text, theme.bold, size, theme.ink, "mm")
    return 46.0


@lru_cache(maxsize=512)
def formula_mask(tex: str, size_px: int, math: str) -> Image.Image:
    """Returns the formula as a mask, typeset by matplotlib's mathtext; `size_px` is its font size in pixels."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import MathTextParser

    font = FontProperties(size=size_px, math_fontfamily=math)
    # At 72 dots an inch a point is a pixel.
    parsed = MathTextParser("agg").parse(f"${tex}$", dpi=72, prop=font)
    mask = Image.fromarray(np.array(parsed.image, np.uint8))
    # Hairlines of the Computer Modern fonts would fade when the drawing is reduced.
    return mask.point([min(255, int(1.5 * v)) for v in range(256)])


def write_formula(
    canvas: Canvas,
    theme: Theme,
    tex: str,
    at: Point,
    size: float,
    colour: Colour,
    anchor: str = "m",
    has_patch: bool = False,
) -> None:
    """Writes a formula.

    Args:
        canvas: where to write.
        theme: names the font set.
        tex: mathtext without dollar signs.
        at: middle of the formula, or of its left edge if `anchor` is "l".
        size: font size in design units; made smaller where the formula is wider than the canvas.
        colour: ink.
        anchor: "m" or "l".
        has_patch: puts it on a patch of the sheet's colour, which keeps it readable on lines.
    """
    k = canvas.pixels_per_unit
    mask = formula_mask(tex, round(size * k), theme.math)
    room = (canvas.width - 24) * k
    if mask.width > room:
        mask = formula_mask(tex, max(int(size * k * room / mask.width), 6), theme.math)
    left = at[0] * k - (mask.width / 2 if anchor == "m" else 0)
    left = min(max(left, 6 * k), canvas.image.width - mask.width - 6 * k)
    top = at[1] * k - mask.height / 2
    box = (left / k, top / k, (left + mask.width) / k, (top + mask.height) / k)
    if has_patch:
        canvas.rectangle((box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2), fill=theme.ground)
    canvas.paste(mask, (round(left), round(top)), colour)
    canvas.text_lines.append((tex, box))
