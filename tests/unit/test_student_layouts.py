"""Weight files of every published layout, and the ways they can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import InternVLVisionConfig, InternVLVisionModel

from students import CLIPViT, InternViT
from students.weight_files import read_state_dict

GEOMETRY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SIDE = 56
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def full_clip() -> State:
    """A whole CLIP, text tower included, as open_clip and OpenAI name it."""
    torch.manual_seed(0)
    vision = {"image_size": SIDE, "patch_size": 14, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 1, "layers": 1}
    state = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, quick_gelu=True).state_dict()
    return {key: value + 0.05 * torch.randn_like(value) for key, value in state.items()}


def to_transformers(state: State, prefix: str) -> State:
    """Name open_clip's vision tower as transformers does: the mapping is written out anew, not taken from the code."""
    visual = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    named = {
        "embeddings.class_embedding": visual["class_embedding"],
        "embeddings.position_embedding.weight": visual["positional_embedding"],
        "embeddings.position_ids": torch.arange(17)[None],
        "embeddings.patch_embedding.weight": visual["conv1.weight"],
    }
    for part in ("weight", "bias"):
        named[f"pre_layrnorm.{part}"] = visual[f"ln_pre.{part}"]
        named[f"post_layernorm.{part}"] = visual[f"ln_post.{part}"]
        for i in range(2):
            ours, theirs = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
            q, k, v = visual[f"{ours}attn.in_proj_{part}"].chunk(3)
            named |= {
                f"{theirs}self_attn.q_proj.{part}": q,
                f"{theirs}self_attn.k_proj.{part}": k,
                f"{theirs}self_attn.v_proj.{part}": v,
                f"{theirs}self_attn.out_proj.{part}": visual[f"{ours}attn.out_proj.{part}"],
                f"{theirs}layer_norm1.{part}": visual[f"{ours}ln_1.{part}"],
                f"{theirs}layer_norm2.{part}": visual[f"{ours}ln_2.{part}"],
                f"{theirs}mlp.fc1.{part}": visual[f"{ours}mlp.c_fc.{part}"],
                f"{theirs}mlp.fc2.{part}": visual[f"{ours}mlp.c_proj.{part}"],
            }
    return {prefix + key: value.clone() for key, value in named.items()}


def save_open_clip(state: State, folder: Path) -> Path:
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def save_openai(state: State, folder: Path) -> Path:
    extra = {"input_resolution": torch.tensor(SIDE), "context_length": torch.tensor(8), "vocab_size": torch.tensor(32)}
    torch.save(state | extra, folder / "ViT.pt")
    return folder / "ViT.pt"


def save_data_parallel(state: State, folder: Path) -> Path:
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "epoch_3.pt")
    return folder / "epoch_3.pt"


def save_bare_tower(state: State, folder: Path) -> Path:
    save_file(
        {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}, folder / "v.safetensors"
    )
    return folder / "v.safetensors"


def save_transformers_legacy(state: State, folder: Path) -> Path:
    text = {"text_model.embeddings.position_embedding.weight": torch.zeros(8, 16), "logit_scale": torch.tensor(1.0)}
    save_file(to_transformers(state, "vision_model.") | text, folder / "model.safetensors")
    return folder


def save_transformers_flat(state: State, folder: Path) -> Path:
    torch.save(to_transformers(state, ""), folder / "pytorch_model.bin")
    return folder


