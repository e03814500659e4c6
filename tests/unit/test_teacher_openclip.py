from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from teachers import OpenClipTeacher

TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
NATIVE = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 56, "layers": 3, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": TEXT,
}
TIMM = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear"},
    "text_cfg": TEXT,
}
RESNET = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "head_width": 8},
    "text_cfg": TEXT,
}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def write_directory(
    directory: Path, model_cfg: dict[str, Any], *, weights: str = "open_clip_model.safetensors"
) -> nn.Module:
    """Write a directory as open_clip publishes models, and return the model itself."""
    directory.mkdir(exist_ok=True)
    config = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(7)
    model = open_clip.create_model(f"local-dir:{directory}", load_weights=False).eval()
    path = directory / weights
    save_file(model.state_dict(), path) if path.suffix == ".safetensors" else torch.save(model.state_dict(), path)
    return model


def loaded(model_name: str | None, weights: object, **arguments: Any) -> OpenClipTeacher:
    teacher = OpenClipTeacher(model_name, weights=str(weights), **arguments)
    teacher.load_weights()
    return teacher


def pixels(size: int) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def normalised(images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize(
    ("config", "size", "layer_dims", "prefix", "patch_size"),
    [
        (NATIVE, 56, (32,) * 3, 1, 14),
        (TIMM, 160, (64,) * 6, 1, 16),
        (RESNET, 64, (8, 32, 64, 128, 256), 0, 32),
    ],
    ids=["native", "timm", "resnet"],
)
def test_hidden_states_are_those_of_open_clips_own_tower(
    tmp_path: Path,
    config: dict[str, Any],
    size: int,
    layer_dims: tuple[int, ...],
    prefix: int,
    patch_size: int,
    weights: str,
) -> None:
    model = write_directory(tmp_path, config, weights=weights)
    teacher = loaded(None, tmp_path)
    assert (teacher.layer_dims, teacher.num_prefix_tokens, teacher.patch_size) == (layer_dims, prefix, patch_size)
    extra = {"output_extra_tokens": True} if prefix else {}
    with torch.no_grad():
        reference = model.visual.forward_intermediates(normalised(pixels(size)), intermediates_only=True, **extra)
    ours = teacher.forward_hidden_states(pixels(size), teacher.depth)
    for (_, patches), expected in zip(ours, reference["image_intermediates"], strict=True):
        torch.testing.assert_close(patches, expected.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)
    if prefix:
        torch.testing.assert_close(ours[-1][0], reference["image_intermediates_prefix"][-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [NATIVE, TIMM, RESNET], ids=["native", "timm", "resnet"])
def test_no_tensor_of_the_text_tower_is_ever_there(tmp_path: Path, config: dict[str, Any]) -> None:
    model = write_directory(tmp_path, config)
    teacher = OpenClipTeacher(weights=str(tmp_path))
    assert all(p.is_meta for p in teacher.parameters())
    teacher.load_weights()
    assert {n.removeprefix("visual.") for n in teacher.state_dict()} == set(model.visual.state_dict())


def test_the_image_tower_alone_loads_too(tmp_path: Path) -> None:
    model = write_directory(tmp_path, NATIVE)
    save_file(model.visual.state_dict(), tmp_path / "tower.safetensors")
    alone = loaded(f"local-dir:{tmp_path}", tmp_path / "tower.safetensors")
    torch.testing.assert_close(alone(pixels(56)), loaded(None, tmp_path)(pixels(56)), rtol=0, atol=0)


def test_normalisation_comes_from_the_directory_unless_given(tmp_path: Path) -> None:
    write_directory(tmp_path, NATIVE)
    assert OpenClipTeacher(weights=str(tmp_path)).image_mean == MEAN
    given = OpenClipTeacher(weights=str(tmp_path), image_mean=(0, 0, 0), image_std=(1, 1, 1))
    assert (given.image_mean, given.image_std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("model_name", "mean"),
    [("ViT-B-32-quickgelu", open_clip.OPENAI_DATASET_MEAN), ("ViT-B-16-SigLIP", (0.5, 0.5, 0.5))],
)
def test_for_a_file_the_normalisation_is_what_all_checkpoints_of_the_model_share(
    model_name: str, mean: tuple[float, float, float]
) -> None:
    assert OpenClipTeacher(model_name, weights="a_file.safetensors").image_mean == mean


def test_where_checkpoints_of_a_model_differ_the_normalisation_must_be_said() -> None:
    with pytest.raises(ValueError, match=r"image_mean and image_std"):
        OpenClipTeacher("ViT-L-14", weights="a_file.safetensors")
    OpenClipTeacher("ViT-L-14", weights="a_file.safetensors", image_mean=MEAN, image_std=STD)


def test_a_tag_trained_with_the_other_gelu_is_refused_before_any_download() -> None:
    with pytest.raises(ValueError, match="quick_gelu.*use model_name 'ViT-L-14-336-quickgelu'"):
        OpenClipTeacher("ViT-L-14-336", weights="pretrained:openai")
    OpenClipTeacher("ViT-L-14-336-quickgelu", weights="pretrained:openai")


def test_a_missing_tag_is_answered_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="laion2b_s34b_b79k.*pretrained:<tag>"):
        OpenClipTeacher("ViT-B-32", weights="pretrained")


def test_an_unknown_model_is_answered_with_near_names() -> None:
    with pytest.raises(ValueError, match="near it are .*ViT-L-14-336"):
        OpenClipTeacher("ViT-L-14-363", weights="random")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"visual.ln_post.bias": None}, "ln_post.bias' is missing"),
        ({"visual.extra": torch.ones(1)}, "extra' is unexpected"),
        ({"visual.proj": torch.ones(3, 3)}, r"proj' has shape \(3, 3\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, change: dict[str, Tensor | None], named: str
) -> None:
    write_directory(tmp_path, NATIVE)
    path = tmp_path / "open_clip_model.safetensors"
    save_file({n: t for n, t in (load_file(path) | change).items() if t is not None}, path)
    with pytest.raises(ValueError, match=named) as caught:
        loaded(None, tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning", "ignore:.*is deprecated:DeprecationWarning")
def test_a_torchscript_archive_is_refused_with_a_way_out(tmp_path: Path) -> None:
    write_directory(tmp_path, NATIVE)
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), str(tmp_path / "openai.pt"))
    with pytest.raises(ValueError, match=r"openai\.pt: a TorchScript archive.*safetensors"):
        loaded(f"local-dir:{tmp_path}", tmp_path / "openai.pt")


