"""Fidelity: 1 for a linear image of the teacher, 0 for noise and for the mean; CKA keeps its invariances."""

import numpy as np
import pytest
import torch

from distill.probe.fidelity import RidgePath, cosine_centred, cosine_to_itself, debiased_cka
from distill.probe.protocol import Split, split_by_group

N, T, WIDTH = 120, 6, 10


@pytest.fixture
def split() -> Split:
    return split_by_group([""] * N, np.zeros(N, dtype=np.int64), seed=0)


def teacher_tokens(seed: int = 0, width: int = WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, T, width, generator=generator) * torch.linspace(0.2, 3, width) + 2


def test_ridge_of_zero_strength_is_least_squares() -> None:
    x, y = torch.randn(80, 7, dtype=torch.float64), torch.randn(80, 3, dtype=torch.float64)
    torch.testing.assert_close(RidgePath(x, y).weight(0.0), torch.linalg.lstsq(x, y).solution)


def test_ridge_solves_its_normal_equations() -> None:
    x, y = torch.randn(80, 7, dtype=torch.float64), torch.randn(80, 3, dtype=torch.float64)
    gram, strength = x.T @ x, 0.3
    penalty = strength * torch.linalg.eigvalsh(gram).mean() * torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(RidgePath(x, y).weight(strength), torch.linalg.solve(gram + penalty, x.T @ y))


def test_an_invertible_linear_map_of_the_teacher_has_fidelity_one(split: Split) -> None:
    teacher = teacher_tokens()
    mapping = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) + 2 * torch.eye(WIDTH)
    domains = np.arange(N) % 2
    result = cosine_centred(teacher @ mapping - 5, teacher, domains, split)
    assert result.per_image.shape == (len(split.test),)
    assert result.per_image.min() > 0.9999


def test_independent_noise_has_fidelity_zero(split: Split) -> None:
    student = torch.randn(N, T, 30, generator=torch.Generator().manual_seed(2))
    result = cosine_centred(student, teacher_tokens(), np.zeros(N, dtype=np.int64), split)
    # Images are independent here, so the mean over the test part has a standard error of std / sqrt(n).
    assert abs(result.per_image.mean()) < 4 * result.per_image.std() / np.sqrt(len(split.test))


def test_knowing_only_the_domain_earns_nothing(split: Split) -> None:
    domains = np.arange(N) % 2
    offset = torch.from_numpy(domains).float()[:, None, None]
    teacher = teacher_tokens() + 50 * offset
    student = offset.expand(N, T, 4) + 1e-3 * torch.randn(N, T, 4, generator=torch.Generator().manual_seed(3))
    assert abs(cosine_centred(student, teacher, domains, split).per_image.mean()) < 0.1


def test_a_constant_encoder_scores_exactly_zero(split: Split) -> None:
    result = cosine_centred(torch.ones(N, T, 4), teacher_tokens(), np.zeros(N, dtype=np.int64), split)
    assert (result.per_image == 0).all()


