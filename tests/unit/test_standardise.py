from __future__ import annotations

import pytest
import torch

from distill.standardise import FeatureStatistics, StandardiseMode, Standardiser, equalising_rotation


def features(count: int = 4000, dim: int = 12) -> torch.Tensor:
    scales = torch.logspace(-2, 2, dim)
    return torch.randn(count, dim) * scales @ torch.linalg.qr(torch.randn(dim, dim))[0] + 5


def statistics(x: torch.Tensor) -> FeatureStatistics:
    stats = FeatureStatistics(x.shape[-1])
    for part in x.split(700):
        stats.update(part)
    return stats


@pytest.mark.parametrize("mode", ["mean_std", "phi_s"])
def test_standardised_features_have_mean_zero_and_variance_one_in_every_channel(mode) -> None:
    x = features()
    standardiser = Standardiser(mode, x.shape[1])
    standardiser.calibrate(statistics(x))
    y = standardiser(x)
    assert y.mean(0).abs().max() < 1e-2
    assert (y.var(0) - 1).abs().max() < 1e-2


def test_phi_s_keeps_relative_distances() -> None:
    x = features()
    standardiser = Standardiser("phi_s", x.shape[1])
    standardiser.calibrate(statistics(x))
    before, after = torch.pdist(x[:50]), torch.pdist(standardiser(x[:50]))
    ratio = after / before
    assert ratio.std() / ratio.mean() < 1e-4


@pytest.mark.parametrize("dim", [1, 2, 7, 100])
def test_the_equalising_rotation_is_orthogonal_and_equalises(dim: int) -> None:
    eigenvalues = torch.rand(dim) ** 8 * 100
    rotation = equalising_rotation(eigenvalues)
    assert torch.allclose(rotation @ rotation.T, torch.eye(dim, dtype=torch.float64), atol=1e-10)
    diagonal = (rotation @ torch.diag(eigenvalues.double()) @ rotation.T).diagonal()
    assert torch.allclose(diagonal, diagonal.mean().expand(dim), rtol=1e-9)