def test_missing_weights_are_an_error_and_never_random(tmp_path: Path) -> None:
    write_directory(tmp_path, NATIVE)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"open_clip_model\.safetensors"):
        loaded(None, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json"):
        OpenClipTeacher(weights=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(("config", "size"), [(NATIVE, 56), (TIMM, 160)], ids=["native", "timm"])
def test_another_image_size_needs_img_size_and_resizes_positions_as_open_clip_does(
    tmp_path: Path, config: dict[str, Any], size: int
) -> None:
    write_directory(tmp_path, config)
    larger = size * 3 // 2
    if config is NATIVE:
        with pytest.raises(ValueError, match=f"set img_size: {larger}"):
            loaded(None, tmp_path)(pixels(larger))
    teacher = loaded(None, tmp_path, img_size=larger)
    reference = open_clip.create_model(f"local-dir:{tmp_path}", force_image_size=larger).eval()
    with torch.no_grad():
        outputs = reference.visual.forward_intermediates(normalised(pixels(larger)), indices=1, intermediates_only=True)
    expected = outputs["image_intermediates"][0].permute(0, 2, 3, 1)
    torch.testing.assert_close(teacher(pixels(larger))[1], expected, rtol=1e-4, atol=1e-5)


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone(tmp_path: Path) -> None:
    write_directory(tmp_path, NATIVE)
    before = torch.random.get_rng_state()
    outputs = [loaded(f"local-dir:{tmp_path}", "random", seed=seed)(pixels(56))[1] for seed in (1, 1, 2)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(before, torch.random.get_rng_state())
