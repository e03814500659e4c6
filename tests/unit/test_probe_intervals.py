"""Intervals cover what they promise, independent or clustered, and verdicts follow from them."""

import numpy as np
import pytest

from distill.probe.intervals import bootstrap_mean, paired_difference, wilson

# 400 draws estimate a coverage of 95 % to 1.1 points (one standard error); small clusters cost a few points more.
NUM_DRAWS = 400


def test_wilson_has_the_textbook_value_for_nine_of_ten() -> None:
    interval = wilson(np.arange(10) > 0)
    # Newcombe 1998: 0.9 of 10 has the 95 % score interval 0.5958 to 0.9821.
    assert (interval.mean, interval.n) == (0.9, 10)
    assert (interval.low, interval.high) == pytest.approx((0.5958, 0.9821), abs=1e-4)


@pytest.mark.parametrize("accuracy", [0.2, 0.5, 0.95])
def test_wilson_covers_the_true_accuracy_in_about_95_percent_of_draws(accuracy: float) -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(NUM_DRAWS):
        interval = wilson(generator.random(120) < accuracy)
        hits += interval.low <= accuracy <= interval.high
    assert 0.92 <= hits / NUM_DRAWS <= 0.985


def test_clustered_wilson_covers_where_the_plain_one_is_too_narrow() -> None:
    generator = np.random.default_rng(1)
    groups = np.repeat(np.arange(40), 5)
    plain_hits = clustered_hits = 0
    for _ in range(NUM_DRAWS):
        correct = np.repeat(generator.random(40) < 0.7, 5)
        plain, clustered = wilson(correct), wilson(correct, groups)
        plain_hits += plain.low <= 0.7 <= plain.high
        clustered_hits += clustered.low <= 0.7 <= clustered.high
    assert plain_hits / NUM_DRAWS < 0.8
    assert 0.91 <= clustered_hits / NUM_DRAWS <= 0.99


def test_wilson_of_a_perfect_score_is_not_a_point_and_counts_groups() -> None:
    alone, grouped = wilson(np.ones(20, dtype=bool)), wilson(np.ones(20, dtype=bool), np.arange(20) // 5)
    assert alone.high == grouped.high == 1.0
    assert grouped.low < alone.low < 1.0
    # All right of 4 groups: the score interval's lower end is 4 / (4 + z^2).
    assert grouped.low == pytest.approx(4 / (4 + 1.959964**2), abs=1e-6)


@pytest.mark.parametrize("clustered", [False, True])
def test_bootstrap_covers_the_true_mean_in_about_95_percent_of_draws(clustered: bool) -> None:
    generator = np.random.default_rng(2)
    hits = 0
    for draw in range(NUM_DRAWS):
        shared = generator.normal(size=60)
        values = np.repeat(shared, 3) + 0.3 * generator.normal(size=180) if clustered else generator.normal(size=100)
        groups = np.repeat(np.arange(60), 3) if clustered else None
        interval = bootstrap_mean(values, groups, seed=draw, num_resamples=400)
        hits += interval.low <= 0 <= interval.high
    assert 0.91 <= hits / NUM_DRAWS <= 0.985


def test_bootstrap_of_clusters_of_unequal_size_keeps_the_mean_over_images() -> None:
    values, groups = np.array([1.0, 1.0, 1.0, 0.0]), np.array([0, 0, 0, 1])
    interval = bootstrap_mean(values, groups)
    assert interval.mean == 0.75
    assert (interval.low, interval.high, interval.n) == (0.0, 1.0, 4)


def test_the_same_seed_gives_the_same_interval_and_blocks_do_not_change_its_size() -> None:
    values = np.random.default_rng(3).normal(size=5000)
    first, again = bootstrap_mean(values, seed=4), bootstrap_mean(values, seed=4)
    assert first == again
    # The interval of a mean is 2 * 1.96 / sqrt(n) wide.
    assert first.high - first.low == pytest.approx(2 * 1.96 / np.sqrt(5000), rel=0.1)


def test_verdicts_follow_from_the_interval() -> None:
    generator = np.random.default_rng(5)
    base = generator.normal(size=200)
    noise = 0.1 * generator.normal(size=200)
    assert paired_difference(base + 0.1 + noise, base)[1] == "better"
    assert paired_difference(base - 0.1 + noise, base)[1] == "worse"
    assert paired_difference(base, base)[1] == "not distinguishable"


def test_a_verdict_is_wrong_in_at_most_about_5_percent_of_equal_pairs() -> None:
    generator = np.random.default_rng(6)
    false_verdicts = 0
    for draw in range(NUM_DRAWS):
        a, b = generator.random((2, 150)) < 0.6
        false_verdicts += paired_difference(a, b, seed=draw)[1] != "not distinguishable"
    assert false_verdicts / NUM_DRAWS <= 0.09


def test_an_empty_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="no image"):
        wilson(np.zeros(0, dtype=bool))
    with pytest.raises(ValueError, match="no image"):
        bootstrap_mean(np.zeros(0))
