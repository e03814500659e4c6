"""The rungs on drawn data: an oracle encoder is near perfect, and one that knows nothing is at the baseline."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from distill.errors import ConfigError, DataError
from distill.probe import chart, ocr, segmentation
from distill.probe.drawn import drawn_split, fingerprint
from distill.probe.drawn_charts import FAMILIES, TYPES, ChartSettings, draw_charts
from distill.probe.drawn_shapes import CLASSES, ShapeSettings, draw_scenes
from distill.probe.drawn_text import TextSettings, draw_text_pages
from distill.probe.extraction import Extraction
from distill.probe.rung import RungScore, ratio_of_sums

QUIET = Console(quiet=True)
SHAPES = ShapeSettings(num_images=60, img_size_px=64, num_shapes=3)
CHARTS = ChartSettings(num_charts=240, img_size_px=64)
TEXT = TextSettings(num_pages=60, img_size_px=128, font_sizes_px=(16, 24), max_length=5)
READING = ocr.Reading(epochs=40, batch_lines=16, lr=1e-2, epochs_per_check=10)


class LookupEncoder(nn.Module):
    """Knows the images it is shown, and gives for each the map it was told: an oracle, or noise."""

    image_mean = image_std = (0.5, 0.5, 0.5)
    depth, num_prefix_tokens, patch_size = 1, 0, 1

    def __init__(self, images: Tensor, maps: Tensor) -> None:
        super().__init__()
        self.embed_dim = maps.shape[-1]
        self.layer_dims = (self.embed_dim,)
        self.maps = {image.numpy().tobytes(): each for image, each in zip(images, maps, strict=True)}

    def load_weights(self) -> None:
        """There are none."""

    def forward_hidden_states(self, images: Tensor, num_layers: int) -> list[tuple[Tensor, Tensor]]:
        patches = torch.stack([self.maps[image.numpy().tobytes()] for image in images])
        return [(patches.new_zeros(len(images), 0, self.embed_dim), patches)]


def how(img_size_px: int) -> Extraction:
    return Extraction(batch_size=8, img_size_px=img_size_px)


def value_of(score: RungScore) -> float:
    return ratio_of_sums(score.per_image.numerator, score.per_image.denominator, score.kind)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def mask_maps(masks: Tensor, side: int) -> Tensor:
    """The share of each class in each patch, `[N, side, side, C]`."""
    shares = F.one_hot(masks.long(), len(CLASSES)).permute(0, 3, 1, 2).float()
    return F.adaptive_avg_pool2d(shares, side).permute(0, 2, 3, 1)


def test_an_encoder_that_gives_the_mask_is_segmented_nearly_perfectly() -> None:
    scenes = draw_scenes(SHAPES)
    encoder = LookupEncoder(scenes.images, mask_maps(scenes.masks, 64))
    (score,) = segmentation.segmentation_scores(encoder, how(64), 0, QUIET, SHAPES)
    assert value_of(score) > 0.97
    assert score.per_image.rows.tolist() == drawn_split(60).test.tolist()
    assert score.settings["grid"] == [64, 64]


def test_an_encoder_that_gives_noise_is_at_the_majority_baseline() -> None:
    scenes = draw_scenes(SHAPES)
    encoder = LookupEncoder(scenes.images, noise(60, 8, 8, 6))
    (score,) = segmentation.segmentation_scores(encoder, how(64), 0, QUIET, SHAPES)
    test = scenes.masks[torch.from_numpy(drawn_split(60).test)]
    majority = float((test == 0).double().mean()) / len(CLASSES)
    assert value_of(score) < majority + 0.03
    assert score.blind == pytest.approx(majority)


def test_masks_of_one_class_are_refused() -> None:
    scenes = draw_scenes(SHAPES)
    flat = replace(scenes, masks=torch.zeros_like(scenes.masks))
    with pytest.raises(DataError, match="one class only"):
        segmentation.segment(noise(60, 4, 4, 3), flat, drawn_split(60), segmentation.Segmenting(), 0, "cpu", QUIET)


def written_maps(patch_px: int = 4) -> Tensor:
    """Each character's number, one-hot, in the column of patches under its middle."""
    pages, side = draw_text_pages(TEXT), TEXT.img_size_px // patch_px
    maps = torch.zeros(len(pages.images), side, side, len(TEXT.characters))
    for line in pages.lines:
        room = 0.5 * line.size_px
        left, right = line.box[0] + room, line.box[2] - room
        rows = slice(int(line.box[1] / patch_px), int(line.box[3] / patch_px) + 1)
        for place, character in enumerate(line.text):
            middle = left + (place + 0.5) * (right - left) / len(line.text)
            maps[line.page, rows, int(middle / patch_px), TEXT.characters.index(character)] = 1
    return maps


@pytest.mark.slow
def test_an_encoder_that_gives_the_characters_is_read_nearly_perfectly_at_every_size() -> None:
    pages = draw_text_pages(TEXT)
    scores = ocr.ocr_scores(LookupEncoder(pages.images, written_maps()), how(128), 0, QUIET, pages, READING)
    assert [score.at for score in scores] == [None, ("font_px", 16.0), ("font_px", 24.0)]
    assert all(value_of(score) < 0.05 for score in scores)
    assert scores[0].per_image.rows.tolist() == sorted(
        scores[1].per_image.rows.tolist() + scores[2].per_image.rows.tolist()
    )


