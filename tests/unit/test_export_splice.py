"""`--into`: the encoder in place of a VLM's tower, and nothing else changed; a VLM it does not fit is left alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.errors import ExportError
from distill.export.golden import compute_golden
from distill.export.internvl import CODE_FILES
from distill.export.splice import RECORD_FILE, splice
from distill.export.splice_verify import verify_tower
from distill.export.splice_vlm import INDEX_FILE
from distill.export.targets import find_target
from distill.export.transformers_loading import squash_preprocessor
from students import CLIPViT, InternViT

pytestmark = pytest.mark.usefixtures("forked_consumers")

transformers = pytest.importorskip("transformers", reason="the consumer is an optional extra")

TOLERANCE = 1e-5  # the bound that an export is held to, float32
SIZES = {"img_size": 56, "embed_dim": 32, "depth": 3, "num_heads": 2}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0}
IMAGE_TOKEN = 63


def make_student(student_class: type[nn.Module] = InternViT, **sizes: int) -> Any:
    torch.manual_seed(1)
    student: Any = student_class(weights="random", **{**SIZES, **sizes})
    student.load_weights()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(0.0, 0.1)
    return student.eval()


@dataclass(frozen=True)
class Kind:
    """A tiny VLM of random weights: how its directory is made, what student fits, where its tower is."""

    write: Callable[[Path], None]
    student: type[nn.Module]
    prefix: str
    tokens: int = 16


def write_extras(directory: Path, student: type[nn.Module]) -> None:
    """Write what a VLM has beside its weights."""
    (directory / "preprocessor_config.json").write_text(json.dumps(squash_preprocessor(make_student(student))))
    (directory / "tokenizer.model").write_bytes(bytes(range(256)))
    (directory / "notes").mkdir()
    (directory / "notes" / "licence.txt").write_text("theirs\n")


def write_llava(directory: Path) -> None:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128, image_size=56, patch_size=14
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=16,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(directory)
    write_extras(directory, CLIPViT)


def write_legacy_llava(directory: Path) -> None:
    """The keys that transformers 4 writes, with the buffer of the oldest ones, in half precision."""
    write_llava(directory)
    path = directory / "model.safetensors"
    weights = {key.replace("vision_tower.", "vision_tower.vision_model."): t for key, t in load_file(path).items()}
    weights = {key: t.to(torch.float16) for key, t in weights.items()}
    weights["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(weights, path, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))


def write_dinov2_llava(directory: Path) -> None:
    vision = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=56)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(directory)
    write_extras(directory, InternViT)


def write_internvl(directory: Path) -> None:
    """Several shards, so that an index and files without any part of the tower are there."""
    vision = transformers.InternVLVisionConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=[56, 56],
        attention_bias=True,
    )
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    model = transformers.InternVLForConditionalGeneration(config)
    model.save_pretrained(directory, max_shard_size="100KB")
    write_extras(directory, InternViT)


def write_chat(directory: Path) -> None:
    """OpenGVLab's layout, in bfloat16: its own code, `vision_model.`, `mlp1.` and a language model beside them."""
    find_target("internvl").write(make_student(), directory)
    tower = load_file(directory / "model.safetensors")
    vision = json.loads((directory / "config.json").read_text())
    del vision["auto_map"]
    weights: dict[str, Tensor] = {f"vision_model.{key}": torch.randn_like(value) for key, value in tower.items()}
    weights |= {"mlp1.0.weight": torch.ones(128), "mlp1.1.weight": torch.randn(32, 128)}
    weights["language_model.model.norm.weight"] = torch.randn(32)
    weights = {key: value.to(torch.bfloat16) for key, value in weights.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "internvl_chat", "select_layer": -1, "force_image_size": 56, "downsample_ratio": 0.5}
    config |= {"vision_config": {**vision, "drop_path_rate": 0.1}, "llm_config": {"hidden_size": 32}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "preprocessor_config.json").unlink()
    write_extras(directory, InternViT)


KINDS = {
    "llava": Kind(write_llava, CLIPViT, "vision_tower."),
    "llava of transformers 4": Kind(write_legacy_llava, CLIPViT, "vision_tower.vision_model."),
    "llava with dinov2": Kind(write_dinov2_llava, InternViT, "vision_tower."),
    "internvl": Kind(write_internvl, InternViT, "vision_tower.", 4),
    "internvl_chat": Kind(write_chat, InternViT, "vision_model."),
}


def make_vlm(name: str, directory: Path) -> Path:
    directory.mkdir()
    torch.manual_seed(0)
    KINDS[name].write(directory)
    return directory


