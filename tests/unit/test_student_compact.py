"""Students by timm name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from students import CLIPViT, InternViT, TimmStudent

SMALL_SWIN = {"depths": [1, 1], "embed_dim": 16, "num_heads": [1, 1], "window_size": 7, "patch_size": 2}
MODELS = [
    ("test_vit", 64, None),
    ("test_vit4", 64, None),
    ("test_convnext", 64, None),
    ("test_resnet", 64, None),
    ("test_efficientnet", 64, None),
    ("swin_tiny_patch4_window7_224", 28, SMALL_SWIN),
    ("tiny_vit_5m_224", 64, {"depths": [1, 1, 1, 1], "embed_dims": [16, 16, 32, 32], "num_heads": [1, 1, 1, 1]}),
    ("xcit_nano_12_p16_224", 64, {"depth": 2, "embed_dim": 32}),
    ("eva02_tiny_patch14_224", 56, {"depth": 2, "embed_dim": 48}),
]


def build(name: str, img_size: int, model_args: dict[str, object] | None) -> TimmStudent:
    student = TimmStudent(name, "random", img_size, model_args)
    student.load_weights()
    return student


@pytest.fixture(scope="module", params=MODELS, ids=[m[0] for m in MODELS])
def student(request: pytest.FixtureRequest) -> TimmStudent:
    return build(*request.param)


def test_every_trained_parameter_gets_a_gradient_and_every_frozen_one_none(student: TimmStudent) -> None:
    student.train()
    layers = student.forward_hidden_states(torch.rand(2, 3, student.img_size, student.img_size), min(2, student.depth))
    sum(patches.square().mean() for _, patches in layers).backward()
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    assert sum(p.requires_grad for p in student.parameters()) > 5


def test_maps_have_the_announced_widths_and_grid(student: TimmStudent) -> None:
    with torch.no_grad():
        images = torch.rand(2, 3, student.img_size, student.img_size)
        layers = student.eval().forward_hidden_states(images, student.depth)
    assert len(layers) == student.depth == len(student.layer_dims)
    for (prefix, patches), width in zip(layers, student.layer_dims, strict=True):
        assert patches.shape[-1] == prefix.shape[-1] == width
        assert prefix.shape[:2] == (2, student.num_prefix_tokens)
    side = student.img_size // student.patch_size
    assert layers[-1][1].shape == (2, side, side, student.embed_dim)


@pytest.mark.parametrize("index", [0, 2, 5])
@torch.no_grad()
def test_timm_rebuilds_the_student_from_name_arguments_and_state_dict(index: int) -> None:
    name, img_size, model_args = MODELS[index]
    student = build(name, img_size, model_args).eval()
    images = torch.rand(1, 3, img_size, img_size)
    rebuilt = timm.create_model(student.timm_architecture, **json.loads(json.dumps(student.timm_model_args)))
    rebuilt.load_state_dict(student.timm_state_dict(), strict=True)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (student.image_mean, student.image_std))
    theirs = rebuilt.eval().forward_intermediates((images - mean) / std, indices=1, intermediates_only=True)[0]
    ours = student.forward_hidden_states(images, 1)[0][1]
    torch.testing.assert_close(ours, theirs.permute(0, 2, 3, 1), atol=1e-6, rtol=0)


def test_a_timm_file_loads_without_its_classifier_and_with_resized_positions(tmp_path: Path) -> None:
    source = timm.create_model("test_vit", num_classes=10)
    save_file({k: v.clone().half() for k, v in source.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    student = TimmStudent("test_vit", str(tmp_path), 64)
    student.load_weights()
    state = student.timm_state_dict()
    assert state["pos_embed"].shape == (1, 17, 64)
    assert "head.weight" not in state
    key = "blocks.0.attn.qkv.weight"
    assert torch.equal(state[key], source.state_dict()[key].half().float())
    assert torch.equal(state["pos_embed"][:, 0], source.state_dict()["pos_embed"][:, 0].half().float())


@pytest.mark.parametrize(
    ("model_args", "num_prefix"),
    [
        ({"reg_tokens": 4, "no_embed_class": True}, 0),
        ({"class_token": False, "global_pool": "avg"}, 0),
        ({"reg_tokens": 4}, 5),
    ],
    ids=["registers without positions", "no class token", "registers with positions"],
)
def test_positions_are_resized_behind_as_many_prefix_rows_as_the_model_has(
    model_args: dict[str, object], num_prefix: int, tmp_path: Path
) -> None:
    source = timm.create_model("test_vit", num_classes=0, img_size=96, **model_args).state_dict()
    save_file(source, tmp_path / "model.safetensors")
    student = TimmStudent("test_vit", str(tmp_path), 64, model_args)
    student.load_weights()
    ours, stored = student.timm_state_dict()["pos_embed"], source["pos_embed"]
    assert stored.shape == (1, num_prefix + 36, 64)
    assert ours.shape == (1, num_prefix + 16, 64)
    assert torch.equal(ours[:, :num_prefix], stored[:, :num_prefix])
    grid = stored[0, num_prefix:].reshape(6, 6, 64).permute(2, 0, 1)[None]
    expected = F.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    torch.testing.assert_close(ours[0, num_prefix:].reshape(4, 4, 64), expected, atol=1e-6, rtol=0)
    with torch.no_grad():
        patches = student.eval().forward_hidden_states(torch.rand(1, 3, 64, 64), 1)[0][1]
    assert patches.shape == (1, 4, 4, 64)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client, which may not reach the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put_in_cache(cache: Path, model_id: str, state: dict[str, torch.Tensor]) -> None:
    folder, revision = cache / f"models--{model_id.replace('/', '--')}", "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "snapshots" / revision).mkdir(parents=True)
    save_file(state, folder / "snapshots" / revision / "model.safetensors")


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_pretrained_weights_are_those_of_the_download_and_move_no_random_state(name: str, hub_cache: Path) -> None:
    source = timm.create_model(name).state_dict()
    put_in_cache(hub_cache, f"timm/{name}.r160_in1k", source)
    student = TimmStudent(name, "pretrained")
    before = torch.get_rng_state()
    student.load_weights()
    assert torch.equal(before, torch.get_rng_state())
    state = student.timm_state_dict()
    assert len(state) > len(source) - 4
    assert all(torch.equal(value, source[key]) for key, value in state.items())


def test_pretrained_weights_that_lack_a_tensor_are_refused_rather_than_left_random(hub_cache: Path) -> None:
    source = timm.create_model("test_vit").state_dict()
    del source["blocks.0.attn.qkv.weight"]
    put_in_cache(hub_cache, "timm/test_vit.r160_in1k", source)
    with pytest.raises(
        ValueError, match=r"could not load the pretrained weights of 'test_vit'.*(?s:.*)attn\.qkv\.weight"
    ):
        TimmStudent("test_vit", "pretrained").load_weights()


def test_pretrained_weights_without_network_or_of_no_release_say_the_way_out(hub_cache: Path) -> None:
    assert not list(hub_cache.iterdir())
    with pytest.raises(
        FileNotFoundError, match=r"could not fetch the pretrained weights of 'test_vit'(?s:.*)as `weights`"
    ):
        TimmStudent("test_vit", "pretrained").load_weights()
    with pytest.raises(ValueError, match=r"could not load the pretrained weights of 'test_vit4'(?s:.*)list_pretrained"):
        TimmStudent("test_vit4", "pretrained").load_weights()


@pytest.mark.slow  # timm builds the whole ViT-L before it asks the hub
@pytest.mark.parametrize("student_class", [CLIPViT, InternViT])
def test_a_pretrained_clip_without_network_says_which_and_the_way_out(
    student_class: type[CLIPViT] | type[InternViT], hub_cache: Path
) -> None:
    assert not list(hub_cache.iterdir())
    with pytest.raises(FileNotFoundError, match=r"vit_large_patch14_clip_quickgelu_336\.openai(?s:.*)as `weights`"):
        student_class("pretrained").load_weights()


def test_a_file_without_the_tensors_no_hidden_state_needs_is_complete(tmp_path: Path) -> None:
    source = timm.create_model("test_efficientnet", num_classes=0)
    state = {k: v.clone() for k, v in source.state_dict().items() if not k.startswith(("conv_head", "bn2"))}
    save_file(state, tmp_path / "backbone.safetensors")
    student = TimmStudent("test_efficientnet", str(tmp_path / "backbone.safetensors"))
    student.load_weights()
    assert torch.equal(student.timm_state_dict()["conv_stem.weight"], state["conv_stem.weight"])
    del state["conv_stem.weight"]
    save_file(state, tmp_path / "damaged.safetensors")
    with pytest.raises(ValueError, match=r"missing \(first: \S+\)"):
        TimmStudent("test_efficientnet", str(tmp_path / "damaged.safetensors")).load_weights()


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit timm's test_vit.*Set model_name"):
        TimmStudent("test_vit", str(tmp_path)).load_weights()
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet"}))
    with pytest.raises(ValueError, match="says architecture 'test_resnet'; model_name is 'test_vit'"):
        TimmStudent("test_vit", str(tmp_path)).load_weights()


def test_a_wrong_width_names_key_and_shapes(tmp_path: Path) -> None:
    wide = timm.create_model("test_vit", num_classes=0, embed_dim=32)
    save_file(wide.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"of another shape.* is \[.*32.*\], needed \[.*64.*\]"):
        TimmStudent("test_vit", str(tmp_path)).load_weights()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TimmStudent("test_vit", str(tmp_path / "nowhere")).load_weights()


def test_an_unknown_name_and_an_unknown_argument_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model_name 'vit_enormous' is not an architecture.*vit_"):
        TimmStudent("vit_enormous", "random")
    with pytest.raises(ValueError, match="cannot build 'test_vit'.*no_such_argument"):
        TimmStudent("test_vit", "random", model_args={"no_such_argument": 1})


def test_an_image_size_the_stride_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="img_size 60 is not a multiple of 32"):
        TimmStudent("test_convnext", "random", 60)


def test_random_weights_depend_on_the_seed_and_on_nothing_else() -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        student = TimmStudent("test_convnext", "random", seed=seed)
        student.load_weights()
        return student.timm_state_dict()

    torch.manual_seed(1)
    first, before = state(0), torch.get_rng_state()
    torch.manual_seed(2)
    second = state(0)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["stem.0.weight"], state(1)["stem.0.weight"])


def test_mimetic_init_applies_to_vits_and_is_refused_elsewhere() -> None:
    vit = TimmStudent("test_vit", "random", 64, init="mimetic")
    vit.load_weights()
    attention = vit.model.blocks[0].attn
    product = attention.qkv.weight.detach()[-64:].T @ attention.proj.weight.detach().T
    assert float(product.diagonal().mean()) < -0.3
    with pytest.raises(ValueError, match="Use init `timm`"):
        TimmStudent("test_convnext", "random", init="mimetic").load_weights()


def test_gradient_checkpointing_where_timm_has_none_is_refused() -> None:
    with pytest.raises(ValueError, match="has no gradient checkpointing"):
        TimmStudent("vgg11", "random", grad_checkpointing=True)


def test_frozen_modules_keep_weights_and_batch_statistics_while_the_rest_trains() -> None:
    student = TimmStudent("test_resnet", weights="random", img_size=64, frozen=["conv1", "bn1", "layer1"])
    student.load_weights()
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    student.forward_hidden_states(images, 1)[0][1].square().mean().backward()
    optimizer.step()
    changed = {
        name.split(".")[0] for name, value in student.model.state_dict().items() if not value.equal(before[name])
    }
    assert changed == {"layer2", "layer3", "layer4"}
    assert student.model.layer2.training
    assert not any(module.training for module in student.model.layer1.modules())
    student.eval().train()
    assert student.model.layer2.training
    assert not any(module.training for module in student.model.layer1.modules())


def test_a_frozen_module_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"frozen names 'stages\.0': no such module .* which has conv1, .*layer4"):
        TimmStudent("test_resnet", weights="random", frozen=["stages.0"])
