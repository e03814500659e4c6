"""Drawn pages of short lines whose text is known, in several font sizes: data for the reading probe.

A page is a grid of fields; each holds one line in one font size at a random place. Every page has lines of all sizes,
so that sizes are compared on the same pages. Characters are drawn evenly: no dictionary helps to guess them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from distill.data.synthetic.fonts import load_font
from distill.data.synthetic.rendered import between, pick, whole
from distill.errors import ConfigError
from distill.probe.drawn import drawing_rng, fingerprint, require_drawable, to_tensor
from distill.probe.intervals import FloatArray
from distill.probe.text_lines import Box, TextLine, TextPages

DIGITS = "0123456789"
ALPHANUMERIC = DIGITS + "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FONTS = ("DejaVuSans", "DejaVuSerif")

FIELD_PX = (224, 64)
"""Width and height of a field: 7 x 2 at 448 px; whole cells for patches of 14 (across), 16 and 32 px."""

_MARGIN_PX = 3

_BOX_MARGIN = 0.5
"""Room around a line in its box, in font sizes: detectors leave some, and CTC has steps for blanks at the ends."""


@dataclass(frozen=True)
class TextSettings:
    """What is drawn.

    Attributes:
        num_pages: 10 at least; a real study wants a thousand.
        img_size_px: side of the square pages.
        font_sizes_px: font sizes; each page has about as many lines of each.
        characters: what lines are made of, each as often; digits by default, which a small head learns from few lines.
        min_length: characters of the shortest line.
        max_length: characters of the longest line; one that is too wide for its field is cut to fit.
        fonts: names of matplotlib's font files.
        seed: another seed draws other pages.
    """

    num_pages: int = 70
    img_size_px: int = 448
    font_sizes_px: tuple[int, ...] = (16, 24, 32, 40, 48)
    characters: str = DIGITS
    min_length: int = 3
    max_length: int = 7
    fonts: tuple[str, ...] = FONTS
    seed: int = 0

    def __post_init__(self) -> None:
        require_drawable("num_pages", self.num_pages, 10, self.img_size_px)
        if len(set(self.characters)) < 2:
            raise ConfigError(f"characters is {self.characters!r}; reading needs two different characters at least.")
        if not 1 <= self.min_length <= self.max_length:
            raise ConfigError(
                f"min_length is {self.min_length} and max_length {self.max_length}; lines need one character at "
                "least, and the longest is no shorter than the shortest."
            )
        width, height = self.field_px
        largest = max(self.font_sizes_px, default=0)
        if not self.font_sizes_px or min(self.font_sizes_px) < 6 or largest > height - 2 * _MARGIN_PX:
            raise ConfigError(
                f"font_sizes_px is {self.font_sizes_px}; sizes must lie from 6 to {height - 2 * _MARGIN_PX} px, the "
                f"room in a field of {width} x {height} px."
            )

    @property
    def field_px(self) -> tuple[int, int]:
        """Width and height of a field."""
        return min(FIELD_PX[0], self.img_size_px), min(FIELD_PX[1], self.img_size_px)


@lru_cache(maxsize=1)
def draw_text_pages(settings: TextSettings) -> TextPages:
    """Draw the pages; the last set is kept in memory, because every encoder is shown the same."""
    size = settings.img_size_px
    images = torch.empty(settings.num_pages, 3, size, size, dtype=torch.uint8)
    lines: list[TextLine] = []
    for page in range(settings.num_pages):
        images[page], drawn = _draw_page(settings, page)
        lines.extend(drawn)
    return TextPages(images, tuple(lines), fingerprint("text", settings), "font_px")


def _draw_page(settings: TextSettings, page: int) -> tuple[Tensor, list[TextLine]]:
    rng, size = drawing_rng(settings.seed, "text", page), settings.img_size_px
    light_paper = rng.random() < 0.75
    paper, ink = (rng.uniform(200, 256, 3), rng.uniform(0, 70, 3))
    if not light_paper:
        paper, ink = ink, paper
    image = Image.new("RGB", (size, size), _rgb(paper))
    draw = ImageDraw.Draw(image)
    width, height = settings.field_px
    corners = [(x, y) for y in range(0, size - height + 1, height) for x in range(0, size - width + 1, width)]
    sizes = np.resize(np.asarray(settings.font_sizes_px), len(corners) + page)[page:]
    lines: list[TextLine] = []
    for (left, top), font_px in zip(corners, rng.permutation(sizes).tolist(), strict=True):
        text, box = _draw_line(draw, rng, settings, (left, top), font_px, _rgb(ink))
        lines.append(TextLine(page, box, text, float(font_px), page))
    return to_tensor(image), lines


def _rgb(values: FloatArray) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in values.tolist())
    return red, green, blue


def _draw_line(
    draw: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    settings: TextSettings,
    corner: tuple[int, int],
    font_px: int,
    ink: tuple[int, int, int],
) -> tuple[str, Box]:
    """Draw one line at a random place of a field, and return its text and its box."""
    font, (width, height) = load_font(pick(rng, settings.fonts), font_px), settings.field_px
    length = whole(rng, settings.min_length, settings.max_length)
    text = "".join(pick(rng, settings.characters) for _ in range(length))
    while len(text) > 1 and font.getlength(text) > width - 2 * _MARGIN_PX:
        text = text[:-1]
    left, top, right, bottom = font.getbbox(text)
    x = between(rng, _MARGIN_PX, max(_MARGIN_PX + 1.0, width - _MARGIN_PX - (right - left)))
    y = between(rng, _MARGIN_PX, max(_MARGIN_PX + 1.0, height - _MARGIN_PX - (bottom - top)))
    at = corner[0] + int(x) - left, corner[1] + int(y) - top
    draw.text(at, text, font=font, fill=ink)
    room, size = _BOX_MARGIN * font_px, float(settings.img_size_px)
    box = (at[0] + left - room, at[1] + top - room, at[0] + right + room, at[1] + bottom + room)
    x0, y0, x1, y1 = (min(max(edge, 0.0), size) for edge in box)
    return text, (x0, y0, x1, y1)
