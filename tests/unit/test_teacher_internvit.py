from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from teachers import INTERNVIT_RELEASES, InternViT, InternViTConfig

TINY = InternViTConfig(embed_dim=32, depth=3, num_heads=2, mlp_dim=64, img_size=28)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
QKV = "encoder.layers.1.attn.qkv.weight"


def release_config(config: InternViTConfig) -> dict[str, Any]:
    return {
        "model_type": "intern_vit_6b",
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "image_size": config.img_size,
    }


def tiny_tensors(config: InternViTConfig = TINY) -> dict[str, Tensor]:
    model = InternViT("random", config, dtype="float32", seed=3)
    model.load_weights()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def write_sharded(directory: Path, tensors: dict[str, Tensor], config: InternViTConfig = TINY) -> None:
    (directory / "config.json").write_text(json.dumps(release_config(config)))
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard, members in zip(SHARDS, (names[::2], names[1::2]), strict=True):
        save_file({name: tensors[name] for name in members}, directory / shard)
        weight_map |= dict.fromkeys(members, shard)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def loaded(weights: Path | str, config: InternViTConfig = TINY, **arguments: Any) -> InternViT:
    model = InternViT(str(weights), config, **({"dtype": "float32"} | arguments))
    model.load_weights()
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("architecture", "select_layer", "expected"),
    [
        ("InternViT-6B-448px-V1-5", None, 5_536_496_000),
        ("InternViT-6B-448px-V2_5", None, 5_536_496_000),
        ("InternViT-6B-448px-V1-0", -1, 5_905_251_200),
        # Without its last three blocks a 48-block release has exactly the size of a 45-block one.
        ("InternViT-6B-448px-V1-0", None, 5_536_496_000),
        ("InternViT-300M-448px", None, 304_012_288),
        ("InternViT-300M-448px-V2_5", None, 304_012_288),
    ],
)
def test_a_release_built_without_memory_has_exactly_its_published_size(
    architecture: str, select_layer: int | None, expected: int
) -> None:
    model = InternViT("not/read/at/construction", architecture, select_layer=select_layer)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == expected


def test_the_six_billion_teacher_tells_its_shape_before_its_weights_are_there() -> None:
    model = InternViT("absent")
    assert (model.embed_dim, model.depth, model.patch_size, model.num_prefix_tokens) == (3200, 45, 14, 1)
    assert model.layer_dims == (3200,) * 45


@pytest.mark.parametrize("name", INTERNVIT_RELEASES)
def test_each_release_is_read_at_the_block_its_card_names(name: str) -> None:
    release = INTERNVIT_RELEASES[name]
    blocks = 24 if "300M" in name else 45
    assert InternViT("absent", name).depth == blocks
    assert InternViT("absent", release.config).depth == blocks