def save_transformers_sharded(state: State, folder: Path) -> Path:
    named = to_transformers(state, "vision_model.")
    keys = sorted(named)
    shards = {"model-1.safetensors": keys[::2], "model-2.safetensors": keys[1::2]}
    for file, names in shards.items():
        save_file({name: named[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def save_timm(state: State, folder: Path) -> Path:
    student = CLIPViT(str(save_openai(state, folder)), SIDE, **GEOMETRY)
    student.load_weights()
    save_file(student.timm_state_dict(), folder / "timm.safetensors")
    return folder / "timm.safetensors"


@pytest.mark.parametrize(
    "save",
    [
        save_openai,
        save_data_parallel,
        save_bare_tower,
        save_transformers_legacy,
        save_transformers_flat,
        save_transformers_sharded,
        save_timm,
    ],
)
@pytest.mark.parametrize("student_class", [CLIPViT, InternViT])
def test_every_clip_layout_gives_the_identical_student(
    save: Callable[[State, Path], Path],
    student_class: type[CLIPViT] | type[InternViT],
    full_clip: State,
    tmp_path: Path,
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected = student_class(str(save_open_clip(full_clip, tmp_path / "a")), SIDE, **GEOMETRY)
    student = student_class(str(save(full_clip, tmp_path / "b")), SIDE, **GEOMETRY)
    expected.load_weights()
    student.load_weights()
    ours, theirs = student.timm_state_dict(), expected.timm_state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


def test_half_precision_weights_become_float32(full_clip: State, tmp_path: Path) -> None:
    student = CLIPViT(str(save_openai({k: v.half() for k, v in full_clip.items()}, tmp_path)), SIDE, **GEOMETRY)
    student.load_weights()
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


def test_an_internvit_goes_on_from_transformers_internvl_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = InternVLVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=[SIDE, SIDE],
        patch_size=[14, 14],
        attention_bias=True,
    )
    model = InternVLVisionModel(config).eval()
    save_file({f"vision_tower.{k}": v.clone() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    student = InternViT(str(tmp_path), SIDE, **GEOMETRY)
    student.load_weights()
    images = torch.rand(2, 3, SIDE, SIDE)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (student.image_mean, student.image_std))
    with torch.no_grad():
        theirs = model(pixel_values=(images - mean) / std).last_hidden_state
        prefix, patches = student.eval().forward_hidden_states(images, 1)[0]
    torch.testing.assert_close(torch.cat([prefix, patches.flatten(1, 2)], 1), theirs, atol=1e-5, rtol=0)


def test_an_internvit_goes_on_from_release_and_timm_weights(tmp_path: Path) -> None:
    first = InternViT("random", SIDE, **GEOMETRY)
    first.load_weights()
    state = first.timm_state_dict()
    release: State = {"mlp1.0.weight": torch.zeros(4), "language_model.x": torch.zeros(1)}
    for key, value in state.items():
        name = key.replace("blocks.", "encoder.layers.").replace(".gamma", "")
        name = {
            "cls_token": "embeddings.class_embedding",
            "pos_embed": "embeddings.position_embedding",
            "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
            "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
        }.get(name, name)
        release[f"vision_model.{name}"] = value.clone()
    save_file(release, tmp_path / "release.safetensors")
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "timm.safetensors")
    save_file({k: v.clone() for k, v in first.state_dict().items()}, tmp_path / "own.safetensors")
    for name in ("release", "timm", "own"):
        again = InternViT(str(tmp_path / f"{name}.safetensors"), SIDE, **GEOMETRY)
        again.load_weights()
        for key, value in again.timm_state_dict().items():
            assert torch.equal(value, state[key]), (name, key)


def load(state: State, folder: Path, **changes: int) -> None:
    save_file(state, folder / "clip.safetensors")
    CLIPViT(str(folder / "clip.safetensors"), SIDE, **{**GEOMETRY, **changes}).load_weights()


def test_a_missing_key_is_named(full_clip: State, tmp_path: Path) -> None:
    state = {k: v for k, v in full_clip.items() if k != "visual.transformer.resblocks.1.mlp.c_proj.bias"}
    with pytest.raises(ValueError, match=r"1 missing \(first: visual\.transformer\.resblocks\.1\.mlp\.c_proj\.bias\)"):
        load(state, tmp_path)


def test_an_unknown_vision_key_is_named(full_clip: State, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 unknown \(first: visual\.register_tokens\)"):
        load(full_clip | {"visual.register_tokens": torch.zeros(4, 32)}, tmp_path)


def test_a_wrong_width_names_key_shapes_and_way_out(full_clip: State, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"visual\.\S+ has shape \[.*32.*\]; the student needs \[.*64.*Set embed_dim"):
        load(full_clip, tmp_path, embed_dim=64, num_heads=4)


def test_a_wrong_depth_names_both_depths(full_clip: State, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="have 2 blocks; the student's depth is 3. Set depth to 2"):
        load(full_clip, tmp_path, depth=3)


def test_positions_of_no_square_grid_are_refused(full_clip: State, tmp_path: Path) -> None:
    state = full_clip | {"visual.positional_embedding": torch.zeros(16, 32)}
    with pytest.raises(ValueError, match="has 16 rows"):
        load(state, tmp_path)


def test_unknown_weights_list_the_known_layouts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"conv1\.weight.*Known: open_clip or OpenAI CLIP"):
        load({"conv1.weight": torch.zeros(8, 3, 7, 7)}, tmp_path)


def test_internvit_weights_are_refused_by_the_clip_student(tmp_path: Path) -> None:
    student = InternViT("random", SIDE, **GEOMETRY)
    student.load_weights()
    with pytest.raises(ValueError, match="layout timm InternViT; this student can begin from clip weights only"):
        load({k: v.clone() for k, v in student.timm_state_dict().items()}, tmp_path)


def test_a_missing_file_and_an_empty_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        InternViT(str(tmp_path / "nowhere"), SIDE, **GEOMETRY).load_weights()
    with pytest.raises(FileNotFoundError, match=r"open_clip_model\.safetensors"):
        InternViT(str(tmp_path), SIDE, **GEOMETRY).load_weights()


@pytest.mark.parametrize("name", ["clip.safetensors", "clip.pt"])
def test_a_truncated_file_is_named(name: str, full_clip: State, tmp_path: Path) -> None:
    file = tmp_path / name
    if file.suffix == ".pt":
        torch.save(full_clip, file)
    else:
        save_file(full_clip, file)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=name):
        InternViT(str(file), SIDE, **GEOMETRY).load_weights()


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_torchscript_archive_is_refused_and_the_command_to_convert_it_works(tmp_path: Path) -> None:
    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = torch.nn.Conv2d(3, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv1(x)

    file = tmp_path / "jit.pt"
    torch.jit.save(torch.jit.script(Tower()), str(file))
    with pytest.raises(ValueError, match="TorchScript archive") as caught:
        read_state_dict(file)
    program = str(caught.value).split('python -c "')[1].rstrip('"').replace("'clip.", f"'{tmp_path}/clip.")
    exec(program, {})  # the message's own command, run as a user would
    assert set(read_state_dict(tmp_path / "clip.safetensors")) == {"conv1.weight", "conv1.bias"}


def test_a_pickle_that_holds_code_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "ran"),)

    torch.save({"visual.ln_pre.weight": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match=r"trap\.pt"):
        read_state_dict(tmp_path / "trap.pt")
    assert not (tmp_path / "ran").exists()


def test_a_missing_shard_and_a_shard_elsewhere_are_named(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"model-1\.safetensors"):
        read_state_dict(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../model-1.safetensors"}}))
    with pytest.raises(ValueError, match="must lie beside its index"):
        read_state_dict(tmp_path)


CLIP_SETTINGS = {"num_attention_heads": 2, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
OPEN_CLIP_TOWER = {"width": 32, "head_width": 16}


def transformers_config(**changes: object) -> dict[str, object]:
    return {"model_type": "clip", "vision_config": {**CLIP_SETTINGS, **changes}}


def open_clip_config(quick_gelu: bool = True, **changes: object) -> dict[str, object]:
    return {"model_cfg": {"quick_gelu": quick_gelu, "vision_cfg": {**OPEN_CLIP_TOWER, **changes}}}


def save_with_config(state: State, folder: Path, name: str, config: object) -> str:
    (folder / name).write_text(json.dumps(config))
    return str(save_open_clip(state, folder))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("config.json", transformers_config()),
        ("config.json", {"model_type": "clip_vision_model", **CLIP_SETTINGS}),
        ("config.json", {"architecture": "vit_large_patch14_clip_quickgelu_336", "num_classes": 768}),
        ("open_clip_config.json", open_clip_config()),
        ("open_clip_config.json", open_clip_config(norm_kwargs={"eps": 1e-5})),
    ],
)
def test_a_configuration_that_agrees_with_the_student_is_accepted(
    name: str, config: object, full_clip: State, tmp_path: Path
) -> None:
    weights = save_with_config(full_clip, tmp_path, name, config)
    for student in (CLIPViT(weights, SIDE, **GEOMETRY), InternViT(weights, SIDE, **GEOMETRY)):
        student.load_weights()
        assert student.is_loaded


@pytest.mark.parametrize("student_class", [CLIPViT, InternViT])
@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("config.json", transformers_config(num_attention_heads=4), "says num_attention_heads 4;"),
        ("config.json", {**CLIP_SETTINGS, "num_attention_heads": 8}, "says num_attention_heads 8;"),
        ("config.json", {"model_type": "clip", "vision_config": {"hidden_size": 32}}, "says num_attention_heads 12;"),
        ("open_clip_config.json", open_clip_config(head_width=8), "says width / head_width 4;"),
    ],
)
def test_a_configuration_with_other_heads_is_refused(
    student_class: type[CLIPViT] | type[InternViT],
    name: str,
    config: object,
    message: str,
    full_clip: State,
    tmp_path: Path,
) -> None:
    weights = save_with_config(full_clip, tmp_path, name, config)
    with pytest.raises(ValueError, match=f"/{name} {message} the student has num_heads 2"):
        student_class(weights, SIDE, **GEOMETRY).load_weights()


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("config.json", transformers_config(hidden_act="gelu"), "hidden_act 'gelu'; the student has act 'quick_gelu'"),
        (
            "config.json",
            transformers_config(layer_norm_eps=1e-6),
            "layer_norm_eps 1e-06; the student has norm_eps 1e-05",
        ),
        ("open_clip_config.json", open_clip_config(quick_gelu=False), "'gelu'; the student has act 'quick_gelu'"),
        ("open_clip_config.json", open_clip_config(norm_kwargs={"eps": 1e-6}), "eps 1e-06; the student has norm_eps"),
    ],
)
def test_a_clip_of_another_activation_or_epsilon_is_refused_by_the_clip_student_only(
    name: str, config: object, message: str, full_clip: State, tmp_path: Path
) -> None:
    weights = save_with_config(full_clip, tmp_path, name, config)
    with pytest.raises(ValueError, match=f"/{name} says .*{message}"):
        CLIPViT(weights, SIDE, **GEOMETRY).load_weights()
    student = InternViT(weights, SIDE, **GEOMETRY)
    student.load_weights()
    assert student.is_loaded


@pytest.mark.parametrize("text", ["{", "[]", '{"vision_config": 3}'])
def test_a_damaged_configuration_is_named(text: str, full_clip: State, tmp_path: Path) -> None:
    weights = str(save_open_clip(full_clip, tmp_path))
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"/config\.json is not a model configuration"):
        CLIPViT(weights, SIDE, **GEOMETRY).load_weights()
