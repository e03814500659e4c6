"""InternVL's dynamic tiling: an image as a grid of squares of the encoder's size, and a thumbnail.

The rule is that of `dynamic_preprocess` in the InternVL release and of transformers' `get_optimal_tiled_canvas`; where
others differ (ties, thumbnails, palettes) is told in docs/exports.md and checked in tests/unit/test_vlm_tiling.py.

Legend: T tiles with the thumbnail, S pixels a side of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.errors import ConfigError, DataError

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Tiling:
    """How images are cut.

    Attributes:
        tile_size: pixels a side of a tile: the encoder's image size.
        min_tiles: fewest tiles of a grid, the thumbnail not counted.
        max_tiles: most tiles of a grid, the thumbnail not counted. InternVL trains with 6 or 12 and evaluates with up
            to 40. It holds for one image; a budget over several images is the caller's to divide.
        use_thumbnail: append the whole image, squashed to one tile, where the grid has more than one.

    Raises:
        ConfigError: a number is out of range.
    """

    tile_size: int = 448
    min_tiles: int = 1
    max_tiles: int = 12
    use_thumbnail: bool = True

    def __post_init__(self) -> None:
        if self.tile_size < 1:
            raise ConfigError(f"tile_size {self.tile_size} is no size in pixels; give the encoder's img_size, as 448.")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ConfigError(
                f"min_tiles {self.min_tiles} and max_tiles {self.max_tiles} allow no grid: 1 <= min_tiles <= max_tiles."
            )


@lru_cache(maxsize=16)
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Return every grid `(columns, rows)` of so many tiles, small grids first, then few columns first."""
    sides = range(1, max_tiles + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if min_tiles <= columns * rows <= max_tiles]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def choose_grid(width: int, height: int, tiling: Tiling) -> tuple[int, int]:
    """Return the grid `(columns, rows)` whose shape is nearest to the image's.

    Among grids that are equally near, a larger one is taken only if the image has more than half of the grid's
    pixels; so 448 x 448 stays one tile, rather than becoming 2 x 2 or 3 x 3.

    Args:
        width: of the image, pixels.
        height: of the image, pixels.
        tiling: size and number of tiles.

    Raises:
        DataError: a side is not positive.
    """
    if width < 1 or height < 1:
        raise DataError(f"An image of {width} x {height} px has no pixels to cut into tiles.")
    aspect, area = width / height, width * height
    best, best_distance = (1, 1), float("inf")
    for grid in candidate_grids(tiling.min_tiles, tiling.max_tiles):
        distance = abs(aspect - grid[0] / grid[1])
        is_filled = area > 0.5 * tiling.tile_size * tiling.tile_size * grid[0] * grid[1]
        if distance < best_distance or (distance == best_distance and is_filled):
            best, best_distance = grid, distance
    return best


def count_tiles(width: int, height: int, tiling: Tiling) -> int:
    """Return how many tiles an image becomes, the thumbnail counted; InternVL gives each 256 tokens at 448 px."""
    columns, rows = choose_grid(width, height, tiling)
    grid = columns * rows
    return grid + 1 if tiling.use_thumbnail and grid > 1 else grid


def cut_tiles(image: Image.Image, tiling: Tiling) -> list[Image.Image]:
    """Return the tiles of an image, row by row, and the thumbnail last.

    The image is squashed to the grid: no padding, no crop, whatever its aspect ratio.

    Args:
        image: of any mode. It is made RGB first: resized as a palette it would be interpolated between colour numbers.
        tiling: size and number of tiles.

    Returns:
        `count_tiles` RGB images of `tile_size` x `tile_size`.
    """
    rgb = image.convert("RGB")
    side = tiling.tile_size
    columns, rows = choose_grid(*rgb.size, tiling)
    canvas = rgb.resize((side * columns, side * rows), Image.Resampling.BICUBIC)
    tiles = [
        canvas.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))
        for row in range(rows)
        for column in range(columns)
    ]
    if tiling.use_thumbnail and len(tiles) > 1:
        tiles.append(rgb.resize((side, side), Image.Resampling.BICUBIC))
    return tiles


def tile_pixels(image: Image.Image, tiling: Tiling, image_mean: RGB, image_std: RGB) -> Tensor:
    """Return an image's tiles as an exported encoder takes them.

    Args:
        image: of any mode.
        tiling: size and number of tiles.
        image_mean: the encoder's channel means, of images scaled to [0, 1].
        image_std: the encoder's channel standard deviations.

    Returns:
        `[T, 3, S, S]` float32, normalised.

    Example:
        >>> tile_pixels(Image.new("RGB", (200, 50)), Tiling(tile_size=28), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).shape
        torch.Size([5, 3, 28, 28])
    """
    tiles = np.stack([np.asarray(tile) for tile in cut_tiles(image, tiling)])
    pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (image_mean, image_std))
    return (pixels - mean) / std