def test_select_layer_minus_four_gives_the_hidden_states_of_the_full_model_up_to_there(
    tmp_path: Path, images: Tensor
) -> None:
    config = InternViTConfig(embed_dim=32, depth=6, num_heads=2, mlp_dim=64, img_size=28)
    write_sharded(tmp_path, tiny_tensors(config), config)
    full, cut = loaded(tmp_path, config), loaded(tmp_path, config, select_layer=-4)
    assert (cut.depth, len(cut.encoder.layers)) == (3, 3)
    reference = full.forward_hidden_states(images, 6)[:3]
    for ours, theirs in zip(cut.forward_hidden_states(images, 3), reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_shard_that_holds_dropped_blocks_only_is_not_needed(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    write_sharded(tmp_path, tensors)
    dropped = [name for name in tensors if name.startswith("encoder.layers.2.")]
    kept = [name for name in tensors if name not in dropped]
    save_file({name: tensors[name] for name in kept}, tmp_path / SHARDS[0])
    (tmp_path / SHARDS[1]).unlink()
    weight_map = dict.fromkeys(kept, SHARDS[0]) | dict.fromkeys(dropped, SHARDS[1])
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert loaded(tmp_path, select_layer=-2).depth == 2


def test_an_encoder_inside_a_whole_vlm_loads_from_its_prefix_and_config(tmp_path: Path, images: Tensor) -> None:
    tensors = tiny_tensors()
    whole = {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
    whole |= {"language_model.model.norm.weight": torch.ones(8), "mlp1.0.weight": torch.ones(8)}
    save_file(whole, tmp_path / "model.safetensors")
    vlm_config = {"model_type": "internvl_chat", "vision_config": release_config(TINY), "llm_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(vlm_config))
    inside = InternViT.from_directory(tmp_path, dtype="float32")
    inside.load_weights()
    save_file(tensors, tmp_path / "bare.safetensors")
    bare = loaded(tmp_path / "bare.safetensors")
    torch.testing.assert_close(inside(images), bare(images), rtol=0, atol=0)


def test_loaded_weights_do_not_depend_on_the_file_any_more(tmp_path: Path, images: Tensor) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(tiny_tensors(), path)
    model = loaded(path)
    before = model(images)[1].clone()
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(model(images)[1], before)


def drop_key(directory: Path) -> None:
    tensors = tiny_tensors()
    del tensors[QKV]
    write_sharded(directory, tensors)


def add_key(directory: Path) -> None:
    write_sharded(directory, tiny_tensors() | {"encoder.layers.1.attn.rope": torch.ones(2)})


def add_block(directory: Path) -> None:
    write_sharded(directory, tiny_tensors() | {"encoder.layers.3.ls1": torch.ones(32)})


def change_width(directory: Path) -> None:
    write_sharded(directory, tiny_tensors() | {QKV: torch.ones(96, 31)})


def quantise(directory: Path) -> None:
    write_sharded(directory, tiny_tensors() | {QKV: torch.ones(96, 32, dtype=torch.int8)})


def shard_of(directory: Path, name: str) -> Path:
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][name]


def truncate(directory: Path) -> None:
    write_sharded(directory, tiny_tensors())
    shard = directory / SHARDS[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def empty_shard(directory: Path) -> None:
    write_sharded(directory, tiny_tensors())
    (directory / SHARDS[0]).write_bytes(b"")


def lose_shard(directory: Path) -> None:
    write_sharded(directory, tiny_tensors())
    (directory / SHARDS[1]).unlink()


def break_promise(directory: Path) -> None:
    tensors = tiny_tensors()
    write_sharded(directory, tensors)
    shard = shard_of(directory, QKV)
    with safe_open(shard, framework="pt") as file:
        names = list(file.keys())
    save_file({name: tensors[name] for name in names if name != QKV}, shard)


def break_index(directory: Path) -> None:
    write_sharded(directory, tiny_tensors())
    (directory / INDEX).write_text('{"weight_map": ')


def lose_index(directory: Path) -> None:
    write_sharded(directory, tiny_tensors())
    (directory / INDEX).unlink()


def lose_config(directory: Path) -> None:
    write_sharded(directory, tiny_tensors())
    (directory / "config.json").unlink()


def other_config(directory: Path) -> None:
    write_sharded(directory, tiny_tensors())
    (directory / "config.json").write_text(json.dumps(release_config(TINY) | {"qkv_bias": True}))


def native_config(directory: Path) -> None:
    write_sharded(directory, tiny_tensors())
    (directory / "config.json").write_text(json.dumps({"model_type": "internvl_vision", "hidden_size": 32}))


@pytest.mark.parametrize(
    ("damage", "error", "named"),
    [
        (drop_key, ValueError, [INDEX, QKV, "missing"]),
        (add_key, ValueError, [INDEX, "encoder.layers.1.attn.rope", "unexpected"]),
        (add_block, ValueError, [INDEX, "encoder.layers.3.ls1", "unexpected"]),
        (change_width, ValueError, [".safetensors", QKV, "(96, 31)", "(96, 32)"]),
        (quantise, ValueError, [".safetensors", QKV, "I8"]),
        (truncate, ValueError, [SHARDS[1], "truncated", "download"]),
        (empty_shard, ValueError, [SHARDS[0], "0 bytes", "download"]),
        (lose_shard, FileNotFoundError, [SHARDS[1], "missing", "download"]),
        (break_promise, ValueError, [".safetensors", QKV, INDEX]),
        (break_index, ValueError, [INDEX, "download"]),
        (lose_index, FileNotFoundError, ["model.safetensors", SHARDS[0]]),
        (lose_config, FileNotFoundError, ["config.json"]),
        (other_config, ValueError, ["config.json", "qkv_bias", "True", "False"]),
        (native_config, ValueError, ["config.json", "internvl_hf2custom"]),
    ],
)
def test_a_damaged_release_is_refused_with_file_key_and_way_out(
    tmp_path: Path, damage: Callable[[Path], None], error: type[Exception], named: list[str]
) -> None:
    damage(tmp_path)
    with pytest.raises(error) as caught:
        loaded(tmp_path)
    assert str(tmp_path) in str(caught.value)
    for part in named:
        assert part in str(caught.value)


def test_after_a_refused_load_the_encoder_still_has_no_weights(tmp_path: Path, images: Tensor) -> None:
    drop_key(tmp_path)
    model = InternViT(str(tmp_path), TINY)
    with pytest.raises(ValueError, match="missing"):
        model.load_weights()
    with pytest.raises(RuntimeError, match=r"load_weights\(\)"):
        model(images)
    write_sharded(tmp_path, tiny_tensors())
    model.load_weights()
    assert model(images)[1].shape == (2, 2, 2, 32)


def test_missing_weights_are_an_error_and_never_random(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*'random'"):
        loaded(tmp_path / "nowhere")


def test_internvit_says_how_to_fetch_a_release_rather_than_doing_it() -> None:
    with pytest.raises(ValueError, match="hf download OpenGVLab"):
        InternViT("pretrained")


@pytest.mark.parametrize("weights", ["random", "pretrained"])
def test_a_checksum_of_what_is_no_file_is_refused(weights: str) -> None:
    with pytest.raises(ValueError, match="sha256"):
        InternViT(weights, TINY, sha256="0" * 64)


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(tiny_tensors(), path)
    with pytest.raises(ValueError, match=r"weights\.pth.*can run code"):
        loaded(path)


def test_an_unknown_release_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="InternViT-6B-448px-V1-5, InternViT-6B-448px-V2_5"):
        InternViT("absent", "InternViT-9B")


@pytest.mark.parametrize("select_layer", [0, 3, -4])
def test_a_select_layer_outside_the_blocks_is_refused(select_layer: int) -> None:
    with pytest.raises(ValueError, match="select_layer"):
        InternViT("absent", TINY, select_layer=select_layer)


def test_random_weights_follow_the_seed_and_never_the_config_trap_of_zero_matrices() -> None:
    first, again, other = loaded("random", seed=1), loaded("random", seed=1), loaded("random", seed=2)
    name = "encoder.layers.0.mlp.fc1.weight"
    weights = [model.state_dict()[name] for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    # Standard deviation of 2,048 draws of a normal with 0.02: four standard errors are 0.0013.
    assert abs(float(weights[0].std()) - 0.02) < 0.0013
    assert torch.equal(first.state_dict()["encoder.layers.0.ls1"], torch.full((32,), 0.1))


def test_random_weights_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    loaded("random")
    assert torch.equal(before, torch.random.get_rng_state())


def test_weights_are_stored_in_the_dtype_asked_for(tmp_path: Path, images: Tensor) -> None:
    write_sharded(tmp_path, tiny_tensors())
    model = loaded(tmp_path, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(images)[1].dtype == torch.bfloat16


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
def test_bfloat16_stays_near_float32(tmp_path: Path, images: Tensor, attention: str) -> None:
    write_sharded(tmp_path, tiny_tensors())
    exact = loaded(tmp_path)(images)[1]
    rounded = loaded(tmp_path, dtype="bfloat16", attention=attention)(images)[1].float()
    # bfloat16 has 8 bits: a relative error of 2^-8 for each of a handful of roundings.
    assert (rounded - exact).norm() / exact.norm() < 0.02


def test_a_wrong_checksum_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    from teachers import weights_sha256

    write_sharded(tmp_path, tiny_tensors())
    digest = weights_sha256(tmp_path)
    loaded(tmp_path, sha256=digest.upper())
    tensors = load_file(tmp_path / SHARDS[0])
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / SHARDS[0])
    with pytest.raises(ValueError, match=f"expected {digest}"):
        loaded(tmp_path, sha256=digest)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act"),
        ({"hidden_size": "3200"}, "hidden_size"),
        ({"image_size": [448, 224]}, "image_size"),
        ({"num_attention_heads": 24}, "num_heads"),
        ({"norm_type": "batch_norm"}, "norm_type"),
    ],
)
def test_a_release_config_that_is_no_internvit_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        InternViTConfig.from_release_config(change)


def test_keys_that_a_release_config_leaves_out_have_the_defaults_of_its_own_class() -> None:
    assert InternViTConfig.from_release_config({}) == InternViTConfig(depth=48, img_size=224)
    assert InternViTConfig.from_release_config({"image_size": [448, 448], "num_hidden_layers": 45}) == InternViTConfig()