@pytest.mark.slow
def test_an_encoder_that_gives_noise_reads_no_better_than_a_constant_guess() -> None:
    pages = draw_text_pages(TEXT)
    encoder = LookupEncoder(pages.images, noise(60, 16, 16, 6))
    score = ocr.ocr_scores(encoder, how(128), 0, QUIET, pages, replace(READING, epochs=10))[0]
    texts = [pages.lines[row].text for row in score.per_image.rows]
    guesses = ["", *("7" * length for length in range(1, 6))]
    best = min(ocr.edit_distances([guess] * len(texts), texts).sum() for guess in guesses) / sum(map(len, texts))
    assert score.blind is not None
    assert best - 0.05 < score.blind < 1
    assert value_of(score) > score.blind - 0.1


def value_maps(values: np.ndarray, types: Tensor) -> Tensor:
    """Type and values in every cell, `[N, 2, 2, 12]`."""
    tokens = torch.cat([F.one_hot(types, len(TYPES)).float(), torch.from_numpy(values).float()], dim=1)
    return tokens[:, None, None].expand(-1, 2, 2, -1).clone()


def test_an_encoder_that_gives_type_and_values_is_read_perfectly() -> None:
    charts = draw_charts(CHARTS)
    encoder = LookupEncoder(charts.images, value_maps(charts.values, charts.types))
    top1, r2, error = chart.chart_scores(encoder, how(64), 0, QUIET, CHARTS)
    assert value_of(top1) == 1.0
    assert value_of(r2) > 0.999
    assert value_of(error) < 0.01
    assert r2.domain_names == tuple(FAMILIES)
    assert set(np.unique(r2.per_image.domains).tolist()) == {0, 1, 2}


def test_an_encoder_that_gives_noise_has_chance_accuracy_and_no_variance_explained() -> None:
    charts = draw_charts(CHARTS)
    encoder = LookupEncoder(charts.images, noise(240, 4, 4, 6))
    top1, r2, error = chart.chart_scores(encoder, how(64), 0, QUIET, CHARTS)
    chance = 1 / len(TYPES)
    assert top1.blind == pytest.approx(chance)
    assert error.blind == pytest.approx(value_of(error), rel=0.1)
    assert abs(value_of(top1) - chance) < 4 * np.sqrt(chance * (1 - chance) / len(top1.per_image.rows))
    assert value_of(r2) <= 0.02


def test_a_size_that_the_encoder_refuses_is_named() -> None:
    class Refusing(LookupEncoder):
        def forward_hidden_states(self, images: Tensor, num_layers: int) -> list[tuple[Tensor, Tensor]]:
            raise ValueError("64 is not a multiple of 7")

    charts = draw_charts(CHARTS)
    with pytest.raises(ConfigError, match=r"64 x 64 px: 64 is not a multiple of 7"):
        chart.chart_scores(Refusing(charts.images, noise(240, 1, 1, 2)), how(64), 0, QUIET, CHARTS)


def test_a_larger_drawn_set_begins_with_the_smaller_one() -> None:
    small, large = draw_charts(replace(CHARTS, num_charts=80)), draw_charts(replace(CHARTS, num_charts=88))
    assert torch.equal(small.images, large.images[:80])
    assert np.array_equal(small.values, large.values[:80])
    few = draw_scenes(replace(SHAPES, num_images=10))
    assert torch.equal(few.masks, draw_scenes(replace(SHAPES, num_images=12)).masks[:10])


def test_another_seed_draws_other_images_and_is_another_data_set() -> None:
    other = replace(TEXT, seed=1)
    assert not torch.equal(draw_text_pages(other).images, draw_text_pages(TEXT).images)
    assert fingerprint("text", other) != fingerprint("text", TEXT)
    assert draw_text_pages(TEXT).data == fingerprint("text", TEXT)


def test_every_part_of_the_split_has_every_chart_type() -> None:
    split = drawn_split(240 // len(TYPES), np.arange(240) // len(TYPES))
    counts = [np.bincount(part % len(TYPES)).tolist() for part in (split.fit, split.select, split.test)]
    assert counts == [[15] * 8, [6] * 8, [9] * 8]


def test_values_of_a_chart_are_where_they_are_drawn() -> None:
    charts = draw_charts(replace(CHARTS, img_size_px=448))
    # A bar chart's bars are the columns of pixels that differ from the ground; the tallest bar has the largest value.
    for number in range(0, 80, len(TYPES)):
        image = charts.images[number].int()
        ground = image[:, 2, 2]
        heights = []
        for place in range(4):
            x = int(58 + (place + 0.5) / 4 * 348)
            heights.append(int(((image[:, :, x] - ground[:, None]).abs().sum(0) > 60).sum()))
        assert int(np.argmax(heights)) == int(charts.values[number].argmax())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ChartSettings(num_charts=79), "num_charts is 79"),
        (lambda: ShapeSettings(img_size_px=16), "img_size_px is 16"),
        (lambda: ShapeSettings(num_shapes=0), "num_shapes is 0"),
        (lambda: TextSettings(characters="777"), "two different characters"),
        (lambda: TextSettings(font_sizes_px=(60,)), "font_sizes_px"),
        (lambda: TextSettings(min_length=5, max_length=4), "min_length is 5"),
        (lambda: ocr.Reading(epochs=0), "epochs 0"),
        (lambda: segmentation.Segmenting(lr=0.0), "lr 0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(build: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()  # type: ignore[operator]
