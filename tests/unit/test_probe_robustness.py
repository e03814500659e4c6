"""Robustness: a curve of one fixed classifier over changed images, at chance without knowledge and perfect with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from distill.errors import ConfigError, DataError
from distill.probe.cohort import Cohort
from distill.probe.extraction import Extraction, pool_layer
from distill.probe.probe_set import ProbeSet
from distill.probe.protocol import split_by_group
from distill.probe.robustness import Changes, centre_crop, reencoded, robustness_scores
from distill.probe.rung import RungScore, ratio_of_sums

NUM_IMAGES, NUM_CLASSES = 80, 4
HOW = Extraction(batch_size=8, img_size_px=32)
QUIET = Console(quiet=True)


class DrawnImages:
    """Images whose colour tells their class."""

    def __init__(self, labels: np.ndarray) -> None:
        generator = np.random.default_rng(0)
        colours = np.asarray([(220, 30, 30), (30, 220, 30), (30, 30, 220), (120, 120, 120)])[labels]
        drawn = colours[:, :, None, None] + generator.normal(0, 8, (len(labels), 3, 40, 48))
        self.tensor = torch.from_numpy(drawn.clip(0, 255).astype(np.uint8))

    def pixels(self, row: int) -> Tensor:
        return self.tensor[row]

    def name_of(self, row: int) -> str:
        return str(row)


def probe_set(targets: np.ndarray, colours: np.ndarray | None = None) -> tuple[ProbeSet, Cohort]:
    names, domains = tuple("abcd"), np.arange(NUM_IMAGES) % 2
    groups = tuple(map(str, range(NUM_IMAGES)))
    images = DrawnImages(targets if colours is None else colours)
    data = ProbeSet("drawn", "f" * 8, images, 32, targets, names, domains, ("even", "odd"), groups)
    split = split_by_group(groups, targets, seed=0)
    rows = np.arange(NUM_IMAGES)
    return data, Cohort(targets, names, domains, ("even", "odd"), rows, split, 0, rows, "f" * 8)


def value_of(score: RungScore) -> float:
    return ratio_of_sums(score.per_image.numerator, score.per_image.denominator, score.kind)


def curve(scores: list[RungScore], metric: str, axis: str) -> dict[float, float]:
    return {
        score.at[1]: value_of(score) for score in scores if score.metric == metric and score.at and score.at[0] == axis
    }


LABELS = np.arange(NUM_IMAGES) % NUM_CLASSES


def test_an_encoder_that_sees_the_class_is_right_at_every_point(make_encoder: Callable[..., Any]) -> None:
    data, cohort = probe_set(LABELS)
    scores = robustness_scores(make_encoder(depth=1), HOW, 0, QUIET, cohort, data)
    assert curve(scores, "robust_top1", "resolution_px") == {16.0: 1.0, 32.0: 1.0, 48.0: 1.0, 64.0: 1.0}
    assert curve(scores, "robust_top1", "jpeg_quality") == {75.0: 1.0, 30.0: 1.0, 10.0: 1.0}
    assert curve(scores, "robust_top1", "crop_side") == {0.75: 1.0, 0.5: 1.0}
    assert all(score.data == "f" * 8 and score.domain_names == ("even", "odd") for score in scores)
    assert set(scores[0].per_image.rows.tolist()) == set(cohort.split.test.tolist())


def test_shuffled_labels_are_at_chance_at_every_point(make_encoder: Callable[..., Any]) -> None:
    shuffled = np.random.default_rng(1).permutation(LABELS)
    data, cohort = probe_set(shuffled, colours=LABELS)
    scores = robustness_scores(make_encoder(depth=1), HOW, 0, QUIET, cohort, data)
    n = len(cohort.split.test)
    for score in scores:
        if score.metric == "robust_top1":
            assert abs(value_of(score) - 1 / NUM_CLASSES) < 4 * np.sqrt(0.25 * 0.75 / n)


def test_the_clean_point_moves_no_feature_and_equals_the_given_clean_features(make_encoder: Callable[..., Any]) -> None:
    data, cohort = probe_set(LABELS)
    encoder = make_encoder(depth=1)
    views = torch.stack([data[row]["image"] for row in range(NUM_IMAGES)])
    clean = pool_layer(HOW.hidden_states(HOW.ready(encoder), views)[-1], "mean")  # type: ignore[arg-type]
    changes = Changes(resolutions_px=(32, 16), jpeg_qualities=(10,), crop_sides=())
    given = robustness_scores(encoder, HOW, 0, QUIET, cohort, data, clean, changes)
    taken = robustness_scores(encoder, HOW, 0, QUIET, cohort, data, None, changes)
    assert [value_of(score) for score in given] == pytest.approx([value_of(score) for score in taken], abs=1e-5)
    cosines = curve(given, "robust_cosine", "resolution_px")
    assert cosines[32.0] == pytest.approx(1.0, abs=1e-5)
    assert cosines[16.0] < 1 - 1e-5


def test_cosines_are_of_centred_features(make_encoder: Callable[..., Any]) -> None:
    class Offset(nn.Module):
        """An encoder whose features are mostly a constant: a raw cosine would always be 1."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = make_encoder(depth=1)

        def forward_hidden_states(self, images: Tensor, num_layers: int) -> list[tuple[Tensor, Tensor]]:
            return [(prefix, patches + 100) for prefix, patches in self.inner.forward_hidden_states(images, num_layers)]

    data, cohort = probe_set(LABELS)
    changes = Changes(resolutions_px=(), jpeg_qualities=(1,), crop_sides=())
    plain = robustness_scores(Offset().inner, HOW, 0, QUIET, cohort, data, None, changes)[1]
    torch.manual_seed(0)
    moved = robustness_scores(Offset(), HOW, 0, QUIET, cohort, data, None, changes)[1]
    assert value_of(plain) < 0.999
    assert value_of(moved) < 0.999


