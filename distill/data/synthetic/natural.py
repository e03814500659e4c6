"""Views of the photographs that scikit-image and scikit-learn ship with their packages.

Each photograph is cut into a grid of regions and each view lies inside one region, so a probe that keeps groups apart
never sees the same pixels on both sides. The splits use different photographs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from distill.data.synthetic.rendered import Rendered, Split, between, chance
from distill.data.synthetic.textures import noise
from distill.errors import DataError

# A view never magnifies less than this many region pixels a side would allow; larger regions are reduced once, when
# the file is read, so that one bicubic resampling of a view does not alias.
_REGION_SIDE_LIMIT_PX = 640


@dataclass(frozen=True)
class Photograph:
    """A file that an installed package ships.

    Args:
        package: import name of the package.
        path: path inside the package.
        rows: rows of the grid of regions.
        columns: columns of the grid of regions.
    """

    package: str
    path: str
    rows: int
    columns: int


def _skimage(name: str, rows: int = 2, columns: int = 3) -> Photograph:
    return Photograph("skimage", f"data/{name}", rows, columns)


PHOTOGRAPHS: dict[Split, dict[str, Photograph]] = {
    "train": {
        "astronaut": _skimage("astronaut.png"),
        "camera": _skimage("camera.png"),
        "china": Photograph("sklearn", "datasets/images/china.jpg", 2, 3),
        "coffee": _skimage("coffee.png"),
        "coins": _skimage("coins.png"),
        "grass": _skimage("grass.png"),
        "ihc": _skimage("ihc.png"),
        "moon": _skimage("moon.png"),
    },
    "heldout": {
        "brick": _skimage("brick.png"),
        "chelsea": _skimage("chelsea.png"),
        "flower": Photograph("sklearn", "datasets/images/flower.jpg", 2, 3),
        "gravel": _skimage("gravel.png"),
        "hubble": _skimage("hubble_deep_field.jpg"),
        "motorcycle": _skimage("motorcycle_left.png"),
        "retina": _skimage("retina.jpg"),
        "rocket": _skimage("rocket.jpg"),
    },
}


def kinds(split: Split) -> tuple[str, ...]:
    """Returns the names of the split's photographs."""
    return tuple(PHOTOGRAPHS[split])


def photograph_path(photograph: Photograph) -> Path:
    """Returns where the photograph lies on disk; nothing is ever downloaded.

    Raises:
        DataError: the package is missing or its installed version does not ship the file.
    """
    spec = find_spec(photograph.package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        path = Path(folder) / photograph.path
        if path.is_file():
            return path
    raise DataError(
        f"The photograph {photograph.path} is not in the installed package {photograph.package!r}; the natural domain "
        "is made from files those packages ship. Run: pip install 'encoder-distill[demo]', or leave 'natural' out of "
        "--domains."
    )


@lru_cache(maxsize=32)
def _regions(split: Split, kind: str) -> tuple[Image.Image, ...]:
    photograph = PHOTOGRAPHS[split][kind]
    with Image.open(photograph_path(photograph)) as opened:
        image = opened.convert("RGB")
    side = max(image.width / photograph.columns, image.height / photograph.rows)
    if side > _REGION_SIDE_LIMIT_PX:
        factor = _REGION_SIDE_LIMIT_PX / side
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
    return tuple(
        image.crop(
            (
                image.width * column // photograph.columns,
                image.height * row // photograph.rows,
                image.width * (column + 1) // photograph.columns,
                image.height * (row + 1) // photograph.rows,
            )
        )
        for row in range(photograph.rows)
        for column in range(photograph.columns)
    )


def _view(rng: np.random.Generator, region: Image.Image, size_px: int) -> tuple[Image.Image, list[float], float]:
    """Returns a turned, scaled, perhaps mirrored crop, its box centre and size in the region, and its angle."""
    angle = math.radians(float(np.clip(rng.normal(0, 8), -20, 20)))
    scale = between(rng, 0.55, 1.0)
    aspect = math.exp(between(rng, -0.2, 0.2))
    width, height = region.width * math.sqrt(aspect), region.height / math.sqrt(aspect)
    cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
    # The turned rectangle's bounding box must stay inside the region.
    fit = min(region.width / (width * cos + height * sin), region.height / (width * sin + height * cos), 1.0)
    width, height = width * fit * scale, height * fit * scale
    half_x, half_y = (width * cos + height * sin) / 2, (width * sin + height * cos) / 2
    centre_x = between(rng, half_x, max(region.width - half_x, half_x + 1e-6))
    centre_y = between(rng, half_y, max(region.height - half_y, half_y + 1e-6))
    step_x, step_y = width / size_px, height / size_px
    if chance(rng, 0.5):
        step_x = -step_x
    a, b = math.cos(angle) * step_x, -math.sin(angle) * step_y
    d, e = math.sin(angle) * step_x, math.cos(angle) * step_y
    middle = size_px / 2
    matrix = (a, b, centre_x - (a + b) * middle, d, e, centre_y - (d + e) * middle)
    view = region.transform((size_px, size_px), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    box = [round(v, 1) for v in (centre_x, centre_y, width, height)]
    return view, box, math.degrees(angle)


def _relit(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Returns the image with another exposure, contrast, saturation, colour cast, gamma and uneven light."""
    size_px = image.width
    pixels = np.asarray(image, np.float32) / 255
    grey = pixels @ np.asarray((0.299, 0.587, 0.114), np.float32)
    saturation = np.float32(between(rng, 0.55, 1.4))
    pixels = grey[..., None] + saturation * (pixels - grey[..., None])
    mean = np.float32(grey.mean())
    pixels = mean + np.float32(between(rng, 0.75, 1.3)) * (pixels - mean)
    line = np.linspace(-0.5, 0.5, size_px, dtype=np.float32)
    slope = rng.normal(0, 0.18, 2).astype(np.float32)
    gain = 1 + slope[0] * line[None, :] + slope[1] * line[:, None] + np.float32(0.06) * noise(rng, size_px, (2,))
    cast = rng.normal(1, 0.05, 3).astype(np.float32) * np.float32(between(rng, 0.75, 1.2))
    pixels = np.clip(pixels * (gain[..., None] * cast), 0, 1)
    table = np.linspace(0, 1, 256) ** between(rng, 0.75, 1.3)
    curve = [round(255 * float(v)) for v in table] * 3
    return Image.fromarray((pixels * 255).astype(np.uint8)).point(curve)


def render(kind: str, rng: np.random.Generator, split: Split, size_px: int, variant: int) -> Rendered:
    """Returns one view of a photograph.

    Args:
        kind: the photograph, one of `kinds(split)`.
        rng: the sample's generator.
        split: the split.
        size_px: side of the image.
        variant: counts the samples of this kind; regions are visited in turn, so that groups are balanced.
    """
    regions = _regions(split, kind)
    number = variant % len(regions)
    view, box, angle = _view(rng, regions[number], size_px)
    image = _relit(rng, view)
    if chance(rng, 0.15):
        image = image.filter(ImageFilter.GaussianBlur(between(rng, 0.5, 1.5)))
    annotations: dict[str, object] = {"photograph": kind, "region": number, "view": box, "angle_deg": round(angle, 1)}
    return Rendered(image, f"{kind}/{number}", annotations)