def splice_into(name: str, vlm: Path, out: Path, **sizes: int) -> Any:
    return splice(make_student(KINDS[name].student, **sizes), vlm, out, trained_layers=2, trust_remote_code=True)


def read_all(directory: Path) -> dict[str, Tensor]:
    return {key: value for path in directory.glob("*.safetensors") for key, value in load_file(path).items()}


def read_files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", list(KINDS))
def test_the_vlms_own_class_gives_the_encoders_features_and_nothing_else_changed(name: str, tmp_path: Path) -> None:
    vlm, out, kind = make_vlm(name, tmp_path / "vlm"), tmp_path / "out", KINDS[name]
    before = read_files(vlm)
    spliced = splice_into(name, vlm, out)
    assert spliced.proof.worst_difference <= TOLERANCE
    assert read_files(vlm) == before
    after = read_files(out)
    holders = {
        path.name for path in vlm.glob("*.safetensors") if any(k.startswith(kind.prefix) for k in load_file(path))
    }
    assert after.keys() == before.keys() | {RECORD_FILE}
    untouched = before.keys() - holders - {"config.json", INDEX_FILE}
    assert all(after[file] == before[file] for file in untouched)
    old, new = read_all(vlm), read_all(out)
    others = [key for key in old if not key.startswith(kind.prefix)]
    assert others
    assert all(torch.equal(old[key], new[key]) and old[key].dtype == new[key].dtype for key in others)
    assert new.keys() - set(others) == {key for key in new if key.startswith(kind.prefix)}
    assert {str(value.dtype) for value in new.values()} == {f"torch.{spliced.dtype}"}
    old_config, new_config = (json.loads((place / "config.json").read_text()) for place in (vlm, out))
    assert {key for key in new_config if new_config[key] != old_config.get(key)} <= {"vision_config"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "llava of transformers 4", "llava with dinov2", "internvl"])