def test_a_size_that_is_asked_for_and_refused_is_an_error_and_a_usual_one_is_left_out() -> None:
    data, cohort = probe_set(LABELS)
    encoder = StrictEncoder()
    scores = robustness_scores(encoder, HOW, 0, QUIET, cohort, data)
    assert list(curve(scores, "robust_top1", "resolution_px")) == [32.0, 64.0]
    with pytest.raises(ConfigError, match="refuses images of 48 px: 48 is not"):
        robustness_scores(encoder, HOW, 0, QUIET, cohort, data, None, Changes(resolutions_px=(48,)))


class StrictEncoder(nn.Module):
    """Takes multiples of 32 px alone."""

    def forward_hidden_states(self, images: Tensor, num_layers: int) -> list[tuple[Tensor, Tensor]]:
        if images.shape[-1] % 32:
            raise ValueError(f"{images.shape[-1]} is not a multiple of 32")
        patches = images.float().mean((2, 3))[:, None, None] / 255
        return [(patches.new_zeros(len(images), 0, 3), patches)]


def test_at_most_the_asked_number_of_images_is_taken_and_evenly() -> None:
    data, cohort = probe_set(LABELS)
    changes = Changes(resolutions_px=(32,), jpeg_qualities=(), crop_sides=(), max_images=5)
    rows = robustness_scores(StrictEncoder(), HOW, 0, QUIET, cohort, data, None, changes)[0].per_image.rows
    assert len(rows) == len(set(rows.tolist())) == 5
    assert (rows[0], rows[-1]) == (cohort.split.test[0], cohort.split.test[-1])


def test_one_class_and_features_that_are_not_finite_are_refused() -> None:
    class Broken(StrictEncoder):
        def forward_hidden_states(self, images: Tensor, num_layers: int) -> list[tuple[Tensor, Tensor]]:
            prefix, patches = super().forward_hidden_states(images, num_layers)[0]
            return [(prefix, patches * float("nan"))]

    data, cohort = probe_set(LABELS)
    with pytest.raises(DataError, match="not finite"):
        robustness_scores(Broken(), HOW, 0, QUIET, cohort, data)
    alone = Cohort(**{**vars(cohort), "targets": np.zeros_like(LABELS), "class_names": ("a",)})
    with pytest.raises(DataError, match="two classes"):
        robustness_scores(StrictEncoder(), HOW, 0, QUIET, alone, data)


def test_jpeg_changes_more_at_a_lower_quality_and_a_crop_keeps_the_middle() -> None:
    image = torch.randint(0, 255, (3, 32, 48), dtype=torch.uint8)
    errors = [float((reencoded(image, quality).float() - image.float()).abs().mean()) for quality in (90, 10)]
    assert errors[0] < errors[1]
    assert torch.equal(centre_crop(image, 0.5), image[:, 8:24, 12:36])


@pytest.mark.parametrize(
    "wrong",
    [{"jpeg_qualities": (0,)}, {"crop_sides": (1.0,)}, {"resolutions_px": (0,)}, {"max_images": 0}],
)
def test_changes_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Changes(**wrong)
