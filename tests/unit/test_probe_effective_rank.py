"""Effective rank: what it is for known covariances, what it does not depend on, and its interval."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.probe.effective_rank import effective_rank

VARIANCES = torch.linspace(0.2, 3, 20, dtype=torch.float64)
TRUTH = float(VARIANCES.sum() ** 2 / VARIANCES.square().sum())


def draw(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, len(VARIANCES), dtype=torch.float64, generator=generator) * VARIANCES.sqrt() + 5


def rank_of(features: torch.Tensor) -> float:
    found = effective_rank(features)
    assert found is not None
    return found.value


def test_it_is_the_participation_ratio_and_few_images_do_not_make_it_smaller() -> None:
    assert rank_of(draw(4000, 0)) == pytest.approx(TRUTH, rel=0.02)
    few = [rank_of(draw(30, seed)) for seed in range(60)]
    assert np.median(few) == pytest.approx(TRUTH, rel=0.05)
    # The plain form of the same draws is far below.
    plain = []
    for seed in range(60):
        values = torch.linalg.eigvalsh(torch.cov(draw(30, seed).T))
        plain.append(float(values.sum() ** 2 / values.square().sum()))
    assert np.median(plain) < 0.75 * TRUTH


def test_a_line_has_one_direction_and_rotation_translation_and_scale_change_nothing() -> None:
    line = draw(50, 1)[:, :1] * torch.ones(1, 6, dtype=torch.float64)
    assert rank_of(line) == pytest.approx(1.0, rel=0.1)
    features = draw(200, 2)
    rotation = torch.linalg.qr(draw(20, 3)).Q
    assert rank_of(-7 * features @ rotation + 100) == pytest.approx(rank_of(features), rel=1e-9)


def test_a_few_large_directions_are_all_that_counts() -> None:
    features = draw(500, 4)
    stretched = features.clone()
    stretched[:, :2] *= 100
    assert rank_of(stretched) < 2.2 < rank_of(features)


def test_the_interval_holds_the_truth_and_leaves_out_whole_groups() -> None:
    hits = 0
    for seed in range(60):
        found = effective_rank(draw(200, seed))
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= TRUTH <= found.high
    assert hits >= 51
    # Each image three times over: intervals that took the copies for images of their own would be too narrow.
    features, groups = draw(100, 5).repeat_interleave(3, 0), np.repeat(np.arange(100), 3)
    grouped, single = effective_rank(features, groups), effective_rank(features)
    assert grouped is not None
    assert single is not None
    assert grouped.high is not None
    assert single.high is not None
    assert grouped.high - grouped.value > 1.3 * (single.high - single.value)


def test_there_is_no_value_for_three_images_or_constant_features_and_no_interval_for_few_groups() -> None:
    assert effective_rank(torch.randn(3, 4)) is None
    assert effective_rank(torch.ones(10, 4)) is None
    few = effective_rank(draw(12, 6), np.arange(12) // 4)
    assert few is not None
    assert (few.low, few.high) == (None, None)