def test_the_spliced_vlm_generates_text_from_the_encoders_own_features(name: str, tmp_path: Path) -> None:
    vlm, kind = make_vlm(name, tmp_path / "vlm"), KINDS[name]
    spliced = splice_into(name, vlm, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model = model_class.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    seen: list[Any] = []
    model.model.vision_tower.register_forward_hook(lambda module, args, output: seen.append(output))
    golden = compute_golden(make_student(kind.student), "test")
    ids = torch.tensor([[1] + [IMAGE_TOKEN] * kind.tokens + [5, 6]])
    pixel_values = golden.preprocessing.normalise(golden.image)
    text = model.generate(input_ids=ids, pixel_values=pixel_values, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert text.shape == (1, ids.shape[1] + 3)
    states = (
        seen[0].last_hidden_state[:, 1:] if name == "internvl" else seen[0].hidden_states[spliced.select_layer][:, 1:]
    )
    expected = golden.layers[spliced.select_layer][1].flatten(1, 2)
    tolerance = TOLERANCE if spliced.dtype == "float32" else 1e-2 * float(expected.abs().max())
    assert torch.allclose(states, expected, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_a_deeper_tower_is_written_with_its_blocks_in_the_index_and_the_config(tmp_path: Path) -> None:
    vlm, out = make_vlm("internvl", tmp_path / "vlm"), tmp_path / "out"
    spliced = splice_into("internvl", vlm, out, depth=4)
    assert spliced.proof.worst_difference <= TOLERANCE
    index = json.loads((out / INDEX_FILE).read_text())
    for key, file in index["weight_map"].items():
        assert key in load_file(out / file)
    assert "vision_tower.encoder.layer.3.lambda_1" in index["weight_map"]
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in read_all(out).values())
    assert json.loads((out / "config.json").read_text())["vision_config"]["num_hidden_layers"] == 4
    narrower = splice(make_student(depth=2), out, tmp_path / "third")
    third = json.loads((tmp_path / "third" / INDEX_FILE).read_text())
    assert narrower.replaced < spliced.replaced
    assert third["weight_map"].keys() == read_all(tmp_path / "third").keys()


@pytest.mark.slow
def test_a_directory_whose_own_code_computes_otherwise_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    vlm, out = make_vlm("internvl_chat", tmp_path / "vlm"), tmp_path / "out"
    code = vlm / CODE_FILES[1]
    code.write_text(code.read_text().replace("x = x + self.drop_path(self.attn", "x = x - self.drop_path(self.attn"))
    with pytest.raises(ExportError, match="gives other features than the encoder"):
        splice_into("internvl_chat", vlm, out)
    assert [path.name for path in tmp_path.iterdir()] == ["vlm"]


def permute_blocks(directory: Path) -> None:
    path, other = directory / "model.safetensors", {"0": "1", "1": "0"}
    swap = {k: re.sub(r"(?<=vision_model\.encoder\.layers\.)[01]", lambda m: other[m[0]], k) for k in load_file(path)}
    save_file({swap[key]: value for key, value in load_file(path).items()}, path, metadata={"format": "pt"})


def change_heads(directory: Path) -> None:
    vision = json.loads((directory / "config.json").read_text())["vision_config"]
    edit_config(directory, vision_config={**vision, "num_attention_heads": 4})


def drop_block(directory: Path) -> None:
    vision = json.loads((directory / "config.json").read_text())["vision_config"]
    edit_config(directory, vision_config={**vision, "num_hidden_layers": 2})


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


TAMPERED = [
    (permute_blocks, "gives other features than the encoder"),
    (change_heads, "gives other features than the encoder"),
    (drop_block, r"ignores \d+ \['encoder.layers.2"),
    (truncate, "cannot be loaded; nothing was written: .*model.safetensors"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("tamper", "cause"), TAMPERED)
def test_a_spliced_vlm_that_is_not_what_it_should_be_is_refused_with_its_cause(
    tamper: Callable[[Path], None], cause: str, tmp_path: Path
) -> None:
    student, out, tower = make_student(), make_vlm("internvl_chat", tmp_path / "vlm"), tmp_path / "tower"
    tower.mkdir()
    find_target("internvl").write(student, tower)
    path = out / "model.safetensors"
    new = {f"vision_model.{key}": value.bfloat16() for key, value in load_file(tower / path.name).items()}
    save_file(load_file(path) | new, path, metadata={"format": "pt"})
    golden = compute_golden(student, "spliced internvl_chat")
    tamper(out)
    with pytest.raises(ExportError, match=cause):
        verify_tower("internvl_chat", out, student, golden, torch.bfloat16, 600)


# --- what is refused before anything is written ---------------------------------------------------------------------


def refusal(
    name: str, tmp_path: Path, student: Any, change: Callable[[Path], object] | None = None, **options: Any
) -> str:
    vlm = make_vlm(name, tmp_path / "vlm")
    if change is not None:
        change(vlm)
    with pytest.raises(ExportError) as caught:
        splice(student, vlm, tmp_path / "out", **{"trained_layers": 2, "trust_remote_code": True, **options})
    assert [path.name for path in tmp_path.iterdir()] == ["vlm"]
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "projector"),
    [("internvl_chat", r"mlp1.0.weight has shape \[128\]"), ("llava", r"linear_1.weight has shape \[32, 32\]")],
)
def test_a_projector_that_no_longer_fits_is_named_with_both_widths(name: str, projector: str, tmp_path: Path) -> None:
    student = make_student(KINDS[name].student, embed_dim=48)
    assert re.search(rf"the projector no longer fits. .*{projector}.*embed_dim 32", refusal(name, tmp_path, student))


@pytest.mark.parametrize("name", ["internvl_chat", "internvl", "llava"])
def test_another_number_of_tokens_is_refused_with_both(name: str, tmp_path: Path) -> None:
    message = refusal(name, tmp_path, make_student(KINDS[name].student, img_size=84))
    assert "16 patch tokens of a 56 px image, the encoder 36 of a 84 px one" in message
    assert "--img_size 56" in message


def test_the_chat_code_s_forced_image_size_is_the_one_that_counts(tmp_path: Path) -> None:
    change: Callable[[Path], None] = lambda vlm: edit_config(vlm, force_image_size=84)  # noqa: E731
    assert "36 patch tokens of a 84 px image" in refusal("internvl_chat", tmp_path, make_student(), change)


@pytest.mark.parametrize(("layer", "trained"), [(-2, 1), (-3, 2), (1, 2), ([-2, -1], 2)])
def test_a_layer_that_was_not_trained_is_refused_by_its_key(layer: object, trained: int, tmp_path: Path) -> None:
    change: Callable[[Path], None] = lambda vlm: edit_config(vlm, vision_feature_layer=layer)  # noqa: E731
    message = refusal("llava", tmp_path, make_student(CLIPViT), change, trained_layers=trained)
    assert f"it reads hidden state {layer} (vision_feature_layer in config.json)" in message
    assert f"the last {trained} " in message


def test_llavas_own_default_layer_counts_when_the_config_names_none(tmp_path: Path) -> None:
    def change(vlm: Path) -> None:
        config = json.loads((vlm / "config.json").read_text())
        del config["vision_feature_layer"]
        (vlm / "config.json").write_text(json.dumps(config))

    assert "reads hidden state -2" in refusal("llava", tmp_path, make_student(CLIPViT), change, trained_layers=1)


def test_preprocessing_by_another_mean_is_refused_with_the_file(tmp_path: Path) -> None:
    def change(vlm: Path) -> None:
        path = vlm / "preprocessor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": [0.5, 0.5, 0.5]}))

    message = refusal("internvl_chat", tmp_path, make_student(), change)
    assert "preprocessor_config.json normalises images by mean [0.5, 0.5, 0.5]" in message


