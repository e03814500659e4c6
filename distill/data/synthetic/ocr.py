"""Text in the wild: documents, receipts, signs, handwriting, covers, forms, plates and screens on textured ground."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from distill.data.synthetic import ocr_objects, ocr_pages
from distill.data.synthetic.canvas import DESIGN_UNITS, Canvas, Point, homography
from distill.data.synthetic.rendered import Rendered, Split, between, chance
from distill.data.synthetic.textures import light, surface
from distill.data.synthetic.words import Vocabulary

Painter = Callable[[np.random.Generator, Vocabulary, Split, float], Canvas]

_PAINTERS: dict[str, Painter] = {
    "document": ocr_pages.document,
    "receipt": ocr_pages.receipt,
    "form": ocr_pages.form,
    "cover": ocr_pages.cover,
    "sign": ocr_objects.sign,
    "handwriting": ocr_objects.handwriting,
    "plate": ocr_objects.plate,
    "screen": ocr_objects.screen,
}
# Drawn slightly finer than shown: one bicubic warp then neither blurs nor aliases.
_OVERSAMPLING = 1.15


def kinds(split: Split) -> tuple[str, ...]:
    """Returns the kinds of text image, the same for both splits."""
    return tuple(_PAINTERS)


def _corners(rng: np.random.Generator, canvas: Canvas, size_px: int) -> list[Point]:
    """Returns where the four corners of the object land in the image: turned, scaled and in perspective."""
    fill = between(rng, 0.84, 1.0)
    scale = fill * size_px / max(canvas.width, canvas.height)
    half_w, half_h = canvas.width * scale / 2, canvas.height * scale / 2
    angle = np.radians(np.clip(rng.normal(0, 4), -11, 11))
    turn = np.asarray([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    flat = np.asarray([(-half_w, -half_h), (half_w, -half_h), (half_w, half_h), (-half_w, half_h)]) @ turn.T
    flat += rng.normal(0, 0.018 * size_px, flat.shape)
    spare = max(size_px - 2 * max(half_w, half_h), 0) / 2
    low, high = flat.min(0), flat.max(0)
    # Where the turned object still fits, keep it whole inside the frame; where it does not, centre it.
    slack = np.maximum(size_px - 4 - (high - low), 0)
    shrink = np.minimum((size_px - 4) / np.maximum(high - low, 1), 1.0).min()
    flat = (flat - (low + high) / 2) * shrink + size_px / 2
    flat += rng.uniform(-0.5, 0.5, 2) * np.minimum(slack, spare + 12)
    return [(float(x), float(y)) for x, y in flat]


def _placed(canvas: Canvas, ground: Image.Image, corners: list[Point], shadow: float) -> Image.Image:
    size = ground.size
    width, height = canvas.image.size
    outline: list[Point] = [(0, 0), (width, 0), (width, height), (0, height)]
    back = homography(corners, outline)
    matrix = tuple(float(v) for v in back.reshape(-1)[:8])
    bicubic = Image.Resampling.BICUBIC
    warped = canvas.image.transform(size, Image.Transform.PERSPECTIVE, matrix, bicubic)
    # Half a pixel inwards, so that the black beyond the object's edge never shows.
    middle = (sum(x for x, _ in corners) / 4, sum(y for _, y in corners) / 4)
    inner = [(2 * x - (x > middle[0]) * 2 + 1, 2 * y - (y > middle[1]) * 2 + 1) for x, y in corners]
    double = Image.new("L", (2 * size[0], 2 * size[1]), 0)
    ImageDraw.Draw(double).polygon(inner, fill=255)
    mask = double.reduce(2)
    small = mask.resize((size[0] // 4, size[1] // 4)).filter(ImageFilter.GaussianBlur(3))
    soft = ImageChops.offset(small, 2, 2).resize(size, Image.Resampling.BILINEAR)
    dark = ground.point([int(v * (1 - shadow)) for v in range(256)] * 3)
    return Image.composite(warped, Image.composite(dark, ground, soft), mask)


def _moved(box: tuple[float, float, float, float], matrix: np.ndarray) -> list[list[float]]:
    x0, y0, x1, y1 = box
    points = np.asarray([(x0, y0, 1), (x1, y0, 1), (x1, y1, 1), (x0, y1, 1)], np.float64) @ matrix.T
    return [[round(float(x / w), 1), round(float(y / w), 1)] for x, y, w in points]


def render(kind: str, rng: np.random.Generator, split: Split, size_px: int, variant: int) -> Rendered:
    """Returns one image of text with the text lines and their four-point boxes.

    Args:
        kind: one of `kinds(split)`.
        rng: the sample's generator.
        split: fonts and words of the two splits are disjoint.
        size_px: side of the image.
        variant: unused: every sample is its own.
    """
    canvas = _PAINTERS[kind](rng, Vocabulary(rng, split), split, _OVERSAMPLING * size_px / DESIGN_UNITS)
    corners = _corners(rng, canvas, size_px)
    image = _placed(canvas, surface(rng, size_px), corners, between(rng, 0.2, 0.6))
    image = light(rng, image, between(rng, 0.0, 0.4))
    if chance(rng, 0.12):
        image = image.filter(ImageFilter.GaussianBlur(between(rng, 0.3, 0.7)))
    outline = [(0.0, 0.0), (canvas.width, 0.0), (canvas.width, canvas.height), (0.0, canvas.height)]
    matrix = homography(outline, corners)
    lines = [{"text": text, "quad": _moved(box, matrix)} for text, box in canvas.text_lines]
    return Rendered(image, None, {"lines": lines})
