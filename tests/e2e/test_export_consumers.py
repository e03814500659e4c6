"""Exports as strangers meet them: verified in fresh processes, generating inside VLMs, refused when tampered with."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    CLIPVisionModel,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
)

from distill.cli import main
from distill.errors import ConfigError, ExportError
from distill.export.golden import compute_golden, draw_image, write_golden
from distill.export.run import Exported, export, export_encoder
from distill.export.targets import find_target
from distill.export.verify import TOLERANCE, verify_export
from students import CLIPViT, InternViT

SIZES = {"img_size": 56, "embed_dim": 32, "depth": 3, "num_heads": 2}
STUDENTS: dict[str, Callable[..., nn.Module]] = {"internvl-hf": InternViT, "clip-hf": CLIPViT, "timm": InternViT}
FORMATS = list(STUDENTS)
IMAGE_TOKEN = 63


def make_student(format: str) -> Any:
    torch.manual_seed(0)
    student: Any = STUDENTS[format](weights="random", **SIZES)
    student.load_weights()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(0.0, 0.2)
    return student.eval()


def write_unpublished(format: str, directory: Path) -> Path:
    """Write what an export is before its verification: consumer's files and golden features."""
    student = make_student(format)
    find_target(format).write(student, directory)
    write_golden(directory, compute_golden(student, format))
    return directory


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Every target, published once."""
    root = tmp_path_factory.mktemp("exports")
    return {format: export_encoder(make_student(format), format, root / format) for format in FORMATS}


# --- what is essential, in the inner loop ---------------------------------------------------------------------------


def test_an_export_is_published_after_a_fresh_process_reproduced_it(tmp_path: Path) -> None:
    exported = export_encoder(make_student("timm"), "timm", tmp_path / "out")
    assert exported.verification.worst_difference <= TOLERANCE
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "config.json", "golden.safetensors", "manifest.json", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def permute_blocks(directory: Path, first: str, second: str) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    swapped = {
        re.sub(rf"^{re.escape(first)}|^{re.escape(second)}", lambda m: second if m[0] == first else first, key): value
        for key, value in weights.items()
    }
    assert swapped.keys() == weights.keys()
    save_file(swapped, path, metadata={"format": "pt"})


def test_an_export_with_two_blocks_exchanged_is_refused_with_the_number(tmp_path: Path) -> None:
    write_unpublished("timm", tmp_path)
    permute_blocks(tmp_path, "blocks.0.", "blocks.1.")
    with pytest.raises(ExportError, match=r"other features than the encoder: layer -2, .* differ by [\d.e+]+, allowed"):
        verify_export(tmp_path)


def test_a_missing_consumer_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ConfigError, match=r"transformers, which is not installed.*pip install 'encoder-distill\[export\]'"
    ):
        export_encoder(make_student("internvl-hf"), "internvl-hf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- each target, slower ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_every_target_is_published_with_a_difference_within_the_bound(
    exports: dict[str, Exported], format: str
) -> None:
    exported = exports[format]
    manifest = json.loads((exported.directory / "manifest.json").read_text())
    assert exported.verification.worst_difference <= TOLERANCE
    assert manifest["verification"]["worst_difference"] == exported.verification.worst_difference
    assert manifest["features"]["select_layer"] == -1
    assert set(manifest["files"]) >= {"config.json", "model.safetensors", "golden.safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_the_cards_code_loads_the_export_and_reads_the_students_features(
    exports: dict[str, Exported], format: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(exports[format].directory, directory)
    picture = draw_image(56, 56)
    Image.fromarray(picture).save(directory / "photo.png")
    (code,) = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(directory)
    names: dict[str, Any] = {}
    exec(compile(code.replace("photo.jpg", "photo.png"), "README.md", "exec"), names)
    (_, expected) = make_student(format).forward_hidden_states(
        torch.from_numpy(picture).permute(2, 0, 1).unsqueeze(0), num_layers=1
    )[0]
    assert torch.allclose(names["features"], expected.flatten(1, 2), rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "first", "second"),
    [
        ("internvl-hf", "encoder.layer.0.", "encoder.layer.1."),
        ("clip-hf", "vision_model.encoder.layers.0.", "vision_model.encoder.layers.1."),
    ],
)
def test_exchanged_blocks_are_refused_in_the_transformers_targets(
    format: str, first: str, second: str, tmp_path: Path
) -> None:
    write_unpublished(format, tmp_path)
    permute_blocks(tmp_path, first, second)
    with pytest.raises(ExportError, match="other features than the encoder"):
        verify_export(tmp_path)


def drop_prefix(directory: Path) -> None:
    path = directory / "model.safetensors"
    weights = {f"tower.{key}": value for key, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


TAMPERED: list[tuple[str, Callable[[Path], None], str]] = [
    (
        "clip-hf",
        lambda d: edit_json(d / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5]),
        "normalises otherwise",
    ),
    ("internvl-hf", lambda d: edit_json(d / "preprocessor_config.json", resample=2), "resizes otherwise"),
    ("internvl-hf", lambda d: edit_json(d / "preprocessor_config.json", crop_to_patches=True), r"crop or tiling"),
    ("internvl-hf", lambda d: edit_json(d / "config.json", attention_bias=False), "ignores 9"),
    ("internvl-hf", lambda d: edit_json(d / "config.json", use_mean_pooling=False), "misses 2 weights"),
    ("clip-hf", lambda d: edit_json(d / "config.json", hidden_act="gelu"), "other features"),
    ("clip-hf", drop_prefix, "misses|cannot load"),
    ("clip-hf", truncate, "cannot load the clip-hf export"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("format", "tamper", "cause"), TAMPERED)
def test_a_tampered_export_is_refused_with_its_cause(
    format: str, tamper: Callable[[Path], None], cause: str, tmp_path: Path
) -> None:
    write_unpublished(format, tmp_path)
    tamper(tmp_path)
    with pytest.raises(ExportError, match=cause):
        verify_export(tmp_path)


@pytest.mark.slow
def test_a_published_export_verifies_again_and_a_changed_file_is_named(
    exports: dict[str, Exported], tmp_path: Path
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(exports["timm"].directory, directory)
    assert verify_export(directory).worst_difference <= TOLERANCE
    edit_json(directory / "config.json", architecture="vit_tiny_patch16_224")
    with pytest.raises(ExportError, match=r"config\.json is not the file that was published"):
        verify_export(directory)


@pytest.mark.slow
def test_a_consumer_that_hangs_is_given_up(exports: dict[str, Exported]) -> None:
    with pytest.raises(ExportError, match=r"did not end within 0\.05 s"):
        verify_export(exports["timm"].directory, timeout_s=0.05)


# --- inside vision-language models -----------------------------------------------------------------------------------


def text_config(kind: str) -> Any:
    config_class = {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind]
    return config_class(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def prompt(num_image_tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, *[IMAGE_TOKEN] * num_image_tokens, 5, 6]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def check_generation(model: Any, tower: Any, student: Any, directory: Path, num_image_tokens: int) -> None:
    """Generate from an image; compare the tower's features inside with those outside and with the student's."""
    inside: list[torch.Tensor] = []
    model.model.vision_tower.register_forward_hook(lambda _, __, output: inside.append(output.last_hidden_state))
    picture = draw_image(56, 56)
    image = torch.from_numpy(picture).permute(2, 0, 1)
    pixels = AutoImageProcessor.from_pretrained(directory)(Image.fromarray(picture), return_tensors="pt")[
        "pixel_values"
    ]
    inputs = {**prompt(num_image_tokens), "pixel_values": pixels}
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        logits = model(**inputs).logits
        outside = tower(pixels).last_hidden_state
        prefix, patches = student.forward_hidden_states(image.unsqueeze(0), num_layers=1)[0]
    assert ids.shape[-1] == inputs["input_ids"].shape[-1] + 4
    assert torch.equal(inside[0], outside)
    assert torch.allclose(inside[0], torch.cat([prefix, patches.flatten(1, 2)], dim=1), rtol=0, atol=TOLERANCE)
    # The tower is truly in the path: another one gives other logits.
    with torch.no_grad():
        for parameter in model.model.vision_tower.parameters():
            parameter.neg_()
        assert not torch.allclose(model(**inputs).logits, logits)


@pytest.mark.slow
def test_the_internvl_export_generates_inside_internvl_with_the_features_it_has_outside(
    exports: dict[str, Exported],
) -> None:
    directory = exports["internvl-hf"].directory
    tower = InternVLVisionModel.from_pretrained(directory)
    config = InternVLConfig(
        vision_config=tower.config.to_dict(),
        text_config=text_config("qwen2"),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
    )
    model = InternVLForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict(), strict=True)
    check_generation(model, tower, make_student("internvl-hf"), directory, num_image_tokens=4)


@pytest.mark.slow
def test_the_clip_export_generates_inside_llava_with_the_features_it_has_outside(exports: dict[str, Exported]) -> None:
    directory = exports["clip-hf"].directory
    tower = CLIPVisionModel.from_pretrained(directory)
    config = LlavaConfig(
        vision_config=tower.config.to_dict(),
        text_config=text_config("llama"),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict(), strict=True)
    check_generation(model, tower, make_student("clip-hf"), directory, num_image_tokens=16)


# --- the verb --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory as `distill fit` leaves it, with one student of CLIP layout."""
    path = tmp_path / "run"
    (path / "checkpoints").mkdir(parents=True)
    student = {"class_path": "students.CLIPViT", "init_args": {"weights": "random", **SIZES}}
    teacher = {"class_path": "teachers.InternViT", "init_args": {"weights": "/data/InternViT-6B-448px-V1-5"}}
    config = {"seed_everything": 0, "model": {"teachers": {"big": teacher}, "students": {"tiny": student}}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    state = {f"students.tiny.{key}": value for key, value in make_student("clip-hf").state_dict().items()}
    torch.save({"state_dict": state}, path / "checkpoints" / "last.ckpt")
    return path


@pytest.mark.slow
def test_the_verb_publishes_all_that_the_layout_allows_and_says_how_well(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = export(run)
    assert [path.relative_to(run.resolve()) for path in paths] == [Path("exports/clip-hf"), Path("exports/timm")]
    printed = capsys.readouterr().out
    assert "worst difference" in printed
    assert str(paths[0]) in printed
    card = (paths[0] / "README.md").read_text()
    assert "teachers.InternViT(weights=InternViT-6B-448px-V1-5)" in card
    assert "/data" not in card
    with pytest.raises(ExportError, match="holds an export already"):
        export(run, format="timm")


def test_the_verb_refuses_before_it_writes(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'onnx'; choose from internvl-hf, clip-hf, timm, or all"):
        export(run, format=["timm", "onnx"])
    with pytest.raises(ExportError, match="cannot be exported as internvl-hf"):
        export(run, format=["timm", "internvl-hf"])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("")
    with pytest.raises(ExportError, match="is no export"):
        export(run, format="timm", out=tmp_path / "notes", overwrite=True)
    assert not (run / "exports").exists()


@pytest.mark.parametrize("words", ["gguf", "[timm,gguf]"])
def test_the_command_line_takes_one_format_or_a_list(run: Path, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(run), "--format", words])
    assert "error: There is no export format 'gguf'; choose from" in capsys.readouterr().err
