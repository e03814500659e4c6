"""Each target, in this process: what is written, what is refused, what the consumer's class makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from distill.encoder import TimmLayoutEncoder
from distill.errors import ConfigError, ExportError
from distill.export.golden import compute_golden, draw_image
from distill.export.run import as_timm_layout
from distill.export.targets import TARGETS, find_target
from students import CLIPViT, InternViT, TimmStudent

TOLERANCE = 1e-5  # the bound that an export is held to, float32
SIZES = {"img_size": 56, "embed_dim": 32, "depth": 3, "num_heads": 2}


def randomised(student: nn.Module) -> TimmLayoutEncoder:
    """Load and replace all weights by noise: first weights of ones and zeros would hide exchanged tensors."""
    encoder = as_timm_layout(student)
    encoder.load_weights()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(0.0, 0.2)
    student.eval()
    return encoder


def make_student(layout: str) -> TimmLayoutEncoder:
    if layout == "internvit":
        return randomised(InternViT(weights="random", **SIZES))
    if layout == "clip":
        return randomised(CLIPViT(weights="random", **SIZES))
    return randomised(TimmStudent("test_efficientnet", weights="random", img_size=64))


ALLOWED = [("internvl-hf", "internvit"), ("clip-hf", "clip"), ("timm", "internvit"), ("timm", "clip"), ("timm", "timm")]


@pytest.mark.parametrize(("format", "layout"), ALLOWED)
def test_the_consumers_own_class_reproduces_the_last_two_layers(format: str, layout: str, tmp_path: Path) -> None:
    student, target = make_student(layout), find_target(format)
    target.write(student, tmp_path)
    golden = compute_golden(student, format)
    got = target.consumer_features(tmp_path, "float32", golden.preprocessing.normalise(golden.image), 2)
    assert (got.missing, got.unexpected) == ([], [])
    for (prefix, patches), (expected_prefix, expected_patches) in zip(got.layers, golden.layers, strict=True):
        assert torch.allclose(prefix, expected_prefix, rtol=0, atol=TOLERANCE)
        assert torch.allclose(patches, expected_patches, rtol=0, atol=TOLERANCE)
    # Noise weights must make the check worth something: the two layers differ, and so do the tokens.
    assert golden.layers[-1][1].std() > 0.1


@pytest.mark.parametrize(("format", "layout"), ALLOWED)
def test_the_consumers_preprocessing_squashes_to_the_students_size_with_its_mean_and_std(
    format: str, layout: str, tmp_path: Path
) -> None:
    student, target = make_student(layout), find_target(format)
    target.write(student, tmp_path)
    picture = Image.fromarray(draw_image(90, 131))
    pixels = target.consumer_pixels(tmp_path, picture)
    expected = compute_golden(student, format).preprocessing.prepare(picture)
    levels = (pixels - expected).abs() * 255 * torch.tensor(student.image_std).view(3, 1, 1)
    assert pixels.shape == (1, 3, student.img_size, student.img_size)
    assert levels.max() <= 4  # torchvision and Pillow round bicubic differently
    assert levels.mean() <= 0.25


def test_clip_keys_carry_the_prefix_that_transformers_4_needs(tmp_path: Path) -> None:
    find_target("clip-hf").write(make_student("clip"), tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert keys
    assert all(key.startswith("vision_model.") for key in keys)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["image_size"] == 56  # LLaVA divides it: a pair would crash
    assert (config["hidden_act"], config["layer_norm_eps"]) == ("quick_gelu", 1e-5)


def test_internvl_config_spells_out_what_the_class_would_get_wrong_by_default(tmp_path: Path) -> None:
    find_target("internvl-hf").write(make_student("internvit"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["attention_bias"] is True
    assert config["use_mean_pooling"] is True
    assert (config["hidden_act"], config["layer_norm_eps"]) == ("gelu", 1e-6)
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.485, 0.456, 0.406]
    assert processor["size"] == {"height": 56, "width": 56}


def test_automodel_and_autoimageprocessor_read_the_timm_directory_too(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel

    student = make_student("internvit")
    find_target("timm").write(student, tmp_path)
    picture = Image.fromarray(draw_image(70, 50))
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"]
    model = AutoModel.from_pretrained(tmp_path).eval()
    expected = compute_golden(student, "timm").preprocessing.prepare(picture)
    assert torch.allclose(pixels, expected, atol=1e-5)
    with torch.inference_mode():
        own = student.forward_hidden_states(
            torch.from_numpy(draw_image(56, 56)).permute(2, 0, 1).unsqueeze(0), num_layers=1
        )
        golden = compute_golden(student, "timm")
        got = model(golden.preprocessing.normalise(golden.image)).last_hidden_state
    assert torch.allclose(got[:, 1:].unflatten(1, (4, 4)), own[0][1], rtol=0, atol=TOLERANCE)


class InternViTByName(TimmStudent):
    """An InternViT-layout student with further arguments of timm's model."""

    layout = "internvit"


