"""Extraction: the pooled vectors and tokens are the encoder's own, in order, and damaged input is named or counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.errors import ConfigError, DataError
from distill.probe.features import Samples, extract, grid_of

SIZE = 32


class Images:
    """Random uint8 images; the rows in `bad` cannot be decoded."""

    def __init__(self, n: int, bad: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(256, (n, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        self.bad = bad

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.bad:
            raise DataError(f"natural-000000.tar: member {index}.jpg is truncated.")
        return {"image": self.images[index], "label": index % 3, "domain": index % 2, "row": index}


class Poisoned(nn.Module):
    """An encoder whose features of black images are NaN."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.num_prefix_tokens = encoder, 1

    def forward_hidden_states(self, images: Tensor, num_layers: int) -> list[tuple[Tensor, Tensor]]:
        layers = self.encoder.forward_hidden_states(images, num_layers)
        black = images.flatten(1).sum(1) == 0
        return [(p, torch.where(black[:, None, None, None], torch.nan, x)) for p, x in layers]


def last_layer(encoder: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return encoder.forward_hidden_states(images, 1)[-1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pooled_features_are_the_encoders_in_the_data_sets_order(
    make_encoder: Callable[..., nn.Module], num_workers: int
) -> None:
    encoder, images = make_encoder(), Images(10)
    features = extract(encoder, images, batch_size=4, num_workers=num_workers)
    prefix, patches = last_layer(encoder, images.images)
    assert features.pooled.dtype == torch.float32
    torch.testing.assert_close(features.pooled, patches.mean((1, 2)))
    assert features.rows.tolist() == list(range(10))
    assert features.labels.tolist() == [row % 3 for row in range(10)]
    assert features.domains.tolist() == [row % 2 for row in range(10)]
    first = extract(encoder, images, batch_size=4, pool="prefix").pooled
    torch.testing.assert_close(first, prefix[:, 0])
    both = extract(encoder, images, batch_size=4, pool="mean_prefix").pooled
    torch.testing.assert_close(both, torch.cat([features.pooled, first], dim=1))


def test_tokens_are_at_the_same_places_for_every_encoder_and_batch_size(
    make_encoder: Callable[..., nn.Module],
) -> None:
    fine, coarse, images = make_encoder(patch_size=8), make_encoder(patch_size=16), Images(6)
    options: dict[str, Any] = {"token_grids": [(2, 2)], "tokens_per_image": 3}
    first = extract(coarse, images, batch_size=2, **options).tokens[2, 2]
    assert first.shape == (6, 3, 8)
    torch.testing.assert_close(extract(coarse, images, batch_size=3, **options).tokens[2, 2], first)
    pooled = F.adaptive_avg_pool2d(last_layer(fine, images.images)[1].permute(0, 3, 1, 2), 2).flatten(2).mT
    own = last_layer(coarse, images.images)[1].flatten(1, 2)
    other = extract(fine, images, batch_size=2, **options).tokens[2, 2]
    for image in range(6):
        places = [int((own[image] - token).abs().sum(1).argmin()) for token in first[image]]
        assert len(set(places)) == 3
        torch.testing.assert_close(other[image], pooled[image, places])


def test_bfloat16_stays_near_float32_and_is_stored_as_float32(make_encoder: Callable[..., nn.Module]) -> None:
    encoder, images = make_encoder(), Images(4)
    exact = extract(encoder, images, batch_size=4).pooled
    rounded = extract(encoder, images, batch_size=4, precision="bfloat16").pooled
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    # bfloat16 keeps 8 bits: 0.4 % an operation, over four operations.
    torch.testing.assert_close(rounded, exact, rtol=0.03, atol=0.03)


def test_a_bad_image_is_left_out_and_counted(make_encoder: Callable[..., nn.Module]) -> None:
    features = extract(make_encoder(), Images(10, bad=(3,)), batch_size=4, token_grids=[(1, 1)])
    assert features.num_bad == 1
    assert features.rows.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert len(features.pooled) == len(features.labels) == len(features.tokens[1, 1]) == 9


def test_more_than_one_percent_of_bad_images_stop_the_probe_with_the_first_name(
    make_encoder: Callable[..., nn.Module],
) -> None:
    with pytest.raises(DataError, match=r"2 of 10 images.*1\.jpg is truncated"):
        extract(make_encoder(), Images(10, bad=(1, 4)), batch_size=4)


@pytest.mark.parametrize(("images", "message"), [(Images(1, bad=(0,)), "0.jpg is truncated"), (Images(0), "is empty")])
def test_no_readable_image_is_refused(make_encoder: Callable[..., nn.Module], images: Samples, message: str) -> None:
    with pytest.raises(DataError, match=message):
        extract(make_encoder(), images, batch_size=1)


def test_features_that_are_not_finite_are_refused_with_the_row(make_encoder: Callable[..., nn.Module]) -> None:
    images = Images(6)
    images.images[4] = 0
    with pytest.raises(DataError, match="bad_student gives features that are not finite for 1 image.*row 4"):
        extract(Poisoned(make_encoder()), images, batch_size=6, name="bad_student")


@pytest.mark.parametrize("pool", ["prefix", "mean_prefix"])
def test_prefix_pooling_without_prefix_tokens_is_refused(make_encoder: Callable[..., nn.Module], pool: Any) -> None:
    with pytest.raises(ConfigError, match="needs a class token"):
        extract(make_encoder(num_prefix_tokens=0), Images(2), batch_size=2, pool=pool)


def test_a_grid_finer_than_the_encoders_is_refused(make_encoder: Callable[..., nn.Module]) -> None:
    with pytest.raises(ConfigError, match="finer"):
        extract(make_encoder(), Images(2), batch_size=2, token_grids=[(5, 4)])


def test_extraction_needs_no_gradient_and_leaves_the_encoder_in_eval_mode(
    make_encoder: Callable[..., nn.Module],
) -> None:
    encoder = make_encoder().train()
    assert not extract(encoder, Images(2), batch_size=2).pooled.requires_grad
    assert not encoder.training


def test_grid_of_tells_rows_and_columns(make_encoder: Callable[..., nn.Module]) -> None:
    assert grid_of(make_encoder(patch_size=8), 40) == (5, 5)