def test_a_student_of_another_layout_is_refused_with_the_reason(tmp_path: Path) -> None:
    assert "CLIPVisionModel normalises every token" in refusal("llava", tmp_path, make_student(InternViT))


def test_the_directorys_own_code_runs_only_when_it_is_trusted(tmp_path: Path) -> None:
    message = refusal("internvl_chat", tmp_path, make_student(), trust_remote_code=False)
    assert "--trust_remote_code true" in message


UNREADABLE: list[tuple[Callable[[Path], None], str]] = [
    (
        lambda vlm: edit_config(vlm, model_type="qwen2_vl"),
        "model_type 'qwen2_vl'; an encoder can go into internvl_chat",
    ),
    (lambda vlm: edit_config(vlm, vision_config={"model_type": "siglip_vision_model"}), "'siglip_vision_model'"),
    (lambda vlm: (vlm / "config.json").write_text("{"), "config.json cannot be read"),
    (lambda vlm: (vlm / "model.safetensors").rename(vlm / "weights.bin"), "cannot be read as safetensors"),
    (lambda vlm: (vlm / "pytorch_model.bin").write_bytes(b"old"), "pytorch_model.bin would keep the old tower"),
    (truncate, "cannot be read as safetensors"),
]


@pytest.mark.parametrize(("change", "cause"), UNREADABLE)
def test_what_is_no_vlm_of_a_known_layout_is_refused_by_its_file(
    change: Callable[[Path], object], cause: str, tmp_path: Path
) -> None:
    assert cause in refusal("llava", tmp_path, make_student(CLIPViT), change)


def test_a_quantised_tower_is_refused(tmp_path: Path) -> None:
    def change(vlm: Path) -> None:
        path = vlm / "model.safetensors"
        weights = load_file(path)
        key = "vision_model.encoder.layers.0.mlp.fc1.weight"
        save_file({**weights, key: weights[key].to(torch.float8_e4m3fn)}, path)

    assert "before they are quantised" in refusal("internvl_chat", tmp_path, make_student(), change)


def test_a_directory_without_its_code_is_refused(tmp_path: Path) -> None:
    message = refusal("internvl_chat", tmp_path, make_student(), lambda vlm: (vlm / CODE_FILES[1]).unlink())
    assert "modeling_intern_vit.py is not there" in message


def test_a_place_inside_the_directory_itself_is_refused(tmp_path: Path) -> None:
    vlm = make_vlm("internvl_chat", tmp_path / "vlm")
    before = read_files(vlm)
    with pytest.raises(ExportError, match="lies inside --into"):
        splice_into("internvl_chat", vlm, vlm / "new")
    assert read_files(vlm) == before


def test_a_directory_that_is_there_already_is_kept(tmp_path: Path) -> None:
    vlm = make_vlm("internvl_chat", tmp_path / "vlm")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ExportError, match="give another `--out`"):
        splice_into("internvl_chat", vlm, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_an_index_beside_weights_that_it_does_not_list_is_refused(tmp_path: Path) -> None:
    def change(vlm: Path) -> None:
        weights = load_file(vlm / "model.safetensors")
        shard = "model-00001-of-00001.safetensors"
        save_file(weights, vlm / shard, metadata={"format": "pt"})
        (vlm / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}))

    message = refusal("internvl_chat", tmp_path, make_student(), change)
    assert f"model.safetensors lies beside {INDEX_FILE}, which does not list it" in message


@pytest.mark.slow
def test_a_shallower_dinov2_tower_takes_no_stage_names_from_the_deeper_one(tmp_path: Path) -> None:
    vlm, out = make_vlm("llava with dinov2", tmp_path / "vlm"), tmp_path / "out"
    vision = json.loads((vlm / "config.json").read_text())["vision_config"]
    stages = {"stage_names": ["stem", "stage1", "stage2", "stage3"], "out_features": ["stage3"], "out_indices": [3]}
    edit_config(vlm, vision_config={**vision, **stages})
    assert splice_into("llava with dinov2", vlm, out, depth=2).proof.worst_difference <= TOLERANCE
    assert not stages.keys() & json.loads((out / "config.json").read_text())["vision_config"].keys()