def test_half_of_the_teacher_lies_between_noise_and_the_whole(split: Split) -> None:
    generator = torch.Generator().manual_seed(4)
    teacher = torch.randn(N, T, WIDTH, generator=generator)
    result = cosine_centred(teacher[..., : WIDTH // 2], teacher, np.zeros(N, dtype=np.int64), split)
    # Half of the variance is explained, so the cosine is about sqrt(1/2).
    assert result.per_image.mean() == pytest.approx(np.sqrt(0.5), abs=0.03)


def test_a_domain_that_the_fit_split_lacks_is_not_scored() -> None:
    domains = np.zeros(N, dtype=np.int64)
    domains[-1] = 1
    split = Split(np.arange(60), np.arange(60, 90), np.arange(90, N))
    result = cosine_centred(teacher_tokens(), teacher_tokens(), domains, split)
    assert np.isnan(result.per_image[-1])
    assert np.isfinite(result.per_image[:-1]).all()


def test_tokens_of_other_images_are_refused(split: Split) -> None:
    with pytest.raises(ValueError, match="same images"):
        cosine_centred(teacher_tokens()[:-1], teacher_tokens(), np.zeros(N, dtype=np.int64), split)


def cka(a: torch.Tensor, b: torch.Tensor) -> float:
    result = debiased_cka(a, b)
    assert result is not None
    return result.value


def test_cka_is_one_for_rotation_translation_and_scaling() -> None:
    a, b = torch.randn(40, 12, dtype=torch.float64), torch.randn(40, 9, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    assert cka(a, 7 * a @ rotation + 3) == pytest.approx(1.0, abs=1e-9)
    assert cka(a, b) == pytest.approx(cka(b + 11, -0.1 * a @ rotation), abs=1e-9)


def test_cka_of_independent_features_is_zero_although_channels_outnumber_images() -> None:
    values = [cka(*torch.randn(2, 30, 200)) for _ in range(40)]
    plain = torch.randn(2, 30, 200).double()
    centred = plain - plain.mean(1, keepdim=True)
    grams = centred @ centred.transpose(1, 2)
    # The plain estimator calls the same kind of noise alike: the reason for the debiased one.
    assert float((grams[0] * grams[1]).sum() / grams.flatten(1).norm(dim=1).prod()) > 0.5
    assert abs(np.mean(values)) < 0.05


def test_cka_equals_the_unbiased_estimator_written_out_by_hand() -> None:
    a, b = torch.randn(6, 3).double(), torch.randn(6, 4).double()

    def hsic(k: torch.Tensor, m: torch.Tensor) -> float:
        k, m = k - torch.diag(k.diag()), m - torch.diag(m.diag())
        ones, n = torch.ones(len(k), 1, dtype=torch.float64), len(k)
        return float(
            torch.trace(k @ m)
            + (ones.T @ k @ ones) * (ones.T @ m @ ones) / ((n - 1) * (n - 2))
            - 2 / (n - 2) * (ones.T @ k @ m @ ones)
        )

    expected = hsic(a @ a.T, b @ b.T) / np.sqrt(hsic(a @ a.T, a @ a.T) * hsic(b @ b.T, b @ b.T))
    assert cka(a, b) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("views", [1, 4])
def test_the_interval_of_cka_covers_its_value_on_many_images(views: int) -> None:
    mix = torch.randn(6, 8)

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        a = torch.randn(n, 6) * torch.linspace(0.5, 2, 6)
        return a, a @ mix + 3 * torch.randn(n, 8)

    truth = cka(*draw(3000))
    hits = 0
    for _ in range(100):
        a, b = (side.repeat_interleave(views, 0) for side in draw(60))
        # Views of one photograph: nearly the same features, so 60 groups are worth 60 images, not 240.
        a, b = a + 0.01 * torch.randn_like(a), b + 0.01 * torch.randn_like(b)
        result = debiased_cka(a, b, np.repeat(np.arange(60), views))
        assert result is not None
        assert result.low is not None
        assert result.high is not None
        hits += result.low <= truth <= result.high
    # 100 draws tell a coverage of 95 % to 2.2 points (one standard error); the jackknife may lose a few more.
    assert hits >= 86


def test_the_interval_of_cka_is_the_jackknife_over_groups() -> None:
    a, b, groups = torch.randn(24, 5), torch.randn(24, 7), np.repeat(np.arange(8), 3)
    left_out = np.array([cka(a[groups != group], b[groups != group]) for group in range(8)])
    error = np.sqrt(7 / 8 * ((left_out - left_out.mean()) ** 2).sum())
    result = debiased_cka(a, b, groups)
    assert result is not None
    assert result.high is not None
    assert result.high - result.value == pytest.approx(1.959964 * error, rel=1e-6)


def test_cka_has_no_value_for_three_images_or_constant_features_and_no_interval_for_few() -> None:
    assert debiased_cka(torch.randn(3, 4), torch.randn(3, 4)) is None
    assert debiased_cka(torch.ones(10, 4), torch.randn(10, 4)) is None
    few = debiased_cka(torch.randn(12, 4), torch.randn(12, 4), np.arange(12) // 4)
    assert few is not None
    assert (few.low, few.high) == (None, None)
    with pytest.raises(ValueError, match="same images"):
        debiased_cka(torch.randn(4, 2), torch.randn(5, 2))


def test_predicting_the_mean_has_relative_distance_one_and_a_flattering_raw_cosine(split: Split) -> None:
    teacher = teacher_tokens()
    result = cosine_centred(torch.ones(N, T, 4), teacher, np.zeros(N, dtype=np.int64), split)
    assert result.relative_l2 == pytest.approx(np.ones(len(split.test)))
    mean = teacher[torch.from_numpy(split.fit)].mean((0, 1))
    truth = torch.nn.functional.cosine_similarity(teacher[torch.from_numpy(split.test)], mean, dim=-1).mean(1)
    assert result.raw == pytest.approx(truth.numpy(), abs=1e-5)
    assert result.raw.mean() > 0.5


def test_the_relative_distance_is_what_noise_leaves_unexplained(split: Split) -> None:
    teacher = torch.randn(N, T, WIDTH, generator=torch.Generator().manual_seed(8))
    noise = torch.randn(N, T, WIDTH, generator=torch.Generator().manual_seed(9))
    result = cosine_centred(teacher + noise, teacher, np.zeros(N, dtype=np.int64), split)
    # Signal and noise of one size: the best linear map halves the variance.
    assert result.relative_l2.mean() == pytest.approx(0.5**0.5, abs=0.05)


def test_the_ceiling_is_one_without_augmentation_and_falls_with_it(split: Split) -> None:
    teacher, domains = teacher_tokens(), np.arange(N) % 2
    test = torch.from_numpy(split.test)
    same = cosine_to_itself(teacher[test], teacher, domains, split)
    assert (same.per_image.min(), same.raw.min()) == (pytest.approx(1.0), pytest.approx(1.0))
    assert (same.relative_l2.max(), same.strength) == (0.0, None)
    noise = 0.3 * torch.randn(len(test), T, WIDTH, generator=torch.Generator().manual_seed(4))
    changed = cosine_to_itself(teacher[test] + noise, teacher, domains, split)
    norm = teacher[test].sub(teacher_tokens().mean((0, 1))).flatten(1).norm(dim=1)
    assert changed.relative_l2 == pytest.approx((noise.flatten(1).norm(dim=1) / norm).numpy(), rel=0.1)
    assert 0.8 < changed.per_image.mean() < 0.99
