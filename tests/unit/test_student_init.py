"""The transfer from CLIP to InternViT, and random starts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from students import CLIPViT, InternViT
from students.calibration import read_images, synthetic_images
from students.images import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from students.init import add_layer_scale, clip_to_internvit, fold_normalisation, resize_position_embedding
from students.random_init import build_random_model, mimetic_, sinusoidal_positions

GEOMETRY = {"embed_dim": 64, "depth": 3, "num_heads": 4}
SIDE = 112


@pytest.fixture(scope="module")
def script() -> ModuleType:
    file = Path(__file__).parents[2] / "scripts" / "measure_init.py"
    spec = importlib.util.spec_from_file_location("measure_init", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure_init"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def weights(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("weights") / "clip.safetensors"
    save_file(script.synthetic_clip(GEOMETRY["embed_dim"], GEOMETRY["depth"]), file)
    return str(file)


def cosine_with_clip(weights: str, images: torch.Tensor, **options: object) -> float:
    clip, student = CLIPViT(weights, SIDE, **GEOMETRY), InternViT(weights, SIDE, **GEOMETRY, **options)
    features = []
    for encoder in (clip, student):
        encoder.load_weights()
        with torch.no_grad():
            tokens = encoder.eval().forward_hidden_states(images, 1)[0][1].flatten(0, 2)
        features.append(tokens - tokens.mean(dim=0))
    return float(F.cosine_similarity(*features, dim=-1).mean())


def test_positions_resize_as_bicubic_without_antialias_and_keep_the_class_row() -> None:
    pos = torch.randn(1, 1 + 24 * 24, 8, generator=torch.Generator().manual_seed(0))
    resized = resize_position_embedding(pos, 32)
    assert resized.shape == (1, 1 + 32 * 32, 8)
    assert torch.equal(resized[:, 0], pos[:, 0])
    grid = pos[0, 1:].reshape(24, 24, 8).permute(2, 0, 1)[None]
    expected = F.interpolate(grid, size=(32, 32), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    assert torch.equal(resized[0, 1:].reshape(32, 32, 8), expected)
    assert torch.equal(resize_position_embedding(pos, 24), pos)


def test_the_folded_normalisation_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(16, 3, 14, 14, generator=generator) / 14, torch.randn(16, generator=generator)
    images = torch.rand(2, 3, 56, 56, generator=generator)

    def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
        return (images - torch.tensor(mean).reshape(1, 3, 1, 1)) / torch.tensor(std).reshape(1, 3, 1, 1)

    folded = fold_normalisation(
        weight, bias, trained_mean=CLIP_MEAN, trained_std=CLIP_STD, fed_mean=IMAGENET_MEAN, fed_std=IMAGENET_STD
    )
    ours = F.conv2d(normalised(IMAGENET_MEAN, IMAGENET_STD), *folded, stride=14)
    theirs = F.conv2d(normalised(CLIP_MEAN, CLIP_STD), weight, bias, stride=14)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    unfolded = F.conv2d(normalised(IMAGENET_MEAN, IMAGENET_STD), weight, bias, stride=14)
    assert (unfolded - theirs).abs().max() > 1e-2


def test_rescaled_layer_scale_is_the_same_function_as_one(weights: str) -> None:
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    states = []
    for layer_scale in ("one", "rescaled"):
        student = InternViT(weights, SIDE, **GEOMETRY, layer_scale=layer_scale)
        student.load_weights()
        gamma = student.timm_state_dict()["blocks.1.ls2.gamma"]
        assert torch.equal(gamma, torch.full((64,), {"one": 1.0, "rescaled": 0.1}[layer_scale]))
        with torch.no_grad():
            states.append(student.eval().forward_hidden_states(images, 3))
    for (prefix_a, patches_a), (prefix_b, patches_b) in zip(*states, strict=True):
        torch.testing.assert_close(prefix_a, prefix_b, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(patches_a, patches_b, atol=1e-5, rtol=1e-5)


def test_the_linearised_pre_norm_is_nearer_to_clip_than_the_dropped_one(weights: str) -> None:
    images = synthetic_images(SIDE, num_images=4, seed=7)
    dropped, linearised = (cosine_with_clip(weights, images, pre_norm=p) for p in ("drop", "linearised"))
    assert linearised > dropped + 0.1
    assert linearised > 0.8


def test_the_linearised_pre_norm_equals_the_norm_where_all_tokens_have_one_deviation(weights: str) -> None:
    clip = CLIPViT(weights, SIDE, **GEOMETRY)
    clip.load_weights()
    state = clip.timm_state_dict()
    # A constant image makes every patch alike; with equal positions every token then has the same deviation.
    state["pos_embed"] = state["pos_embed"][:, 1:2].expand(1, 65, 64).clone()
    images = torch.full((1, 3, SIDE, SIDE), 0.7)
    target = clip_to_internvit(
        state,
        grid=8,
        layer_scale="one",
        should_fold_normalisation=False,
        pre_norm="linearised",
        calibration_images=images,
    )
    pixels = (images - torch.tensor(CLIP_MEAN).reshape(1, 3, 1, 1)) / torch.tensor(CLIP_STD).reshape(1, 3, 1, 1)
    tokens = F.conv2d(pixels, state["patch_embed.proj.weight"], stride=14).flatten(2).mT + state["pos_embed"][:, 1:]
    expected = F.layer_norm(tokens, (64,), state["norm_pre.weight"], state["norm_pre.bias"], 1e-5)
    ours = F.conv2d(pixels, target["patch_embed.proj.weight"], target["patch_embed.proj.bias"], stride=14)
    torch.testing.assert_close(ours.flatten(2).mT + target["pos_embed"][:, 1:], expected, atol=1e-5, rtol=1e-5)


def test_linearising_without_calibration_images_is_refused(weights: str) -> None:
    clip = CLIPViT(weights, SIDE, **GEOMETRY)
    clip.load_weights()
    with pytest.raises(ValueError, match="calibration_images"):
        clip_to_internvit(
            clip.timm_state_dict(),
            grid=8,
            layer_scale="one",
            should_fold_normalisation=True,
            pre_norm="linearised",
            calibration_images=None,
        )


def test_calibration_images_are_read_from_a_directory_and_change_the_scale(weights: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    Image.new("L", (30, 20), 200).save(tmp_path / "sub" / "grey.png")
    Image.new("RGB", (20, 30), (10, 200, 90)).save(tmp_path / "green.png")
    images = read_images(tmp_path, SIDE)
    assert images.shape == (2, 3, SIDE, SIDE)
    torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([10, 200, 90]) / 255)
    own, noise = (InternViT(weights, SIDE, **GEOMETRY, calibration_images=c) for c in (str(tmp_path), None))
    own.load_weights()
    noise.load_weights()
    key = "patch_embed.proj.weight"
    ratio = own.timm_state_dict()[key] / noise.timm_state_dict()[key]
    torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-4, atol=0)
    assert abs(float(ratio.flatten()[0]) - 1) > 0.05


def test_missing_or_damaged_calibration_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no images"):
        read_images(tmp_path, SIDE)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"broken\.png cannot be decoded"):
        read_images(tmp_path, SIDE)


def test_synthetic_images_have_the_contrast_of_photographs() -> None:
    images = synthetic_images(224)
    assert images.shape == (16, 3, 224, 224)
    assert images.min() >= 0
    assert images.max() <= 1
    assert 0.15 < images.mean(1).flatten(1).std(1).median() < 0.27
    assert torch.equal(images, synthetic_images(224))
    assert not torch.equal(images, synthetic_images(224, seed=1))


@pytest.mark.parametrize("init", ["timm", "mimetic"])
def test_random_weights_depend_on_the_seed_and_on_nothing_else(init: str) -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        student = InternViT("random", 28, embed_dim=16, depth=2, num_heads=2, init=init, seed=seed)
        student.load_weights()
        return student.timm_state_dict()

    torch.manual_seed(1)
    first = state(0)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = state(0)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = state(1)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    assert not torch.equal(first["patch_embed.proj.weight"], other["patch_embed.proj.weight"])


def test_mimetic_products_are_near_the_identity_and_its_negative() -> None:
    model = build_random_model(
        "vit_intern300m_patch14_448",
        {"img_size": 28, "embed_dim": 96, "depth": 1, "num_heads": 3, "num_classes": 0},
        init="mimetic",
        seed=0,
    )
    attention = model.blocks[0].attn
    query, key, value = attention.qkv.weight.detach().chunk(3)
    value_projection = value.T @ attention.proj.weight.detach().T
    # 0.4 Z - 0.4 I with Z of variance 1/96: the mean of the diagonal is -0.4 within 0.4 / 96 = 0.004 (1 sigma).
    assert abs(float(value_projection.diagonal().mean()) + 0.4) < 0.02
    assert abs(float((value_projection + 0.4 * torch.eye(96)).std()) - 0.4 / 96**0.5) < 0.01
    for head in range(3):
        product = query[head * 32 : (head + 1) * 32].T @ key[head * 32 : (head + 1) * 32]
        assert torch.linalg.matrix_rank(product) == 32
        # The identity is cut to a third of its rank, whose directions are the strongest.
        assert float(product.diagonal().mean()) > 0.15
    assert torch.equal(attention.qkv.bias, torch.zeros(288))
    assert torch.equal(model.pos_embed[0, 1:], sinusoidal_positions(2, 2, 96))
    assert torch.equal(model.pos_embed[0, 0], torch.zeros(96))


def test_mimetic_is_refused_where_there_is_no_self_attention() -> None:
    with pytest.raises(ValueError, match="has none. Use init `timm`"):
        mimetic_(torch.nn.Linear(3, 3), torch.Generator())


def test_sinusoidal_positions_tell_every_place_apart() -> None:
    rows = sinusoidal_positions(4, 5, 16)
    assert rows.shape == (20, 16)
    distances = torch.cdist(rows, rows) + 10 * torch.eye(20)
    assert distances.min() > 0.1
    with pytest.raises(ValueError, match="multiple of 4"):
        sinusoidal_positions(2, 2, 6)


def test_layer_scale_leaves_other_tensors_alone() -> None:
    state = {"blocks.0.norm1.weight": torch.ones(4), "blocks.0.attn.proj.weight": torch.ones(4, 4)}
    state |= {"blocks.0.mlp.fc2.bias": torch.ones(4), "blocks.0.mlp.fc1.weight": torch.ones(8, 4)}
    scaled = add_layer_scale(state, "rescaled")
    assert torch.equal(scaled["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.fc1.weight"])
    torch.testing.assert_close(scaled["blocks.0.attn.proj.weight"], torch.full((4, 4), 10.0))
    torch.testing.assert_close(scaled["blocks.0.mlp.fc2.bias"], torch.full((4,), 10.0))
    torch.testing.assert_close(scaled["blocks.0.ls1.gamma"], torch.full((4,), 0.1))


def test_the_measuring_script_runs_and_ranks_clip_weights_above_random_ones(
    script: ModuleType, weights: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "SOURCE_GRID", 8)
    monkeypatch.setattr(script, "STUDENT_SIZE_PX", 112)
    monkeypatch.setattr(script, "BUNDLED", ("coffee.png",))
    monkeypatch.setattr(script, "VARIANTS", script.VARIANTS[3:4])
    script.measure(weights, GEOMETRY, None, None)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    means = {row[1].strip(): float(row[-2].split("/")[1]) for row in rows if "variant" not in row[1]}
    script.measure_scales(weights, GEOMETRY, None, None)
    scales = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| noise")]
    assert len(scales) == 3
    assert means["random weights"] < 0.3 < means["+ linearised pre-norm (default)"]
