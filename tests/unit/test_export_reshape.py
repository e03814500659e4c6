"""Depth, image size and LayerScale changed on export: the same features where the change is exact, else refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distill.encoder import Layer, TimmLayoutEncoder
from distill.errors import ConfigError, ExportError
from distill.export.reshape import Changes, ReshapedEncoder, fold_layer_scale, reshape
from distill.export.run import as_timm_layout
from students import CLIPViT, InternViT, TimmStudent

SIZES = {"img_size": 56, "embed_dim": 32, "depth": 3, "num_heads": 2}
TOLERANCE = 2e-6  # a few float32 steps of features near 1


def noisy(student: nn.Module) -> TimmLayoutEncoder:
    encoder = as_timm_layout(student)
    encoder.load_weights()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(0.0, 0.2)
    student.eval()
    return encoder


def layers_of(encoder: TimmLayoutEncoder, num_layers: int, side: int = 56) -> list[Layer]:
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return encoder.forward_hidden_states(images, num_layers)


def assert_equal(got: list[Layer], expected: list[Layer], tolerance: float = 0.0) -> None:
    for (prefix, patches), (expected_prefix, expected_patches) in zip(got, expected, strict=True):
        assert torch.allclose(prefix, expected_prefix, rtol=0, atol=tolerance)
        assert torch.allclose(patches, expected_patches, rtol=0, atol=tolerance)


@pytest.mark.parametrize("student_class", [InternViT, CLIPViT])
def test_keeping_two_layers_gives_the_hidden_states_of_the_first_two(student_class: Any) -> None:
    student = noisy(student_class(weights="random", **SIZES))
    cut = reshape(student, Changes(layers=2))
    assert (cut.depth, cut.layer_dims, cut.timm_model_args["depth"]) == (2, (32, 32), 2)
    assert_equal(layers_of(cut, 2), layers_of(student, 3)[:2], TOLERANCE)


@pytest.mark.parametrize("student_class", [InternViT, CLIPViT])
@pytest.mark.parametrize("side", [28, 84])
def test_positions_resized_on_export_are_what_the_student_computes_at_that_size(student_class: Any, side: int) -> None:
    student = noisy(student_class(weights="random", **SIZES))
    resized = reshape(student, Changes(img_size=side))
    assert resized.img_size == side
    assert resized.timm_state_dict()["pos_embed"].shape == (1, 1 + (side // 14) ** 2, 32)
    assert_equal(layers_of(resized, 3, side), layers_of(student, 3, side), TOLERANCE)


def test_folding_layer_scale_leaves_ones_and_the_same_features() -> None:
    student = noisy(InternViT(weights="random", **SIZES))
    folded = reshape(student, Changes(fold_layer_scale=True))
    state = folded.timm_state_dict()
    assert all(torch.equal(state[key], torch.ones(32)) for key in state if key.endswith("gamma"))
    assert not torch.equal(state["blocks.0.attn.proj.weight"], student.timm_state_dict()["blocks.0.attn.proj.weight"])
    assert_equal(layers_of(folded, 3), layers_of(student, 3), 1e-5)


def test_all_changes_at_once_are_those_of_each() -> None:
    student = noisy(InternViT(weights="random", **SIZES))
    changed = reshape(student, Changes(layers=2, img_size=28, fold_layer_scale=True))
    assert isinstance(changed, ReshapedEncoder)
    assert (changed.original_depth, changed.original_img_size) == (3, 56)
    assert_equal(layers_of(changed, 1, 28), layers_of(student, 2, 28)[:1], 1e-5)


def test_changes_that_change_nothing_return_the_student_itself() -> None:
    student = noisy(InternViT(weights="random", **SIZES))
    assert reshape(student, Changes(layers=3, img_size=56)) is student


def test_the_student_itself_is_left_as_it_is() -> None:
    student = noisy(InternViT(weights="random", **SIZES))
    before = {key: value.clone() for key, value in student.timm_state_dict().items()}
    reshape(student, Changes(layers=1, img_size=28, fold_layer_scale=True))
    assert all(torch.equal(value, before[key]) for key, value in student.timm_state_dict().items())
    weights = dict(student.timm_state_dict())
    fold_layer_scale(weights)
    assert all(torch.equal(value, before[key]) for key, value in weights.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (Changes(layers=4), r"--layers 4 is out of range: this student has 1 to 3 layers"),
        (Changes(layers=0), r"--layers 0 is out of range"),
        (Changes(img_size=60), r"--img_size 60 is no multiple of the patch size 14; use 56 or 70"),
        (Changes(img_size=0), r"--img_size 0 is no multiple"),
    ],
)
def test_numbers_out_of_range_are_refused_by_the_flags_name(changes: Changes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reshape(noisy(InternViT(weights="random", **SIZES)), changes)


def test_what_a_student_does_not_have_is_refused() -> None:
    with pytest.raises(ExportError, match="no LayerScale"):
        reshape(noisy(CLIPViT(weights="random", **SIZES)), Changes(fold_layer_scale=True))
    convolutional = noisy(TimmStudent("test_efficientnet", weights="random", img_size=64))
    with pytest.raises(ExportError, match="--layers needs a plain vision transformer"):
        reshape(convolutional, Changes(layers=2))
    with pytest.raises(ExportError, match="no LayerScale"):
        fold_layer_scale({"blocks.0.attn.proj.weight": torch.ones(2, 2)})


def test_a_convolutional_student_is_exported_at_another_size_with_the_same_weights() -> None:
    student = noisy(TimmStudent("test_efficientnet", weights="random", img_size=64))
    larger = reshape(student, Changes(img_size=96))
    assert larger.img_size == 96
    assert_equal(layers_of(larger, 1, 96), layers_of(student, 1, 96), TOLERANCE)


class Shuffled(ReshapedEncoder):
    """A changed encoder that gives other features than its weights."""

    def forward_hidden_states(self, images: torch.Tensor, num_layers: int) -> list[Layer]:
        return [
            (prefix, patches.roll(1, dims=1)) for prefix, patches in super().forward_hidden_states(images, num_layers)
        ]


@pytest.mark.parametrize("changes", [Changes(layers=2), Changes(img_size=28), Changes(fold_layer_scale=True)])
def test_a_change_that_computes_other_features_than_the_student_is_refused(
    changes: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.export.reshape.ReshapedEncoder", Shuffled)
    with pytest.raises(ExportError, match=r"block 1 differs from the student's by .* is allowed"):
        reshape(noisy(InternViT(weights="random", **SIZES)), changes)


def test_positions_resized_by_another_filter_than_the_students_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm import layers

    resample: Any = layers.resample_abs_pos_embed
    student = noisy(InternViT(weights="random", **SIZES))
    other: Any = lambda *args, **options: resample(*args, **{**options, "interpolation": "nearest", "antialias": False})  # noqa: E731
    monkeypatch.setattr(layers, "resample_abs_pos_embed", other)
    with pytest.raises(ExportError, match="differs from the student's"):
        reshape(student, Changes(img_size=28))
