"""Surfaces to put things on: paper, wood, concrete, cloth, tiles; all grown from low-resolution noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from distill.data.synthetic.rendered import between, pick, whole

Plane = npt.NDArray[np.float32]
Colour = tuple[int, int, int]


def noise(rng: np.random.Generator, size_px: int, cells: tuple[int, ...]) -> Plane:
    """Returns smooth noise of zero mean and about unit range.

    Args:
        rng: the sample's generator.
        size_px: side of the square plane.
        cells: number of noise cells across the plane for each octave, coarse to fine; weights halve each time.

    Returns:
        `[size_px, size_px]`.
    """
    plane = np.zeros((size_px, size_px), np.float32)
    for octave, count in enumerate(cells):
        grid = rng.standard_normal((count + 1, count + 1)).astype(np.float32)
        layer = Image.fromarray(grid).resize((size_px, size_px), Image.Resampling.BICUBIC)
        plane += np.asarray(layer, np.float32) * np.float32(0.5**octave)
    return plane * np.float32(0.5)


def shade(plane: Plane, colour: Colour, depth: float) -> Image.Image:
    """Returns an RGB image of one colour whose brightness follows the plane; depth 0.2 means about 20 % either way."""
    factor = 1 + np.float32(depth) * plane
    pixels = factor[..., None] * np.asarray(colour, np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8))


def _axes(size_px: int) -> tuple[Plane, Plane]:
    line: Plane = np.linspace(0, 1, size_px, dtype=np.float32)
    return line[None, :], line[:, None]


def _wood(rng: np.random.Generator, size_px: int) -> Plane:
    x, y = _axes(size_px)
    warp = noise(rng, size_px, (3, 7))
    rings = np.sin(between(rng, 25, 70) * (y + 0.06 * warp) + 3 * x)
    boards = np.where(np.modf(y * between(rng, 2, 4))[0] < 0.012, np.float32(-2.5), np.float32(0))
    grain = np.repeat(rng.standard_normal((size_px, size_px // 16 + 1)).astype(np.float32), 16, 1)[:, :size_px]
    plane = np.asarray(0.6 * rings + 0.25 * grain + boards, np.float32)
    return plane if rng.random() < 0.5 else np.ascontiguousarray(plane.T)


def _concrete(rng: np.random.Generator, size_px: int) -> Plane:
    speckle = rng.standard_normal((size_px, size_px), np.float32)
    return np.asarray(noise(rng, size_px, (4, 13, 40, 120)) + 0.15 * speckle, np.float32)


def _cloth(rng: np.random.Generator, size_px: int) -> Plane:
    x, y = _axes(size_px)
    threads = between(rng, 250, 420)
    weave: Plane = np.sin(threads * x) * np.sin(threads * y)
    return np.float32(0.5) * weave + noise(rng, size_px, (3, 9))


def _tiles(rng: np.random.Generator, size_px: int) -> Plane:
    x, y = _axes(size_px)
    count = between(rng, 3, 7)
    row = np.floor(y * count)
    u = np.modf(x * count * 0.6 + 0.5 * (row % 2))[0]
    v = np.modf(y * count)[0]
    joint = (np.minimum(u, 1 - u) < 0.02) | (np.minimum(v, 1 - v) < 0.035)
    tone = rng.standard_normal(4096, np.float32)
    cell = (np.floor(x * count * 0.6 + 0.5 * (row % 2)) * 37 + row * 101).astype(np.int64) % 4096
    plane: Plane = np.where(joint, np.float32(-1.6), np.float32(0.6) * tone[cell])
    return np.asarray(plane + 0.5 * noise(rng, size_px, (6, 40)), np.float32)


def _plain(rng: np.random.Generator, size_px: int) -> Plane:
    x, y = _axes(size_px)
    right, down = rng.uniform(-1.5, 1.5, 2).astype(np.float32)
    return right * (x - np.float32(0.5)) + down * (y - np.float32(0.5))


_SURFACES: tuple[tuple[Callable[[np.random.Generator, int], Plane], tuple[Colour, ...], float], ...] = (
    (_wood, ((150, 103, 62), (92, 62, 40), (196, 160, 115)), 0.16),
    (_concrete, ((150, 150, 148), (108, 112, 116), (186, 178, 165)), 0.13),
    (_cloth, ((70, 88, 120), (132, 62, 60), (76, 106, 84), (201, 193, 176)), 0.12),
    (_tiles, ((158, 92, 74), (176, 182, 184), (120, 132, 140)), 0.14),
    (_plain, ((60, 66, 74), (206, 206, 202), (122, 140, 160), (181, 158, 128)), 0.35),
)


def surface(rng: np.random.Generator, size_px: int) -> Image.Image:
    """Returns a random surface seen from above, `size_px` square."""
    draw, colours, depth = pick(rng, _SURFACES)
    colour = pick(rng, colours)
    tint = rng.uniform(0.85, 1.12, 3)
    red, green, blue = (int(min(c * t, 255)) for c, t in zip(colour, tint, strict=True))
    return shade(draw(rng, size_px), (red, green, blue), depth)


def paper(rng: np.random.Generator, size_px: int, colour: Colour, depth: float = 0.03) -> Image.Image:
    """Returns a sheet of slightly uneven paper, `size_px` square."""
    plane = np.asarray(noise(rng, size_px, (3, 9)) + 0.35 * noise(rng, size_px, (90,)), np.float32)
    return shade(plane, colour, depth)


@lru_cache(maxsize=4)
def _grain_tile(size_px: int) -> Plane:
    return np.random.Generator(np.random.Philox(0)).standard_normal((size_px, size_px), np.float32)


def _grain(size_px: int, down: int, right: int) -> Plane:
    """Returns sensor noise: one fixed tile shifted by each sample's own amounts, ten times cheaper than fresh noise."""
    return np.roll(_grain_tile(size_px), (down, right), (0, 1))


def light(rng: np.random.Generator, image: Image.Image, strength: float) -> Image.Image:
    """Returns the image under uneven light with a little sensor noise.

    Args:
        rng: the sample's generator.
        image: RGB, square.
        strength: 0 leaves the light even; 0.3 lets it fall by about 30 % across the image.
    """
    size_px = image.width
    x, y = _axes(size_px)
    angle = between(rng, 0, 2 * np.pi)
    ramp = np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5)
    gain = between(rng, 0.9, 1.05) * (1 + np.float32(strength) * (ramp + 0.5 * noise(rng, size_px, (2,))))
    cast = rng.uniform(1 - 0.15 * strength, 1 + 0.15 * strength, 3).astype(np.float32)
    grain = _grain(size_px, whole(rng, 0, 255), whole(rng, 0, 255)) * np.float32(between(rng, 0.5, 4))
    pixels = np.asarray(image, np.float32)
    pixels *= gain[..., None] * cast
    pixels += grain[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8))
