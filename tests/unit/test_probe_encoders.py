"""ENCODER: runs, exports, public directories and YAML files become encoders with their weights, or clear errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from distill.checkpoint import build_encoder, read_weights
from distill.errors import ConfigError, WeightsError
from distill.probe.encoders import NamedEncoder, comparison_pairs, resolve_encoders

STUDENT = {"class_path": "students.TimmStudent", "init_args": {"model_name": "test_vit", "weights": "random"}}
TEACHER = {"class_path": "teachers.TimmTeacher", "init_args": {"model_name": "test_resnet", "weights": "random"}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with one student, whose last checkpoint is its initialisation plus one."""
    root = tmp_path / "myrun"
    (root / "checkpoints").mkdir(parents=True)
    (root / "initial").mkdir()
    config = {"model": {"students": {"small": STUDENT}, "teachers": {"big": TEACHER}}}
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    student = build_encoder(STUDENT)
    read_weights(student, "student")
    state = {key: value.clone().contiguous() for key, value in student.state_dict().items()}
    save_file(state, root / "initial" / "small.safetensors")
    moved = {f"students.small.{key}": value + 1 for key, value in state.items()}
    torch.save({"state_dict": moved}, root / "checkpoints" / "last.ckpt")
    return root


def timm_directory(path: Path, name: str = "test_vit") -> Path:
    path.mkdir(parents=True)
    model = timm.create_model(name, num_classes=0)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path / "model.safetensors")
    config = {"architecture": name, "num_classes": 0, "pretrained_cfg": {**model.pretrained_cfg, "num_classes": 0}}
    (path / "config.json").write_text(json.dumps(config, default=str))
    return path


def roles(encoders: list[NamedEncoder]) -> list[tuple[str, str]]:
    return [(entry.name, entry.role) for entry in encoders]


def first_parameter(module: nn.Module) -> torch.Tensor:
    return next(module.parameters())


def test_a_run_brings_its_initialisation_its_student_and_its_teacher(run: Path) -> None:
    encoders = resolve_encoders(str(run))
    assert roles(encoders) == [("small (initial)", "initial"), ("small", "student"), ("big", "teacher")]
    torch.testing.assert_close(first_parameter(encoders[1].module), first_parameter(encoders[0].module) + 1)
    assert all(not entry.module.training for entry in encoders)
    assert comparison_pairs(encoders) == [("small", "small (initial)"), ("big", "small (initial)")]


def test_only_the_encoders_that_were_asked_for_are_loaded(run: Path) -> None:
    (alone,) = resolve_encoders(str(run), roles=["student"])
    assert (alone.name, alone.role) == ("small", "student")
    both = resolve_encoders(str(run), roles=["teacher", "initial"])
    assert [entry.role for entry in both] == ["initial", "teacher"]
    with pytest.raises(ConfigError, match="--roles leaves no encoder"):
        resolve_encoders(str(run), [str(run)], roles=[])


def test_an_export_that_is_named_is_loaded_whatever_roles_are_asked_for(run: Path) -> None:
    export = timm_directory(run / "exports" / "timm")
    (export / "manifest.json").write_text(json.dumps({"student": "small", "which": "initial"}))
    assert roles(resolve_encoders(str(export), roles=["student"])) == [("small (timm)", "other")]


def test_an_export_inside_a_run_brings_the_initialisation_and_the_teacher(run: Path) -> None:
    export = timm_directory(run / "exports" / "timm")
    (export / "manifest.json").write_text(json.dumps({"student": "small", "which": "last"}))
    encoders = resolve_encoders(str(export))
    assert roles(encoders) == [("small (initial)", "initial"), ("small (timm)", "student"), ("big", "teacher")]
    assert comparison_pairs(encoders)[0] == ("small (timm)", "small (initial)")


