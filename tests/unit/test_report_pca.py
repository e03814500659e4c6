"""Maps of several encoders share one basis: the same features get the same colours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.report.pca import fit_basis, fit_map, shared_maps

# Ridge with the smallest strength, 1e-7 of the mean eigenvalue, shrinks by about as much.
COLOUR_TOLERANCE = 1e-3


def random_maps(images: int = 8, side: int = 6, dim: int = 12) -> Tensor:
    scales = torch.linspace(3.0, 0.5, dim)
    return torch.randn(images, side, side, dim) * scales + 5.0


def test_an_encoder_equal_to_the_teacher_gets_identical_maps() -> None:
    teacher = random_maps()
    own, other = shared_maps(teacher, [teacher.clone()], [0, 1])
    torch.testing.assert_close(own.colours, other.colours, atol=COLOUR_TOLERANCE, rtol=0)
    assert other.agreement == pytest.approx((1.0, 1.0), abs=1e-5)


def test_an_invertible_linear_change_of_the_teacher_of_another_width_changes_no_colour() -> None:
    teacher = random_maps()
    wider = teacher @ torch.randn(12, 20) - 3.0
    own, other = shared_maps(teacher, [wider], [0])
    torch.testing.assert_close(own.colours, other.colours, atol=COLOUR_TOLERANCE, rtol=0)


def test_an_encoder_that_knows_nothing_gets_one_even_tone() -> None:
    teacher = random_maps()
    own, other = shared_maps(teacher, [torch.ones(8, 6, 6, 5)], [0, 1])
    assert other.colours.std((0, 1, 2)).max() < 1e-6
    assert own.colours.std((0, 1, 2)).min() > 0.1
    assert max(other.agreement) < 0.2


def test_unrelated_features_agree_less_than_related_ones() -> None:
    teacher = random_maps()
    noisy, unrelated = teacher + torch.randn_like(teacher), torch.randn_like(teacher)
    _, near, far = shared_maps(teacher, [noisy, unrelated], [0, 1])
    assert min(near.agreement) > 0.7
    assert max(far.agreement) < 0.3


def test_colours_span_the_whole_range_of_the_teacher_on_every_axis() -> None:
    colours = fit_basis(random_maps()).colours(random_maps())
    assert colours.min() == 0
    assert colours.max() == 1
    assert colours.shape == (8, 6, 6, 3)
    assert colours.flatten(0, 2).std(0).min() > 0.1


def test_axes_are_the_directions_of_largest_variance_with_a_fixed_sign() -> None:
    teacher = torch.randn(4, 5, 5, 4) * torch.tensor([0.1, 4.0, 1.0, 2.0])
    axes = fit_basis(teacher).axes
    assert axes.abs().argmax(0).tolist() == [1, 3, 2]
    assert (axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_coarser_or_finer_grid_is_mapped_on_its_own_grid() -> None:
    teacher = random_maps(side=6)
    finer = teacher.repeat_interleave(2, 1).repeat_interleave(2, 2)
    own, other = shared_maps(teacher, [finer], [0])
    assert other.colours.shape == (1, 12, 12, 3)
    torch.testing.assert_close(other.colours[:, ::2, ::2], own.colours, atol=COLOUR_TOLERANCE, rtol=0)


def test_the_linear_map_is_not_fitted_on_the_shown_images() -> None:
    teacher, student = random_maps(), random_maps(dim=9)
    first = shared_maps(teacher, [student], [0])[1]
    student_elsewhere = student.clone()
    student_elsewhere[0] = student[1]
    # With other features in the shown image the map stays the same map: the colours are those of image 1 under it.
    shown = shared_maps(teacher, [student_elsewhere], [0])[1]
    expected = fit_basis(teacher).colours(fit_map(student[1:], teacher[1:])(student[1:2]))
    torch.testing.assert_close(shown.colours, expected)
    assert not torch.equal(first.colours, shown.colours)


def test_when_every_image_is_shown_the_maps_are_fitted_on_them() -> None:
    teacher = random_maps(images=2)
    own, other = shared_maps(teacher, [teacher.clone()], [0, 1])
    torch.testing.assert_close(own.colours, other.colours, atol=COLOUR_TOLERANCE, rtol=0)


def test_a_teacher_of_one_channel_is_shown_on_one_axis() -> None:
    colours = shared_maps(random_maps(dim=1), [], [0])[0].colours
    assert colours[..., 0].std() > 0.1
    torch.testing.assert_close(colours[..., 1:], torch.full((1, 6, 6, 2), 0.5))


def test_maps_of_different_images_are_refused() -> None:
    with pytest.raises(ValueError, match="7 and 8"):
        shared_maps(random_maps(), [random_maps(images=7)], [0])
    with pytest.raises(ValueError, match="one or more"):
        fit_map(random_maps()[:0], random_maps()[:0])