def internvit_with(**model_args: object) -> TimmLayoutEncoder:
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, **model_args}
    return randomised(InternViTByName("vit_intern300m_patch14_448", weights="random", img_size=56, model_args=sizes))


def test_the_activation_that_the_student_has_is_the_one_that_is_written(tmp_path: Path) -> None:
    student, target = internvit_with(act_layer="quick_gelu"), find_target("internvl-hf")
    target.write(student, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_act"] == "quick_gelu"
    golden = compute_golden(student, "internvl-hf")
    got = target.consumer_features(tmp_path, "float32", golden.preprocessing.normalise(golden.image), 1)
    assert torch.allclose(got.layers[-1][1], golden.layers[-1][1], rtol=0, atol=TOLERANCE)


def test_an_activation_without_a_name_in_transformers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"The activation Mish .* known are gelu, gelu_pytorch_tanh, quick_gelu"):
        find_target("internvl-hf").write(internvit_with(act_layer="mish"), tmp_path)


REFUSED = [
    ("clip-hf", "internvit", "LayerNorm"),
    ("clip-hf", "timm", "nothing else"),
    ("internvl-hf", "clip", "clip-hf or timm"),
    ("internvl-hf", "timm", "nothing else"),
]


@pytest.mark.parametrize(("format", "layout", "reason"), REFUSED)
def test_a_layout_that_cannot_be_written_so_is_refused_with_the_reason(
    format: str, layout: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=f"'{layout}' layout cannot be exported as {format}.*{reason}"):
        find_target(format).write(make_student(layout), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_refused_with_the_list_of_formats() -> None:
    with pytest.raises(ConfigError, match="'mlx'; choose from internvl, internvl-hf, .*timm, .*or all"):
        find_target("mlx")
    assert list(TARGETS) == [target.FORMAT for target in TARGETS.values()]


def test_a_weight_without_a_place_in_the_consumer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no place for 8 weights.*blocks\.0\.attn\.k_norm"):
        find_target("internvl-hf").write(internvit_with(qk_norm=True), tmp_path)


class WrongGridStudent(InternViT):
    """Says another image size than its positions are for."""

    img_size = 112


def test_positions_of_another_grid_are_refused_because_consumers_resize_differently(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="has 17 rows, img_size 112 at patch 14 needs 65"):
        find_target("internvl-hf").write(randomised(WrongGridStudent(weights="random", **SIZES)), tmp_path)


class PartialStudent(InternViT):
    """Hides one weight."""

    def timm_state_dict(self) -> dict[str, torch.Tensor]:
        state = super().timm_state_dict()
        del state["blocks.1.mlp.fc1.bias"]
        return state


@pytest.mark.parametrize("format", ["internvl-hf", "timm"])
def test_a_student_that_withholds_a_weight_is_refused(format: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"missing \['blocks\.1\.mlp\.fc1\.bias'\]"):
        find_target(format).write(randomised(PartialStudent(weights="random", **SIZES)), tmp_path)


def test_weights_that_are_not_float32_or_not_finite_are_refused(tmp_path: Path) -> None:
    half = InternViT(weights="random", **SIZES)
    randomised(half)
    with pytest.raises(ExportError, match=r"float16; exports are written in float32"):
        find_target("timm").write(as_timm_layout(half.half()), tmp_path)
    broken = InternViT(weights="random", **SIZES)
    randomised(broken)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(ExportError, match="not finite: this student diverged"):
        find_target("timm").write(as_timm_layout(broken), tmp_path)


def test_a_module_that_does_not_tell_its_timm_weights_is_refused() -> None:
    with pytest.raises(ExportError, match=r"Linear cannot be exported: it lacks layout, timm_architecture"):
        as_timm_layout(nn.Linear(2, 2))


def test_golden_features_are_refused_in_training_mode_and_before_the_weights_are_read() -> None:
    student = InternViT(weights="random", **SIZES)
    student.load_weights()
    with pytest.raises(ExportError, match="in training mode"):
        compute_golden(as_timm_layout(student.train()), "timm")
    with pytest.raises(ExportError, match="on meta"):
        compute_golden(as_timm_layout(InternViT(weights="random", **SIZES).eval()), "timm")


def test_the_golden_picture_is_the_same_on_every_machine() -> None:
    picture = draw_image(56, 70)
    assert picture.shape == (56, 70, 3)
    assert int(picture.astype("int64").sum()) == 1_426_240
    assert picture.std() > 40
