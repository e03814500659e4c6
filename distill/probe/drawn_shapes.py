"""Drawn scenes of shapes on textured ground, with the class of every pixel: data for segmentation.

Colours, sizes, angles and grounds are drawn independently of the class, so only a shape's outline tells its class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from distill.data.synthetic.rendered import between, pick, whole
from distill.data.synthetic.textures import surface
from distill.errors import ConfigError
from distill.probe.drawn import drawing_rng, require_drawable, to_tensor

SHAPES = ("circle", "square", "triangle", "star", "cross")
CLASSES = ("background", *SHAPES)

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class ShapeSettings:
    """What is drawn.

    Attributes:
        num_images: 10 at least; a real study wants a thousand.
        img_size_px: side of the square images.
        num_shapes: of each image; later ones may cover earlier ones.
        seed: another seed draws other images.
    """

    num_images: int = 100
    img_size_px: int = 448
    num_shapes: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        require_drawable("num_images", self.num_images, 10, self.img_size_px)
        if self.num_shapes < 1:
            raise ConfigError(f"num_shapes is {self.num_shapes}; a scene needs one at least.")


@dataclass(frozen=True, eq=False)
class Scenes:
    """Drawn scenes.

    Attributes:
        images: `[N, 3, S, S]`, uint8.
        masks: `[N, S, S]`, uint8, position in `CLASSES`.
    """

    images: Tensor
    masks: Tensor


@lru_cache(maxsize=1)
def draw_scenes(settings: ShapeSettings) -> Scenes:
    """Draw the scenes; the last set is kept in memory, because every encoder is shown the same."""
    size = settings.img_size_px
    images = torch.empty(settings.num_images, 3, size, size, dtype=torch.uint8)
    masks = torch.empty(settings.num_images, size, size, dtype=torch.uint8)
    for number in range(settings.num_images):
        images[number], masks[number] = _draw_scene(settings, number)
    return Scenes(images, masks)


def _draw_scene(settings: ShapeSettings, number: int) -> tuple[Tensor, Tensor]:
    rng, size = drawing_rng(settings.seed, "shapes", number), settings.img_size_px
    image, mask = surface(rng, size), Image.new("L", (size, size), 0)
    for _ in range(settings.num_shapes):
        kind = whole(rng, 1, len(SHAPES))
        radius = between(rng, 0.09, 0.2) * size
        outline = _OUTLINES[SHAPES[kind - 1]](radius)
        x, y = rng.uniform(radius, size - radius, 2)
        points = _placed(outline, between(rng, 0, 2 * math.pi), float(x), float(y))
        cover = _smooth_cover(points, size)
        fill = surface(rng, size) if rng.random() < 0.3 else Image.new("RGB", (size, size), _colour(rng))
        image.paste(fill, mask=cover)
        mask.paste(kind, mask=cover.point([0] * 128 + [255] * 128))
    return to_tensor(image), torch.from_numpy(np.array(mask, dtype=np.uint8))


def _smooth_cover(points: Points, size: int) -> Image.Image:
    """Return how much of each pixel lies inside the outline, 0 to 255."""
    double = Image.new("L", (2 * size, 2 * size), 0)
    ImageDraw.Draw(double).polygon([(2 * x, 2 * y) for x, y in points], fill=255)
    return double.reduce(2)


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    return pick(rng, _COLOURS) if rng.random() < 0.5 else (whole(rng, 0, 255), whole(rng, 0, 255), whole(rng, 0, 255))


_COLOURS = ((200, 40, 40), (40, 160, 70), (40, 80, 200), (240, 200, 40), (20, 20, 20), (250, 250, 250))


def _placed(outline: Points, angle: float, x: float, y: float) -> Points:
    cos, sin = math.cos(angle), math.sin(angle)
    return [(x + cos * u - sin * v, y + sin * u + cos * v) for u, v in outline]


def _ring(count: int, *radii: float) -> Points:
    """Return `count` corners at equal angles, whose distances go through `radii` again and again."""
    angles = (2 * math.pi * step / count for step in range(count))
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)]


def _cross(radius: float) -> Points:
    long, short = 0.95 * radius, 0.33 * radius
    arm = [(long, -short), (long, short), (short, short)]
    turns = ((1, 0), (0, 1), (-1, 0), (0, -1))
    return [(c * u - s * v, s * u + c * v) for c, s in turns for u, v in arm]


_OUTLINES: dict[str, Callable[[float], Points]] = {
    "circle": lambda radius: _ring(64, 0.85 * radius),
    "square": lambda radius: _ring(4, radius),
    "triangle": lambda radius: _ring(3, radius),
    "star": lambda radius: _ring(10, radius, 0.42 * radius),
    "cross": _cross,
}
