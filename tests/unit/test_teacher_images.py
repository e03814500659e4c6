from __future__ import annotations

import pytest
import torch

from teachers.images import as_rgb, check_image_size, normalise_images

MEAN, STD = (0.5, 0.25, 0.0), (0.5, 0.25, 2.0)


def test_each_channel_is_normalised_by_its_own_mean_and_std() -> None:
    images = torch.tensor([1.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    normalised = normalise_images(images, MEAN, STD, torch.float32)
    assert torch.equal(normalised[0, :, 1, 1], torch.tensor([1.0, 1.0, 0.5]))


def test_uint8_and_float_images_give_the_same_numbers() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    from_bytes = normalise_images(images, MEAN, STD, torch.float32)
    assert torch.equal(from_bytes, normalise_images(images / 255, MEAN, STD, torch.float32))


def test_the_arithmetic_is_float32_and_the_cast_comes_last() -> None:
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    half = normalise_images(images, MEAN, STD, torch.bfloat16)
    assert torch.equal(half, normalise_images(images, MEAN, STD, torch.float32).to(torch.bfloat16))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8, 3), (1, 1, 8, 8)])
def test_another_layout_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        normalise_images(torch.zeros(shape), MEAN, STD, torch.float32)


def test_integers_other_than_uint8_are_refused() -> None:
    with pytest.raises(ValueError, match=r"int64.*uint8"):
        normalise_images(torch.zeros(1, 3, 8, 8, dtype=torch.int64), MEAN, STD, torch.float32)


@pytest.mark.parametrize(
    ("height", "width", "advice"), [(450, 448, "use 448 or 462"), (448, 10, "use 14"), (0, 14, "use 14")]
)
def test_a_size_of_no_whole_patches_is_answered_with_the_nearest_that_are(height: int, width: int, advice: str) -> None:
    with pytest.raises(ValueError, match=f"not a multiple of patch_size 14; {advice}"):
        check_image_size(height, width, 14)


@pytest.mark.parametrize("values", [(0.5, 0.5), 0.5, ("a", "b", "c"), None, (0.1, 0.2, 0.3, 0.4)])
def test_a_mean_of_other_than_three_numbers_is_refused_by_name(values: object) -> None:
    with pytest.raises(ValueError, match="image_mean"):
        as_rgb(values, "image_mean")
