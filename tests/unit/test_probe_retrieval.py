"""Retrieval agreement: one for the teacher itself however it is turned, chance for anything else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.probe.retrieval import retrieval_agreement

N = 300


def features(seed: int, width: int = 16) -> torch.Tensor:
    return torch.randn(N, width, generator=torch.Generator().manual_seed(seed))


def test_a_rotated_and_shifted_copy_agrees_in_every_neighbour() -> None:
    teacher = features(0)
    rotation = torch.linalg.qr(features(1)[:16])[0]
    assert retrieval_agreement(3 * teacher @ rotation + 100, teacher) == pytest.approx(np.ones(N))


def test_unrelated_features_agree_by_chance() -> None:
    assert retrieval_agreement(features(2), features(3)).mean() == pytest.approx(10 / (N - 1), abs=0.02)


def test_shares_are_counted_by_hand_for_points_on_a_line() -> None:
    # Directions in the plane by angle; the mean is zero, so centring moves nothing.
    angles = torch.tensor([0.0, 0.1, 0.3, 3.2, 3.3, 3.5]) + 0.0
    teacher = torch.stack([angles.cos(), angles.sin()], 1)
    student = teacher.clone()
    student[[1, 4]] = student[[4, 1]]  # two images change places
    shares = retrieval_agreement(student, teacher, k=2)
    assert set(shares.tolist()) <= {0.0, 0.5, 1.0}
    assert shares.mean() < 0.7
    assert retrieval_agreement(teacher, teacher, k=2).tolist() == [1.0] * 6


def test_few_images_lower_k_and_one_image_has_no_neighbour() -> None:
    assert retrieval_agreement(features(4)[:3], features(5)[:3]).tolist() == [1.0] * 3
    assert np.isnan(retrieval_agreement(features(4)[:1], features(5)[:1])).all()
    with pytest.raises(ValueError, match="3 and 2 images"):
        retrieval_agreement(features(4)[:3], features(5)[:2])
