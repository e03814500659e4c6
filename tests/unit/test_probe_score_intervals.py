"""Intervals of ratios of sums cover what they promise; scores and differences carry n, seed and ends."""

from __future__ import annotations

import numpy as np
import pytest

from distill.probe.intervals import wilson
from distill.probe.rung import Kind, PerImage, RungScore, figures_of_sums, ratio_of_sums
from distill.probe.score_intervals import figure_interval, paired_entries, parts_of, score_entries

NUM_DRAWS = 300
"""Estimates a coverage of 95 % to 1.3 points (one standard error)."""

BOUNDS = (0.905, 0.99)
"""Percentile bootstraps of a hundred images are a point or two short of 95 %."""


def score(numerator: np.ndarray, denominator: np.ndarray, kind: Kind, groups: np.ndarray | None = None) -> RungScore:
    rows = np.arange(len(numerator))
    parts = PerImage(rows, numerator, denominator, rows if groups is None else groups, rows % 2)
    return RungScore("m", "M", kind, parts, domain_names=("even", "odd"), data="d")


def error_rate(generator: np.random.Generator) -> tuple[RungScore, float]:
    """Edits over characters: long lines have a higher rate, so a mean of ratios would be another figure."""
    lengths = generator.integers(1, 30, size=100).astype(np.float64)
    edits = generator.binomial(lengths.astype(np.int64), 0.1 + 0.01 * lengths).astype(np.float64)
    lines = np.arange(1, 30)
    truth = float((lines * (0.1 + 0.01 * lines)).sum() / lines.sum())
    return score(edits[:, None], lengths[:, None], "error_rate"), truth


def clustered_iou(generator: np.random.Generator) -> tuple[RungScore, float]:
    """Three classes with true IoU 0.3, 0.5 and 0.7, in groups of two images that share their luck."""
    union = generator.integers(20, 60, size=(120, 3)).astype(np.float64)
    luck = np.repeat(generator.normal(0, 0.15, size=(60, 1)), 2, axis=0)
    rate = np.clip(np.array([0.3, 0.5, 0.7]) + luck, 0, 1)
    return score(union * rate, union, "iou", np.repeat(np.arange(60), 2)), 0.5


def explained(generator: np.random.Generator) -> tuple[RungScore, float]:
    """Residual over total variance, 0.36 in truth."""
    signal, noise = generator.normal(0, 0.8, size=150), generator.normal(0, 0.6, size=150)
    return score((noise**2)[:, None], ((signal + noise) ** 2)[:, None], "r2"), 0.64


@pytest.mark.parametrize("draw", [error_rate, clustered_iou, explained])
def test_the_bootstrap_of_a_ratio_of_sums_covers_in_about_95_percent_of_draws(draw: object) -> None:
    assert callable(draw)
    generator = np.random.default_rng(0)
    hits = 0
    for number in range(NUM_DRAWS):
        drawn, truth = draw(generator)
        low, high = figure_interval(drawn, seed=number, num_resamples=400)
        assert low is not None
        assert high is not None
        hits += low <= truth <= high
    assert BOUNDS[0] <= hits / NUM_DRAWS <= BOUNDS[1]


def test_right_or_wrong_answers_get_wilsons_interval() -> None:
    correct = np.random.default_rng(1).random(80) < 0.9
    groups = np.arange(80) // 2
    drawn = score(correct.astype(np.float64)[:, None], np.ones((80, 1)), "accuracy", groups)
    expected = wilson(correct, groups)
    assert figure_interval(drawn, seed=0) == (expected.low, expected.high)


def test_draws_of_the_training_images_widen_the_interval() -> None:
    generator = np.random.default_rng(2)
    # Draws differ by 20 points, which images alone know nothing of.
    draws = (generator.random((5, 400)) < np.linspace(0.5, 0.7, 5)[:, None]).astype(np.float64)
    alone = score(draws.mean(0)[:, None], np.ones((400, 1)), "accuracy")
    drawn = RungScore(**{**vars(alone), "draws": draws})
    low, high = figure_interval(alone, seed=0)
    wide_low, wide_high = figure_interval(drawn, seed=0)
    assert None not in (low, high, wide_low, wide_high)
    assert wide_high - wide_low > 1.5 * (high - low)  # pyright: ignore
    # The mean of five draws that spread over 20 points has a standard error of 3 points, on top of the images' 1.
    assert 0.5 < wide_low < 0.56  # pyright: ignore
    assert 0.64 < wide_high < 0.7  # pyright: ignore


def test_a_calibration_error_adds_up_the_gaps_of_its_bins() -> None:
    numerator = np.array([[0.5, 0.0], [-0.1, 0.0], [0.0, -0.2]])
    denominator = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    # Bin one: |0.5 - 0.1|; bin two: |-0.2|; over three images.
    assert ratio_of_sums(numerator, denominator, "calibration_error") == pytest.approx(0.6 / 3)
    assert np.isnan(figures_of_sums(np.zeros((1, 2)), np.zeros((1, 2)), "iou")).all()
    with pytest.raises(ValueError, match="over nothing"):
        ratio_of_sums(numerator, np.zeros((3, 2)))


def test_scores_have_an_entry_overall_and_for_each_domain_with_n_and_seed() -> None:
    values = np.arange(20) / 20
    entries = score_entries(score(values[:, None], np.ones((20, 1)), "cosine"), seed=7)
    assert [(entry["scope"], entry["n"], entry["seed"]) for entry in entries] == [
        ("overall", 20, 7),
        ("even", 10, 7),
        ("odd", 10, 7),
    ]
    assert entries[1]["value"] == pytest.approx(values[::2].mean())
    for entry in entries:
        assert entry["low"] < entry["value"] < entry["high"]


def test_four_groups_are_too_few_for_an_interval() -> None:
    drawn = score(np.linspace(0, 1, 20)[:, None], np.ones((20, 1)), "cosine", np.arange(20) % 4)
    assert figure_interval(drawn, seed=0) == (None, None)


def test_paired_differences_respect_which_way_is_better_and_refuse_other_images() -> None:
    generator = np.random.default_rng(3)
    base = generator.random((60, 1))
    worse, plain = score(base + 0.2, np.ones((60, 1)), "error_rate"), score(base, np.ones((60, 1)), "error_rate")
    found = paired_entries(worse, plain, ("a", "b"), seed=0)
    assert {entry["verdict"] for entry in found} == {"worse"}
    assert [entry["scope"] for entry in found] == ["overall", "even", "odd"]
    assert found[0]["difference"] == pytest.approx(0.2)
    other = RungScore(**{**vars(plain), "data": "other"})
    assert paired_entries(worse, other, ("a", "b"), seed=0) == []


def test_values_that_are_not_known_leave_their_image_out() -> None:
    at = np.arange(4)
    parts = parts_of(np.array([0.0, np.nan, 1.0, 1.0]), at + 10, at, at)
    assert parts.rows.tolist() == [10, 12, 13]
    assert ratio_of_sums(parts.numerator, parts.denominator) == pytest.approx(2 / 3)