def test_an_export_that_was_moved_away_from_its_run_comes_alone_unless_its_manifest_names_it(
    run: Path, tmp_path: Path
) -> None:
    export = timm_directory(tmp_path / "elsewhere")
    (export / "manifest.json").write_text(json.dumps({"student": "small"}))
    assert roles(resolve_encoders(str(export))) == [("elsewhere", "other")]
    (export / "manifest.json").write_text(json.dumps({"student": "small", "run": str(run)}))
    assert [role for _, role in roles(resolve_encoders(str(export)))] == ["initial", "student", "teacher"]


def test_a_timm_directory_gives_timms_own_features(tmp_path: Path) -> None:
    directory = timm_directory(tmp_path / "public")
    (entry,) = resolve_encoders(str(directory))
    model = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
    images = torch.rand(1, 3, 160, 160)
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        expected = model.forward_intermediates((images - mean) / std, indices=1, norm=False, intermediates_only=True)[0]
        patches = entry.module.forward_hidden_states(images, 1)[-1][1]
    torch.testing.assert_close(patches.permute(0, 3, 1, 2), expected)


def test_an_open_clip_directory_is_opened_by_its_image_tower(tmp_path: Path) -> None:
    import open_clip

    tower = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    cfg = {"embed_dim": 32, "vision_cfg": tower, "text_cfg": text}
    model = open_clip.CLIP(**cfg)
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors"
    )
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": preprocess}))
    (entry,) = resolve_encoders(str(tmp_path))
    with torch.no_grad():
        prefix, patches = entry.module.forward_hidden_states(torch.rand(1, 3, 32, 32), 1)[-1]
    assert (prefix.shape, patches.shape) == ((1, 1, 64), (1, 4, 4, 64))


def test_a_transformers_directory_is_opened_by_transformers(tmp_path: Path) -> None:
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path)
    text = json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]})
    (tmp_path / "preprocessor_config.json").write_text(text)
    (entry,) = resolve_encoders(str(tmp_path))
    assert type(entry.module).__name__ == "TransformersEncoder"
    assert entry.module.embed_dim == 16


def test_a_yaml_file_names_any_encoder(tmp_path: Path) -> None:
    file = tmp_path / "resnet.yaml"
    file.write_text(yaml.safe_dump(TEACHER))
    (entry,) = resolve_encoders(str(file))
    assert (entry.name, entry.role, type(entry.module).__name__) == ("resnet", "other", "TimmTeacher")


def test_beside_adds_plain_references_with_names_of_their_own(run: Path, tmp_path: Path) -> None:
    first, second = timm_directory(tmp_path / "a" / "public"), timm_directory(tmp_path / "b" / "public")
    encoders = resolve_encoders(str(first), [str(second), str(run)])
    assert roles(encoders) == [("public", "other"), ("public (2)", "other"), ("myrun/small", "other")]
    assert comparison_pairs(encoders) == [("public", "public (2)"), ("public", "myrun/small")]


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist. Give a run directory"):
        resolve_encoders(str(tmp_path / "nothing"))


def test_an_unknown_directory_lists_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config\.yaml.*`architecture`.*`model_type`.*open_clip_config\.json"):
        resolve_encoders(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"), [("{a: [", "is not valid YAML"), ("weights: x", "no class_path"), ("- 1", "no class_path")]
)
def test_a_yaml_file_that_names_no_class_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "encoder.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        resolve_encoders(str(file))


def test_a_damaged_config_or_missing_weights_are_refused_by_name(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"broken.config\.json is not valid JSON"):
        resolve_encoders(str(broken))
    empty = timm_directory(tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    with pytest.raises((WeightsError, ConfigError), match="empty"):
        resolve_encoders(str(empty))
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(WeightsError, match="'resnet' is not one of"):
        resolve_encoders(str(other))


def test_a_run_without_its_initial_weights_is_refused(run: Path) -> None:
    shutil.rmtree(run / "initial")
    with pytest.raises(WeightsError, match=r"initial.small\.safetensors is missing"):
        resolve_encoders(str(run))


def test_importing_the_verb_imports_neither_teachers_nor_students_nor_anything_slow() -> None:
    code = "import sys, distill.probe.run; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"teachers", "students", "lightning", "transformers", "timm"} & set(done.stdout.split())
