"""Target `internvl`: the release's names and configuration, and the code that travels along."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.errors import ExportError
from distill.export.golden import compute_golden, write_golden
from distill.export.internvl import CODE_FILES, temporary_module_cache
from distill.export.targets import find_target
from distill.export.verify import verify_export
from students import CLIPViT, InternViT, TimmStudent
from teachers import InternViT as ReleasedInternViT

pytestmark = pytest.mark.usefixtures("forked_consumers")

transformers = pytest.importorskip("transformers", reason="the consumer is an optional extra")

TOLERANCE = 1e-5  # the bound that an export is held to, float32
SIZES = {"img_size": 56, "embed_dim": 32, "depth": 3, "num_heads": 2}


@pytest.fixture(autouse=True)
def no_code_of_other_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget code that other files' tests loaded from their own cache, whose package would be taken for the new one."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    elsewhere = [place for place in sys.path if not Path(place, "transformers_modules").is_dir()]
    monkeypatch.setattr(sys, "path", elsewhere)


def make_student(student_class: type[nn.Module] = InternViT, **sizes: Any) -> Any:
    student: Any = student_class(weights="random", **{**SIZES, **sizes})
    student.load_weights()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(0.0, 0.1)
    return student.eval()


def write_export(directory: Path, student: Any = None) -> Any:
    student = make_student() if student is None else student
    directory.mkdir(exist_ok=True)
    find_target("internvl").write(student, directory)
    write_golden(directory, compute_golden(student, "internvl"))
    return student


def load(directory: Path, **options: Any) -> Any:
    with temporary_module_cache():
        return transformers.AutoModel.from_pretrained(directory, trust_remote_code=True, **options).eval()


def pixels(student: Any) -> Tensor:
    golden = compute_golden(student, "internvl")
    return golden.preprocessing.normalise(golden.image)


def test_keys_are_the_releases_own(tmp_path: Path) -> None:
    write_export(tmp_path)
    block = {f"{name}.{kind}" for name in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2") for kind in
             ("weight", "bias")} | {"ls1", "ls2"}  # fmt: skip
    stem = {"class_embedding", "position_embedding", "patch_embedding.weight", "patch_embedding.bias"}
    expected = {f"embeddings.{name}" for name in stem} | {
        f"encoder.layers.{i}.{name}" for i in range(3) for name in block
    }
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == expected
    assert weights["embeddings.class_embedding"].shape == (1, 1, 32)
    assert weights["embeddings.position_embedding"].shape == (1, 17, 32)
    assert weights["encoder.layers.0.attn.qkv.weight"].shape == (96, 32)


def test_the_config_has_every_key_that_consumers_read(tmp_path: Path) -> None:
    write_export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128}
    function = {"hidden_act": "gelu", "norm_type": "layer_norm", "layer_norm_eps": 1e-6}
    # The defaults of the release's class for these are those of the 6B.
    function |= {"qkv_bias": True, "qk_normalization": False}
    image = {"image_size": 56, "patch_size": 14, "num_channels": 3}
    names = {"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b"}
    for key, value in {**shape, **function, **image, **names}.items():
        assert config[key] == value, key
    assert config.keys() >= {"initializer_factor", "initializer_range", "use_flash_attn", "drop_path_rate", "dropout"}
    assert config["auto_map"]["AutoModel"] == "modeling_intern_vit.InternVisionModel"
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.485, 0.456, 0.406]
    assert processor["do_center_crop"] is False


def test_the_shipped_code_needs_torch_and_transformers_alone() -> None:
    names: set[str] = set()
    for name in CODE_FILES:
        tree = ast.parse((Path(find_target("internvl").__file__).parent / "internvl_code" / name).read_text())  # type: ignore[attr-defined]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(str(node.module).partition(".")[0])
    assert names == {"__future__", "torch", "transformers", "typing"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_every_hidden_state_is_the_students(act: str, attention: str, tmp_path: Path) -> None:
    student = write_export(tmp_path / "a.dotted-name", make_student(act=act))
    model = load(tmp_path / "a.dotted-name", attn_implementation=attention)
    with torch.inference_mode():
        output = model(pixels(student), output_hidden_states=True)
    own = compute_golden(student, "internvl", num_layers=3).layers
    assert len(output.hidden_states) == 4  # the embeddings first
    for state, (prefix, patches) in zip(output.hidden_states[1:], own, strict=True):
        assert torch.allclose(state, torch.cat([prefix, patches.flatten(1, 2)], dim=1), rtol=0, atol=TOLERANCE)
    assert torch.equal(output.last_hidden_state, output.hidden_states[-1])
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
    as_tuple = model(pixels(student), return_dict=False)
    assert torch.equal(as_tuple[0], output.last_hidden_state)


def test_the_teachers_reader_of_releases_reads_the_export_too(tmp_path: Path) -> None:
    student = write_export(tmp_path)
    released = ReleasedInternViT.from_directory(tmp_path, dtype="float32")
    released.load_weights()
    golden = compute_golden(student, "internvl")
    own = released.forward_hidden_states(golden.image[None], num_layers=2)
    for (prefix, patches), (expected_prefix, expected_patches) in zip(own, golden.layers, strict=True):
        assert torch.allclose(prefix, expected_prefix, rtol=0, atol=TOLERANCE)
        assert torch.allclose(patches, expected_patches, rtol=0, atol=TOLERANCE)


def test_another_image_size_is_met_as_the_releases_code_does_at_once_or_for_good(tmp_path: Path) -> None:
    write_export(tmp_path)
    released = ReleasedInternViT.from_directory(tmp_path, dtype="float32")
    released.load_weights()
    images = torch.rand(1, 3, 84, 84)
    mean, std = (torch.tensor(values)[:, None, None] for values in (released.image_mean, released.image_std))
    expected = released.forward_hidden_states(images, num_layers=1)[0][1].flatten(1, 2)
    model = load(tmp_path)
    with torch.inference_mode():
        at_once = model((images - mean) / std).last_hidden_state[:, 1:]
    assert torch.allclose(at_once, expected, rtol=0, atol=TOLERANCE)
    model.resize_pos_embeddings(old_size=56, new_size=84, patch_size=14)
    assert (model.config.image_size, model.embeddings.position_embedding.shape[1]) == (84, 37)
    with torch.inference_mode():
        for_good = model((images - mean) / std).last_hidden_state[:, 1:]
    assert torch.allclose(for_good, expected, rtol=0, atol=TOLERANCE)


def test_the_code_trains_with_checkpointing_and_drops_paths_in_training_only(tmp_path: Path) -> None:
    student = write_export(tmp_path)
    model, images = load(tmp_path), pixels(student)
    model.train()
    gradients: list[Tensor] = []
    for is_checkpointed in (False, True):
        model.encoder.gradient_checkpointing = is_checkpointed
        model.zero_grad()
        model(images).last_hidden_state.square().mean().backward()
        gradients.append(model.encoder.layers[0].attn.qkv.weight.grad.clone())
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)
    dropping = load(tmp_path, drop_path_rate=0.9)
    with torch.no_grad():
        still = dropping(images).last_hidden_state
        assert torch.equal(dropping(images).last_hidden_state, still)
        dropping.train()
        torch.manual_seed(0)
        assert not torch.equal(dropping(images).last_hidden_state, still)


def test_loading_for_verification_leaves_no_copy_of_the_code_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    student = write_export(tmp_path / "export")
    path, modules = list(sys.path), set(sys.modules)
    for _ in range(2):
        find_target("internvl").consumer_features(tmp_path / "export", "float32", pixels(student), 1)
    assert not cache.exists()
    assert sys.path == path
    assert not {name for name in set(sys.modules) - modules if name.startswith("transformers_modules")}


def test_the_code_refuses_a_configuration_of_another_encoder(tmp_path: Path) -> None:
    write_export(tmp_path)
    edit_json(tmp_path / "config.json", norm_type="rms_norm")
    with pytest.raises(ValueError, match="norm_type 'rms_norm' .* another encoder"):
        load(tmp_path)


def test_a_name_that_the_release_lacks_is_refused(tmp_path: Path) -> None:
    class WithQueryNorm(TimmStudent):
        layout = "internvit"

    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "qk_norm": True}
    student = WithQueryNorm("vit_intern300m_patch14_448", weights="random", img_size=56, model_args=sizes)
    student.load_weights()
    with pytest.raises(ExportError, match="InternVisionModel has no place for 8 weights"):
        find_target("internvl").write(student.eval(), tmp_path)


def test_another_layout_is_refused_with_the_reason_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"LayerNorm in front of the first block .* Use clip-hf or timm"):
        find_target("internvl").check(make_student(CLIPViT))
    with pytest.raises(ExportError, match=r"nothing else. Use timm"):
        find_target("internvl").check(TimmStudent("test_efficientnet", weights="random", img_size=64))


# --- what is wrong with an export is found by its consumer, in a fresh process ---------------------------------------


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def exchange_blocks(directory: Path) -> None:
    path, other = directory / "model.safetensors", {"0": "1", "1": "0"}
    weights = load_file(path)
    swapped = {
        re.sub(r"(?<=layers\.)[01]", lambda match: other[match[0]], key): value for key, value in weights.items()
    }
    save_file(swapped, path, metadata={"format": "pt"})


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


TAMPERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "exchanged blocks": (exchange_blocks, "other features than the encoder"),
    "heads": (lambda d: edit_json(d / "config.json", num_attention_heads=4), "other features than the encoder"),
    "bias": (lambda d: edit_json(d / "config.json", qkv_bias=False), "ignores 3"),
    "depth": (lambda d: edit_json(d / "config.json", num_hidden_layers=4), "misses 14 weights"),
    "mean": (lambda d: edit_json(d / "preprocessor_config.json", image_mean=[0.5] * 3), "normalises otherwise"),
    "truncated": (truncate, "cannot load the internvl export"),
    "code": (lambda d: (d / CODE_FILES[1]).unlink(), "cannot load the internvl export"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", list(TAMPERED))
def test_a_tampered_export_is_refused_with_its_cause(case: str, tmp_path: Path) -> None:
    tamper, cause = TAMPERED[case]
    write_export(tmp_path)
    tamper(tmp_path)
    with pytest.raises(ExportError, match=cause):
        verify_export(tmp_path)


@pytest.mark.slow
def test_an_export_is_verified_by_the_code_that_travels_with_it(tmp_path: Path) -> None:
    write_export(tmp_path / "out.v1")
    proof = verify_export(tmp_path / "out.v1")
    assert proof.worst_difference <= TOLERANCE
    assert proof.consumer.startswith("InternVisionModel of transformers")