def test_statistics_from_parts_equal_those_of_the_whole() -> None:
    x = features()
    whole = FeatureStatistics(x.shape[1])
    whole.update(x)
    merged = FeatureStatistics(x.shape[1])
    for part in (x[:1000], x[1000:]):
        merged.merge(*statistics(part).sums())
    for a, b in zip(whole.mean_and_covariance(), merged.mean_and_covariance(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)


def test_a_small_variance_survives_a_large_mean() -> None:
    x = 200 + 0.1 * torch.randn(20_000, 3, dtype=torch.float64).float()
    _, covariance = statistics(x).mean_and_covariance()
    assert covariance.diagonal().tolist() == pytest.approx([0.01] * 3, rel=0.05)


def test_an_uncalibrated_standardiser_refuses_to_run() -> None:
    with pytest.raises(RuntimeError, match="no statistics"):
        Standardiser("mean_std", 4)(torch.zeros(1, 4))


def test_mode_none_changes_nothing_and_holds_nothing() -> None:
    standardiser = Standardiser("none", 4)
    x = torch.randn(1, 4)
    assert standardiser(x) is x
    assert not standardiser.state_dict()
    assert not standardiser.needs_calibration


def test_features_that_are_not_finite_are_refused() -> None:
    stats = FeatureStatistics(2)
    stats.update(torch.tensor([[1.0, float("nan")], [1.0, 2.0]]))
    with pytest.raises(ValueError, match="not finite"):
        stats.mean_and_covariance()


def test_a_dead_channel_is_not_blown_up() -> None:
    x = torch.randn(1000, 3) * torch.tensor([1.0, 1.0, 0.0])
    standardiser = Standardiser("mean_std", 3)
    standardiser.calibrate(statistics(x))
    assert standardiser(x).abs().max() < 10


def beside(teacher: torch.Tensor, student: torch.Tensor) -> FeatureStatistics:
    return statistics(torch.cat([teacher, student], dim=1))


def test_procrustes_undoes_the_rotation_between_a_teacher_and_its_turned_copy() -> None:
    teacher = features()
    turned = (teacher - teacher.mean(0)) @ torch.linalg.qr(torch.randn(12, 12))[0]
    standardiser = Standardiser("procrustes", 12, 12)
    standardiser.calibrate(beside(teacher, 3 * turned + 7))
    y = standardiser(teacher)
    cosine = torch.cosine_similarity(y, turned, dim=1)
    assert cosine.min() > 0.9999
    assert y.var(0).mean() == pytest.approx(1, rel=1e-3)


def test_procrustes_gives_the_students_width_keeps_angles_and_is_as_near_as_a_rotation_can_be() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(4000, 5) @ torch.randn(5, 20) + 3  # 5 of its 20 dimensions are used
    student = teacher @ torch.randn(20, 8) + torch.randn(4000, 8)
    standardiser = Standardiser("procrustes", 20, 8)
    standardiser.calibrate(beside(teacher, student))
    y, own, centred = standardiser(teacher), student - student.mean(0), teacher - teacher.mean(0)
    assert y.shape == (4000, 8)
    wanted = torch.nn.functional.normalize(centred[:50]) @ torch.nn.functional.normalize(centred[:50]).T
    got = torch.nn.functional.normalize(y[:50]) @ torch.nn.functional.normalize(y[:50]).T
    assert torch.allclose(got, wanted, atol=1e-3)
    nearest = (y - own).square().mean()
    for _ in range(20):
        other = y @ torch.linalg.qr(torch.eye(8) + 0.2 * torch.randn(8, 8))[0]
        assert (other - own).square().mean() > nearest


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_whitening_divides_each_direction_by_its_standard_deviation_to_a_power(whitening: float) -> None:
    scales = torch.linspace(0.5, 8, 12)
    turn = torch.linalg.qr(torch.randn(12, 12))[0]
    teacher = torch.randn(20_000, 12) * scales @ turn + 3
    # The student's tokens are the wanted targets themselves: what is nearest to them is what is asked for.
    wanted = (teacher - teacher.mean(0)) @ turn.T * scales.pow(-whitening)
    standardiser = Standardiser("procrustes", 12, 12, whitening)
    standardiser.calibrate(beside(teacher, wanted))
    y = standardiser(teacher)
    assert torch.cosine_similarity(y, wanted, dim=1).min() > 0.99
    assert y.var(0).mean() == pytest.approx(1, rel=1e-3)
    assert torch.allclose(y.std(0) / y.std(0).max(), scales.pow(1 - whitening) / 8 ** (1 - whitening), atol=0.03)


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_whitened_phi_s_has_channels_of_one_variance_and_the_angles_of_whitened_directions(whitening: float) -> None:
    scales = torch.linspace(0.5, 8, 12)
    turn = torch.linalg.qr(torch.randn(12, 12))[0]
    teacher = torch.randn(20_000, 12) * scales @ turn + 3
    standardiser = Standardiser("phi_s", 12, whitening=whitening)
    standardiser.calibrate(statistics(teacher))
    y = standardiser(teacher)
    assert torch.allclose(y.var(0), torch.ones(12), rtol=1e-3)
    wanted = torch.nn.functional.normalize(((teacher - teacher.mean(0)) @ turn.T * scales.pow(-whitening))[:100])
    got = torch.nn.functional.normalize(y[:100])
    assert torch.allclose(got @ got.T, wanted @ wanted.T, atol=0.03)


@pytest.mark.parametrize("mode", ["phi_s", "procrustes"])
def test_whitening_leaves_dead_directions_dead(mode: StandardiseMode) -> None:
    teacher = torch.randn(4000, 6) @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 1e-9, 0.0, 0.0]))
    standardiser = Standardiser(mode, 6, 6, 1.0)
    standardiser.calibrate(beside(teacher, teacher) if mode == "procrustes" else statistics(teacher))
    assert standardiser(teacher).isfinite().all()
    assert int((torch.linalg.svdvals(standardiser(teacher)) > 0.01 * 4000**0.5).sum()) == 3


@pytest.mark.parametrize("mode", ["phi_s", "procrustes"])
def test_directions_that_no_calibration_token_had_do_not_outweigh_the_others(mode: StandardiseMode) -> None:
    few, others = torch.randn(16, 64), torch.randn(4000, 64)
    standardiser = Standardiser(mode, 64, 64, 0.5)
    standardiser.calibrate(beside(few, few) if mode == "procrustes" else statistics(few))
    seen = torch.linalg.svd(few - few.mean(0)).Vh[:15]
    within = (others - few.mean(0)) @ seen.T @ seen + few.mean(0)
    beyond = others - within + few.mean(0)
    ratio = standardiser(beyond).square().sum() / standardiser(within).square().sum()
    assert ratio < 4 * (beyond - few.mean(0)).square().sum() / (within - few.mean(0)).square().sum()


def test_procrustes_places_a_narrower_teacher_in_the_students_channels() -> None:
    teacher = torch.randn(4000, 4) * 5
    student = teacher @ torch.linalg.qr(torch.randn(10, 4))[0].T
    standardiser = Standardiser("procrustes", 4, 10)
    standardiser.calibrate(beside(teacher, student))
    assert standardiser(teacher).shape == (4000, 10)
    assert torch.cosine_similarity(standardiser(teacher), student - student.mean(0), dim=1).min() > 0.999
