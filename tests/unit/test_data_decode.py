"""Decoding equals Pillow's within 60 dB, keeps its limits, and training's randomness comes from (seed, place) alone."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distill.data.decode import MAX_SCANNED_PIXELS, decode_image
from distill.data.image_header import ImageError
from distill.data.randomness import generator_for
from distill.data.transforms import Augmentation, augment, square_view
from distill.errors import ConfigError, DataError

MIN_PSNR_DB = 60
"""Rounding in the uint8 resize: about 63 dB on photographs of 500 x 375, where another kernel or no antialiasing gives
40."""


def picture(width: int = 500, height: int = 375, seed: int = 0) -> Image.Image:
    """Smooth colours, edges and some noise: the content of photographs and charts."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 17 + y / 29), np.cos(x / 41), np.sin(y / 13)], axis=-1) * 80 + 128
    waves[(x // 40 + y // 30) % 5 == 0] = (250, 240, 20)
    return Image.fromarray((waves + rng.normal(0, 4, waves.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reference(data: bytes, size_px: int = 448) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize((size_px, size_px), Image.Resampling.BICUBIC))


def psnr_db(view: Tensor, expected: np.ndarray) -> float:
    error = np.mean((view.permute(1, 2, 0).numpy().astype(float) - expected) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@pytest.mark.parametrize("size", [(500, 375), (1200, 900), (300, 700), (200, 100)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_view_is_within_60_db_of_pillow(size: tuple[int, int], kind: str) -> None:
    data = encoded(picture(*size), kind, quality=92)
    view = square_view(decode_image(data), 448)
    assert view.shape == (3, 448, 448)
    assert view.dtype == torch.uint8
    assert view.permute(1, 2, 0).is_contiguous()
    assert psnr_db(view, reference(data)) >= MIN_PSNR_DB


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1"])
def test_every_colour_mode_becomes_rgb_as_in_pillow(mode: str) -> None:
    kind = "JPEG" if mode in ("L", "CMYK") else "PNG"
    data = encoded(picture(120, 90).convert(mode), kind)
    image = decode_image(data)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.mode == mode
        expected = np.asarray(opened.convert("RGB"))
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_a_palette_with_transparency_keeps_its_colours_without_a_warning() -> None:
    image = picture(60, 40).convert("P")
    data = encoded(image, "PNG", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode_image(data)
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))


def test_grey_of_16_bits_is_scaled_and_not_clipped() -> None:
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    decoded = decode_image(encoded(Image.fromarray(grey), "PNG"))
    assert np.array_equal(decoded[0].numpy(), grey >> 8)


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(80, 40), "JPEG", exif=exif)
    assert decode_image(data).shape == (3, 40, 80)


def test_a_jpeg_decodes_into_channels_last_memory() -> None:
    image = decode_image(encoded(picture(80, 40), "JPEG"))
    assert image.stride() == (1, 80 * 3, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.3, 0.9, 0.99])
def test_a_truncated_image_is_an_error(kind: str, part: float) -> None:
    data = encoded(picture(200, 150), kind)
    with pytest.raises(ImageError):
        decode_image(data[: int(len(data) * part)])


@pytest.mark.parametrize("data", [b"", b"GIF89a" + bytes(100), b"%PDF-1.4 ", b"\xff\xd8\xff" + bytes(500), bytes(1000)])
def test_what_is_no_allowed_image_is_an_error(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode_image(data)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_formats_beyond_the_three_are_not_even_tried(kind: str) -> None:
    with pytest.raises(ImageError, match="no readable JPEG, PNG or WebP header"):
        decode_image(encoded(picture(20, 20), kind))


def png_bomb(side_px: int) -> bytes:
    """A valid PNG of a few kilobytes that announces a huge image."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side_px, side_px, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min(side_px + 1, 10_000) * 100), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side_px", [8_001, 13_000, 60_000])
def test_a_pixel_bomb_is_refused_from_its_header(side_px: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="64,000,000 pixels"):
            decode_image(png_bomb(side_px))


def progressive_bomb(side_px: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan is written again and again: small, and slow to decode."""
    data = encoded(Image.new("RGB", (side_px, side_px), (9, 80, 200)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def test_a_jpeg_of_too_many_scans_is_refused_before_decoding() -> None:
    bomb = progressive_bomb(2000, 400)
    assert len(bomb) < 10 << 20
    with pytest.raises(ImageError, match="scans of 4,000,000 pixels"):
        decode_image(bomb)


def test_progressive_jpegs_of_usual_encoders_decode_at_any_allowed_size() -> None:
    small = decode_image(encoded(picture(300, 200), "JPEG", progressive=True))
    assert small.shape == (3, 200, 300)
    large = encoded(Image.new("RGB", (8000, 8000)), "JPEG", progressive=True)
    assert large.count(b"\xff\xda") * 64_000_000 <= MAX_SCANNED_PIXELS


@pytest.mark.parametrize(("size", "expected"), [((2000, 1500), (1000, 750)), ((800, 600), (800, 600))])
def test_scaled_decoding_halves_large_jpegs_and_leaves_small_ones(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    data = encoded(picture(*size), "JPEG", quality=92)
    image = decode_image(data, min_size_px=448)
    assert image.shape == (3, expected[1], expected[0])
    assert psnr_db(square_view(image, 448), reference(data)) >= 35


def test_scaled_decoding_leaves_png_as_it_is() -> None:
    data = encoded(picture(2000, 1500), "PNG")
    assert torch.equal(decode_image(data, min_size_px=448), decode_image(data))


def test_a_bad_image_is_a_data_error() -> None:
    assert issubclass(ImageError, DataError)


def test_augmentation_depends_on_seed_and_place_alone() -> None:
    image = decode_image(encoded(picture(200, 150), "JPEG"))
    config = Augmentation(crop_scale_min=0.5, horizontal_flip=True)

    def view(seed: int, place: int) -> Tensor:
        return square_view(augment(image, config, generator_for(seed, place, 0)), 64)

    expected = view(3, 7)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global state must not matter
    assert torch.equal(view(3, 7), expected)
    others = [view(3, 8), view(4, 7), view(3, 10**12)]
    assert all(not torch.equal(other, expected) for other in others)


def test_augmentation_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    augment(torch.zeros(3, 9, 9, dtype=torch.uint8), Augmentation(crop_scale_min=0.5), generator_for(0, 0, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_and_places_give_independent_numbers() -> None:
    draws = {generator_for(seed, place, stream).random() for seed in (0, 1) for place in range(50) for stream in (0, 1)}
    assert len(draws) == 200


def test_reencoding_changes_an_image_as_a_jpeg_of_quality_75_to_100_would() -> None:
    image = decode_image(encoded(picture(200, 150), "PNG"))
    distances = []
    for place in range(20):
        changed = augment(image, Augmentation(), generator_for(0, place, 0))
        assert changed.shape == image.shape
        distances.append(float((changed.float() - image.float()).abs().mean()))
    assert 0 < min(distances) < max(distances) < 10


def test_without_augmentation_an_image_stays_as_it_is() -> None:
    image = decode_image(encoded(picture(50, 40), "PNG"))
    assert torch.equal(augment(image, Augmentation(reencode="none"), generator_for(0, 0, 0)), image)


def test_flips_mirror_half_of_the_images() -> None:
    image = decode_image(encoded(picture(30, 20), "PNG"))
    config = Augmentation(reencode="none", horizontal_flip=True)
    flipped = [not torch.equal(augment(image, config, generator_for(0, place, 0)), image) for place in range(200)]
    assert 70 < sum(flipped) < 130


def test_crops_keep_at_least_the_given_area() -> None:
    image = torch.zeros(3, 300, 400, dtype=torch.uint8)
    config = Augmentation(reencode="none", crop_scale_min=0.25)
    areas = []
    for place in range(200):
        cropped = augment(image, config, generator_for(0, place, 0))
        areas.append(cropped.shape[1] * cropped.shape[2] / (300 * 400))
    assert 0.24 < min(areas) < 0.35
    assert 0.8 < max(areas) <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (3, 2)])
def test_tiny_images_make_a_view(size: tuple[int, int]) -> None:
    image = decode_image(encoded(picture(*size), "PNG"))
    config = Augmentation(crop_scale_min=0.1, horizontal_flip=True)
    assert square_view(augment(image, config, generator_for(0, 0, 0)), 448).shape == (3, 448, 448)


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.5, float("nan")])
def test_a_crop_scale_out_of_range_names_its_key(scale: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.augment\.crop_scale_min"):
        Augmentation(crop_scale_min=scale)
