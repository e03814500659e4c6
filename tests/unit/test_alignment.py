from __future__ import annotations

import pytest
import torch

from distill.alignment import Alignment, AlignmentConfig, describe
from distill.errors import ConfigError
from distill.losses import MSE, TokenGram


def config(**changes) -> AlignmentConfig:
    return AlignmentConfig(**{"student": "s", "teacher": "t", "num_layers": 2, **changes})


def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)


def test_the_loss_is_the_weighted_mean_of_its_layers(make_encoder) -> None:
    student, teacher = make_encoder(8), make_encoder(20)
    alignment = Alignment(config(layer_weights=[1.0, 3.0]), student, teacher)
    x = images()
    values = alignment(student.forward_hidden_states(x, 2), teacher.forward_hidden_states(x, 2))
    assert set(values) == {"loss", "loss/layer_-2", "loss/layer_-1"}
    expected = 0.25 * values["loss/layer_-2"] + 0.75 * values["loss/layer_-1"]
    assert torch.allclose(values["loss"], expected)
    assert -1 <= values["loss"].item() <= 1


def test_grids_of_different_patch_sizes_are_matched(make_encoder) -> None:
    student, teacher = make_encoder(8, patch_size=8), make_encoder(20, patch_size=4)
    alignment = Alignment(config(), student, teacher)
    x = images()
    pairs = alignment.tokens(student.forward_hidden_states(x, 2), teacher.forward_hidden_states(x, 2))
    assert [(a.shape, b.shape) for a, b in pairs] == [((2, 16, 20), (2, 16, 20))] * 2


def test_prefix_tokens_count_by_their_weight(make_encoder) -> None:
    student, teacher = make_encoder(8), make_encoder(20)
    x = images()
    layers = student.forward_hidden_states(x, 1), teacher.forward_hidden_states(x, 1)
    alignment = Alignment(config(num_layers=1, prefix_weight=0.0), student, teacher)
    patch = alignment(*layers)["loss"].item()
    alignment.config.prefix_weight = 1.0
    prefix = alignment(*layers)["loss"].item()
    alignment.config.prefix_weight = 0.25
    assert alignment(*layers)["loss"].item() == pytest.approx(0.75 * patch + 0.25 * prefix, abs=1e-6)
    assert patch != pytest.approx(prefix)


def test_a_convolutional_teacher_without_prefix_tokens_is_compared_on_patches_alone(make_encoder) -> None:
    student, teacher = make_encoder(8), make_encoder(20, num_prefix_tokens=0)
    alignment = Alignment(config(prefix_weight=1.0), student, teacher)
    x = images()
    values = alignment(student.forward_hidden_states(x, 2), teacher.forward_hidden_states(x, 2))
    assert torch.isfinite(values["loss"])


def test_gradients_reach_student_and_heads_but_not_the_teacher(make_encoder) -> None:
    student, teacher = make_encoder(8), make_encoder(20)
    alignment = Alignment(config(), student, teacher)
    x = images()
    alignment(student.forward_hidden_states(x, 2), teacher.forward_hidden_states(x, 2))["loss"].backward()
    assert all(p.grad is not None for p in alignment.parameters())
    assert student.patch.weight.grad is not None
    assert all(p.grad is None for p in teacher.parameters())


def test_the_gram_loss_needs_no_head_and_takes_two_widths(make_encoder) -> None:
    student, teacher = make_encoder(8), make_encoder(20)
    alignment = Alignment(config(loss=TokenGram(), head="none"), student, teacher)
    assert not list(alignment.parameters())
    assert not alignment.has_comparable_tokens
    x = images()
    assert alignment(student.forward_hidden_states(x, 2), teacher.forward_hidden_states(x, 2))["loss"] > 0


def test_standardised_targets_need_calibration_first(make_encoder) -> None:
    student, teacher = make_encoder(8), make_encoder(20)
    alignment = Alignment(config(loss=MSE(), standardise="phi_s"), student, teacher)
    x = images()
    layers = student.forward_hidden_states(x, 2), teacher.forward_hidden_states(x, 2)
    assert alignment.needs_calibration
    with pytest.raises(RuntimeError, match="no statistics"):
        alignment(*layers)
    statistics = alignment.new_statistics()
    alignment.observe(statistics, None, layers[1], torch.tensor([True, False]))
    assert statistics[0].count == layers[1][0][1][0, ..., 0].numel()
    alignment.calibrate(statistics)
    assert not alignment.needs_calibration
    assert torch.isfinite(alignment(*layers)["loss"])
    assert "standardisers.0.rotation" in alignment.state_dict()


def test_targets_of_the_students_width_need_no_head_whatever_the_teachers_width_and_grid(make_encoder) -> None:
    student, teacher = make_encoder(8, patch_size=8), make_encoder(20, patch_size=4)
    alignment = Alignment(config(head="none", standardise="procrustes"), student, teacher)
    assert not list(alignment.parameters())
    x = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    layers = student.forward_hidden_states(x, 2), teacher.forward_hidden_states(x, 2)
    statistics = alignment.new_statistics()
    alignment.observe(statistics, *layers, torch.arange(16) > 0)
    assert statistics[0].count == 15 * 16
    alignment.calibrate(statistics)
    assert [target.shape for _, target in alignment.tokens(*layers)] == [(16, 16, 8)] * 2
    nearest = alignment(*layers)["loss/layer_-1"]
    turned = torch.linalg.qr(torch.randn(8, 8))[0]
    alignment.standardisers[1].rotation.copy_(turned @ alignment.standardisers[1].rotation)
    assert alignment(*layers)["loss/layer_-1"] > nearest + 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 4}, r"num_layers 4 must be from 1 to 3"),
        ({"num_layers": 0}, r"num_layers 0"),
        ({"prefix_weight": 1.5}, r"prefix_weight 1.5"),
        ({"layer_weights": [1.0]}, r"layer_weights \[1.0\] must be 2 numbers"),
        ({"layer_weights": [0.0, 0.0]}, r"not all zero"),
        ({"head": "none"}, r"head none needs equal widths"),
        ({"loss": TokenGram()}, r"use head none"),
        ({"standardise": "procrustes"}, r"procrustes gives targets of the student's width; use head none"),
        ({"standardise": "mean_std", "whitening": 0.5}, r"is for standardise phi_s and procrustes, not mean_std"),
        ({"standardise": "procrustes", "head": "none", "whitening": 1.5}, r"whitening 1\.5 must be from 0 to 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(make_encoder, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Alignment(config(**changes), make_encoder(8), make_encoder(20))


def test_the_description_holds_plain_values() -> None:
    assert describe(config())["loss"] == "NegativeCosine"
