"""What every teacher promises, whichever library it comes from."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
from torch import Tensor, nn

from distill.encoder import Encoder
from teachers import InternViT, OpenClipTeacher, TimmTeacher

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_dim": 64, "img_size": 28}
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 3, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}

# Class path, constructor arguments (DIR is replaced), image size in pixels, number of prefix tokens.
CASES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "internvit": ("teachers.InternViT", {"architecture": TINY, "dtype": "float32"}, 28, 1),
    "internvit_bfloat16": ("teachers.InternViT", {"architecture": TINY}, 28, 1),
    "timm_vit": ("teachers.TimmTeacher", {"model_name": "test_vit", "img_size": 32}, 32, 1),
    "timm_conv": ("teachers.TimmTeacher", {"model_name": "test_efficientnet"}, 64, 0),
    "timm_conv_bfloat16": ("teachers.TimmTeacher", {"model_name": "test_efficientnet", "dtype": "bfloat16"}, 64, 0),
    "open_clip": ("teachers.OpenClipTeacher", {"model_name": "local-dir:DIR", "dtype": "float32"}, 28, 1),
}


def spec(name: str, directory: Path) -> dict[str, Any]:
    class_path, arguments, _, _ = CASES[name]
    config = {"model_cfg": OPEN_CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    filled = {k: v.replace("DIR", str(directory)) if isinstance(v, str) else v for k, v in arguments.items()}
    return {"class_path": class_path, "init_args": {"weights": "random"} | filled}


def build(name: str, directory: Path) -> Any:
    """Build a teacher as the command line does: from plain values, against the protocol."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--teacher", type=Encoder)
    parsed = parser.parse_object({"teacher": spec(name, directory)})
    return parser.instantiate(parsed).teacher


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def teacher(case: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One teacher for all tests of a case: that none of them can change it is what they check."""
    built = build(case, tmp_path_factory.mktemp("teacher"))
    built.load_weights()
    return built


@pytest.fixture
def images(case: str) -> Tensor:
    size = CASES[case][2]
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def assert_same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> None:
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_plain_values_of_a_recipe_build_the_class_they_name(case: str, tmp_path: Path) -> None:
    built = build(case, tmp_path)
    assert type(built) in (InternViT, TimmTeacher, OpenClipTeacher)
    assert f"teachers.{type(built).__name__}" == CASES[case][0]


def test_a_recipe_may_not_leave_out_the_weights(case: str, tmp_path: Path) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--teacher", type=Encoder)
    incomplete = spec(case, tmp_path)
    del incomplete["init_args"]["weights"]
    with pytest.raises(jsonargparse.ArgumentError, match="weights"):
        parser.parse_object({"teacher": incomplete})


def test_every_hidden_state_has_the_shape_the_teacher_tells(case: str, teacher: Any, images: Tensor) -> None:
    prefix_tokens, size = CASES[case][3], CASES[case][2]
    assert teacher.num_prefix_tokens == prefix_tokens
    assert len(teacher.layer_dims) == teacher.depth
    assert teacher.layer_dims[-1] == teacher.embed_dim
    layers = teacher.forward_hidden_states(images, teacher.depth)
    for (prefix, patches), dim in zip(layers, teacher.layer_dims, strict=True):
        assert prefix.shape == (2, prefix_tokens, dim)
        assert (patches.ndim, patches.shape[0], patches.shape[-1]) == (4, 2, dim)
        assert prefix.dtype == patches.dtype == teacher.dtype
        assert torch.isfinite(patches).all()
    assert layers[-1][1].shape == (2, size // teacher.patch_size, size // teacher.patch_size, teacher.embed_dim)


def test_the_last_k_are_the_end_of_all_of_them(teacher: Any, images: Tensor) -> None:
    everything = teacher.forward_hidden_states(images, teacher.depth)
    for count in range(1, teacher.depth):
        assert_same(teacher.forward_hidden_states(images, count), everything[-count:])


@pytest.mark.parametrize("beyond", [0, -1, 1000])
def test_more_hidden_states_than_there_are_cannot_be_asked_for(teacher: Any, images: Tensor, beyond: int) -> None:
    with pytest.raises(ValueError, match=f"num_layers is {beyond}.*1 to {teacher.depth}"):
        teacher.forward_hidden_states(images, beyond)


def test_the_same_images_give_the_same_bits_and_leave_no_trace(teacher: Any, images: Tensor) -> None:
    state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    before = images.clone()
    first = teacher.forward_hidden_states(images, 2)
    teacher.forward_hidden_states(torch.flip(images, dims=(2,)), 2)
    assert_same(teacher.forward_hidden_states(images, 2), first)
    assert torch.equal(images, before)
    assert state.keys() == teacher.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in teacher.state_dict().items())


def test_uint8_and_float_images_give_the_same_hidden_states(teacher: Any, images: Tensor) -> None:
    assert_same(teacher.forward_hidden_states(images, 2), teacher.forward_hidden_states(images / 255, 2))


def test_a_teacher_stays_in_eval_mode_inside_a_module_that_trains(teacher: Any, images: Tensor) -> None:
    before = teacher.forward_hidden_states(images, 1)
    parent = nn.ModuleList([teacher]).train()
    teacher.train(True)
    assert parent.training
    assert not any(module.training for module in teacher.modules())
    assert_same(teacher.forward_hidden_states(images, 1), before)


def test_no_gradient_is_ever_recorded(teacher: Any, images: Tensor) -> None:
    floats = (images / 255).requires_grad_()
    with torch.enable_grad():
        layers = teacher.forward_hidden_states(floats, 2)
    assert not any(tensor.requires_grad for layer in layers for tensor in layer)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not layers[0][1].is_inference()


def test_a_trainers_autocast_changes_nothing(teacher: Any, images: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = teacher.forward_hidden_states(images, 2)
    assert_same(under_autocast, teacher.forward_hidden_states(images, 2))


def test_an_image_of_no_whole_patches_is_refused_with_a_size_that_works(case: str, teacher: Any) -> None:
    patch = teacher.patch_size
    # An open_clip ViT takes one size only, so the way out is another one.
    advice = "set img_size" if case == "open_clip" else f"patch_size {patch}; use {2 * patch} or {3 * patch}"
    with pytest.raises(ValueError, match=f"image size {2 * patch} x {2 * patch + 1} px.*{advice}"):
        teacher.forward_hidden_states(torch.zeros(1, 3, 2 * patch, 2 * patch + 1), 1)


def test_hidden_states_cannot_be_read_before_the_weights_are_there(case: str, tmp_path: Path, images: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"load_weights\(\)"):
        build(case, tmp_path).forward_hidden_states(images, 1)


def test_loading_twice_changes_nothing(teacher: Any) -> None:
    before = {name: tensor.data_ptr() for name, tensor in teacher.state_dict().items()}
    teacher.load_weights()
    assert {name: tensor.data_ptr() for name, tensor in teacher.state_dict().items()} == before


def test_a_copy_of_a_teacher_is_a_teacher(teacher: Any, images: Tensor) -> None:
    twin = copy.deepcopy(teacher)
    assert_same(twin.forward_hidden_states(images, 1), teacher.forward_hidden_states(images, 1))
    assert not twin.train().training


@pytest.mark.gpu
def test_on_a_gpu_the_hidden_states_are_those_of_the_cpu(case: str, tmp_path: Path, images: Tensor) -> None:
    on_cpu, on_gpu = build(case, tmp_path), build(case, tmp_path)
    on_cpu.load_weights()
    on_gpu.load_weights("cuda")
    expected = on_cpu.forward_hidden_states(images, 1)[0][1].float()
    found = on_gpu.forward_hidden_states(images.cuda(), 1)[0][1].float().cpu()
    # TF32 and bfloat16 round to 10 and 8 bits.
    assert (found - expected).norm() / expected.norm() < 0.03
