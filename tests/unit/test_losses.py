from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from distill.losses import (
    MSE,
    MeanCosine,
    NegativeCosine,
    SmoothL1,
    TokenGram,
    WeightedSum,
    centred_mean_cosine,
    mean_cosine,
    mse,
    negative_cosine,
    smooth_l1,
    token_cosine,
    token_gram,
)

BF16_TOLERANCE = 2e-2  # inputs rounded to 8 mantissa bits move a cosine of 32 channels by about 1/256 a channel


def tokens(dim: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_negative_cosine_is_minus_one_for_equal_directions() -> None:
    x = tokens()
    assert negative_cosine(3 * x, x).item() == pytest.approx(-1.0, abs=1e-6)


def test_negative_cosine_is_one_for_opposite_directions() -> None:
    x = tokens()
    assert negative_cosine(-x, x).item() == pytest.approx(1.0, abs=1e-6)


def test_negative_cosine_of_a_right_angle_and_of_45_degrees_is_known_by_hand() -> None:
    student = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    teacher = torch.tensor([[[0.0, 2.0], [3.0, 0.0]]])
    assert negative_cosine(student, teacher).item() == pytest.approx(-math.sqrt(0.5) / 2)


def test_negative_cosine_ignores_the_scale_of_either_side() -> None:
    x, y = tokens(seed=1), tokens(seed=2)
    assert torch.allclose(negative_cosine(x, y), negative_cosine(7 * x, 0.1 * y), atol=1e-6)


def test_an_all_zero_token_has_cosine_zero_not_nan() -> None:
    assert token_cosine(torch.zeros(1, 1, 4), torch.ones(1, 1, 4)).item() == 0.0


def test_mean_cosine_sees_the_mean_over_tokens_alone() -> None:
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    swapped = teacher[:, [1, 0]]
    assert mean_cosine(swapped, teacher).item() == pytest.approx(-1.0)
    assert negative_cosine(swapped, teacher).item() == pytest.approx(-0.5)
    away = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 3.0], [0.0, 0.0]]])
    assert mean_cosine(away, teacher).item() == pytest.approx(-math.sqrt(0.5) / 2)  # 45 degrees, then a right angle


def test_smooth_l1_is_quadratic_inside_beta_and_linear_outside() -> None:
    zero = torch.zeros(1, 1, 2)
    assert smooth_l1(torch.tensor([[[0.5, 3.0]]]), zero).item() == pytest.approx((0.125 + 2.5) / 2)


def test_mse_is_the_mean_square() -> None:
    assert mse(torch.tensor([[[1.0, 3.0]]]), torch.zeros(1, 1, 2)).item() == pytest.approx(5.0)


def test_token_gram_is_zero_for_any_rotation_of_the_teacher_and_takes_two_widths() -> None:
    x = tokens(dim=16)
    rotation, _ = torch.linalg.qr(torch.randn(16, 16))
    assert token_gram(x @ rotation, x).item() == pytest.approx(0.0, abs=1e-10)
    assert token_gram(torch.nn.functional.pad(x, (0, 8)), x).item() == pytest.approx(0.0, abs=1e-10)


def test_token_gram_of_orthogonal_against_equal_tokens_is_one_half() -> None:
    assert token_gram(torch.eye(2)[None], torch.ones(1, 2, 3)).item() == pytest.approx(0.5)


@pytest.mark.parametrize("loss", [negative_cosine, mean_cosine, centred_mean_cosine, smooth_l1, mse, token_gram])
def test_no_gradient_reaches_the_teacher(loss) -> None:
    student, teacher = tokens(seed=1).requires_grad_(), tokens(seed=2).requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", [negative_cosine, mean_cosine, centred_mean_cosine, smooth_l1, mse, token_gram])
def test_gradients_agree_with_finite_differences(loss, monkeypatch: pytest.MonkeyPatch) -> None:
    # The losses compute in float32; gradcheck needs float64.
    monkeypatch.setattr(Tensor, "float", lambda self: self)
    student = tokens(dim=6, seed=1, dtype=torch.float64).requires_grad_()
    teacher = tokens(dim=6, seed=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), (student,))


@pytest.mark.parametrize("loss", [negative_cosine, mean_cosine, centred_mean_cosine, smooth_l1, mse, token_gram])
def test_bfloat16_inputs_under_autocast_give_the_float32_loss_within_rounding(loss) -> None:
    student, teacher = tokens(seed=1), tokens(seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student.bfloat16(), teacher.bfloat16())
    assert value.dtype == torch.float32
    assert torch.allclose(value, loss(student, teacher), rtol=BF16_TOLERANCE, atol=BF16_TOLERANCE)


def test_a_weighted_sum_adds_its_terms() -> None:
    x, y = tokens(seed=1), tokens(seed=2)
    value = WeightedSum([NegativeCosine(), SmoothL1()], [0.9, 0.1]).compute(x, y)
    assert torch.allclose(value, 0.9 * negative_cosine(x, y) + 0.1 * smooth_l1(x, y))


def test_a_recipe_adds_the_mean_over_tokens_to_the_token_loss() -> None:
    x, y = tokens(seed=1), tokens(seed=2)
    value = WeightedSum([NegativeCosine(), MeanCosine()], [1.0, 0.5]).compute(x, y)
    assert torch.allclose(value, negative_cosine(x, y) + 0.5 * mean_cosine(x, y))


def test_a_centred_mean_sees_differences_between_images_alone() -> None:
    x, y = tokens(seed=1), tokens(seed=2)
    own, target = (values.mean(1) - values.mean((0, 1)) for values in (x, y))
    wanted = -torch.cosine_similarity(own, target, dim=-1).mean()
    assert torch.allclose(centred_mean_cosine(x, y), wanted, atol=1e-6)
    shared = 5 * torch.randn(x.shape[-1])
    assert torch.allclose(centred_mean_cosine(x + shared, y - shared), wanted, atol=1e-5)
    assert not torch.allclose(mean_cosine(x + shared, y), mean_cosine(x, y), atol=1e-2)
    assert torch.equal(MeanCosine(centred=True).compute(x, y), centred_mean_cosine(x, y))


def test_a_batch_of_one_image_is_not_centred() -> None:
    x, y = tokens(seed=1)[:1], tokens(seed=2)[:1]
    assert torch.equal(centred_mean_cosine(x, y), mean_cosine(x, y))


def test_a_weighted_sum_refuses_a_missing_weight() -> None:
    with pytest.raises(ValueError, match="one weight for each"):
        WeightedSum([NegativeCosine(), MSE()], [1.0])


def test_only_the_gram_loss_works_without_a_head() -> None:
    assert not TokenGram().needs_head
    assert WeightedSum([TokenGram()], [1.0]).needs_head is False
    assert WeightedSum([TokenGram(), MSE()], [1.0, 1.0]).needs_head is True


def test_importing_the_losses_loads_no_lightning() -> None:
    code = "import sys, distill.losses; sys.exit('lightning' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
