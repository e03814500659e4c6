"""Dynamic tiling: the grids and pixels of the original, and the places where others went wrong."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.errors import ConfigError, DataError
from distill.export.golden import draw_image
from distill.vlm.tiling import Tiling, choose_grid, count_tiles, cut_tiles, tile_pixels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = Path(__file__).resolve().parents[3] / "shared" / "assets" / "images"


@pytest.mark.slow
@pytest.mark.parametrize("max_tiles", [6, 12, 24, 40])
def test_the_grid_is_the_originals_on_twenty_thousand_random_sizes(max_tiles: int) -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    reference = get_optimal_tiled_canvas.__wrapped__
    rng, tiling = random.Random(max_tiles), Tiling(max_tiles=max_tiles)
    sizes = [(rng.randint(1, 4000), rng.randint(1, 4000)) for _ in range(16_000)]
    # Small numbers and multiples of the tile make the ties that a rule can get wrong.
    sizes += [(448 * rng.randint(1, 9), 448 * rng.randint(1, 9)) for _ in range(2000)]
    sizes += [(rng.randint(1, 40) * 10, rng.randint(1, 40) * 10) for _ in range(2000)]
    assert len(sizes) == 20_000
    for width, height in sizes:
        expected = reference((height, width), (448, 448), 1, max_tiles)
        assert choose_grid(width, height, tiling) == expected, (width, height)


@pytest.mark.parametrize(
    ("size", "max_tiles", "grid", "tiles"),
    [
        ((640, 480), 12, (4, 3), 13),
        ((1920, 1080), 12, (4, 2), 9),
        ((200, 50), 12, (4, 1), 5),  # small images are enlarged
        ((100, 3000), 12, (1, 12), 13),
        ((640, 480), 6, (3, 2), 7),
        ((448, 448), 12, (1, 1), 1),  # a tie: not 3 x 3, and one tile needs no thumbnail
        ((336, 336), 12, (1, 1), 1),
        ((900, 900), 12, (2, 2), 5),  # fewer than half of the pixels of 3 x 3
    ],
)
def test_known_sizes_give_known_grids(size: tuple[int, int], max_tiles: int, grid: tuple[int, int], tiles: int) -> None:
    tiling = Tiling(max_tiles=max_tiles)
    assert choose_grid(*size, tiling) == grid
    assert count_tiles(*size, tiling) == tiles


def assert_pixels_are_the_originals(image: Image.Image, tile_size: int, max_tiles: int) -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    processor = GotOcr2ImageProcessorPil(
        size={"height": tile_size, "width": tile_size},
        image_mean=list(MEAN),
        image_std=list(STD),
        crop_to_patches=True,
        max_patches=max_tiles,
    )
    tiling, rgb = Tiling(tile_size=tile_size, max_tiles=max_tiles), image.convert("RGB")
    levels = processor(rgb, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    tiles = np.stack([np.asarray(tile) for tile in cut_tiles(image, tiling)]).transpose(0, 3, 1, 2)
    assert np.array_equal(tiles, levels)
    normalised = processor(rgb, return_tensors="pt")["pixel_values"]
    # No grey level differs, so what is left is in which order two libraries divide.
    assert float((tile_pixels(image, tiling, MEAN, STD) - normalised).abs().max()) <= 1e-6


def real_images() -> list[Path]:
    """One image of each data set that lies beside the project."""
    folders = sorted(path for path in IMAGES.glob("*") if path.is_dir()) if IMAGES.is_dir() else []
    files = [
        next((f for f in sorted(folder.rglob("*")) if f.suffix in (".png", ".jpg", ".jpeg")), None)
        for folder in folders
    ]
    return [file for file in files if file is not None]


@pytest.mark.slow
@pytest.mark.parametrize("max_tiles", [6, 40])
def test_pixels_are_the_originals_on_real_images(max_tiles: int) -> None:
    files = real_images()
    if not files:
        pytest.skip("no real images beside the project (shared/assets/images)")
    for file in files:
        with Image.open(file) as image:
            assert_pixels_are_the_originals(image, 448, max_tiles)


@pytest.mark.parametrize("size", [(131, 90), (90, 131), (56, 56), (300, 20)])
def test_pixels_are_the_originals_on_a_drawn_image(size: tuple[int, int]) -> None:
    assert_pixels_are_the_originals(Image.fromarray(draw_image(size[1], size[0])), 56, 12)


def test_tiles_go_row_by_row_and_the_thumbnail_is_last() -> None:
    picture = np.zeros((56, 84, 3), dtype=np.uint8)
    for row in range(2):
        for column in range(3):
            picture[row * 28 : (row + 1) * 28, column * 28 : (column + 1) * 28] = 40 * (row * 3 + column)
    tiles = cut_tiles(Image.fromarray(picture), Tiling(tile_size=28))
    # The picture has exactly the grid's size, so nothing is resampled but the thumbnail.
    assert [np.asarray(tile).mean() for tile in tiles[:6]] == [0, 40, 80, 120, 160, 200]
    assert len(tiles) == 7
    assert np.asarray(tiles[6]).std() > 40


def test_without_a_thumbnail_there_are_only_the_grids_tiles() -> None:
    image = Image.new("RGB", (200, 50))
    assert len(cut_tiles(image, Tiling(tile_size=28, use_thumbnail=False))) == 4
    assert count_tiles(200, 50, Tiling(use_thumbnail=False)) == 4


def test_palette_images_are_made_rgb_before_they_are_resized() -> None:
    image = Image.fromarray(draw_image(90, 131))
    palette = image.quantize(64)
    got = np.asarray(cut_tiles(palette, Tiling(tile_size=56))[0])
    assert np.array_equal(got, np.asarray(cut_tiles(palette.convert("RGB"), Tiling(tile_size=56))[0]))


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "1", "CMYK"])
def test_every_mode_becomes_rgb_tiles(mode: str) -> None:
    tiles = cut_tiles(Image.new(mode, (60, 30)), Tiling(tile_size=28))
    assert {(tile.mode, tile.size) for tile in tiles} == {("RGB", (28, 28))}


def test_a_minimum_of_tiles_is_kept() -> None:
    assert choose_grid(448, 448, Tiling(min_tiles=4)) == (2, 2)


def test_numbers_that_allow_no_grid_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_tiles 5 and max_tiles 4 allow no grid"):
        Tiling(min_tiles=5, max_tiles=4)
    with pytest.raises(ConfigError, match="min_tiles 0"):
        Tiling(min_tiles=0)
    with pytest.raises(ConfigError, match="tile_size 0"):
        Tiling(tile_size=0)
    with pytest.raises(DataError, match="0 x 5 px"):
        choose_grid(0, 5, Tiling())
