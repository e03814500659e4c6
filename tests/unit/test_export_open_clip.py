"""Target open_clip: the student's tower beside an original text tower, which stays bit for bit what it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from distill.encoder import TimmLayoutEncoder
from distill.errors import ConfigError, ExportError
from distill.export.contract import TOLERANCE
from distill.export.golden import compute_golden, draw_image, write_golden
from distill.export.open_clip_dir import OpenCLIPTarget
from distill.export.run import as_timm_layout, export_encoder
from distill.export.verify import verify_export
from students import CLIPViT, InternViT

pytestmark = pytest.mark.usefixtures("forked_consumers")

SIZES = {"img_size": 56, "embed_dim": 32, "depth": 3, "num_heads": 2}
MODEL = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def make_student(student_class: Any = CLIPViT) -> TimmLayoutEncoder:
    student: nn.Module = student_class(weights="random", **SIZES)
    encoder = as_timm_layout(student)
    encoder.load_weights()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(0.0, 0.2)
    student.eval()
    return encoder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP as open_clip publishes one, of another depth and image size than the student."""
    directory = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(**{**MODEL, "vision_cfg": dict(MODEL["vision_cfg"]), "text_cfg": dict(MODEL["text_cfg"])})
    save_file(model.state_dict(), directory / "open_clip_model.safetensors")
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": {}}))
    (directory / "tokenizer_config.json").write_text("{}")
    return directory


def test_open_clip_reads_the_students_features_and_the_original_text_features(original: Path, tmp_path: Path) -> None:
    student, target = make_student(), OpenCLIPTarget(original)
    target.write(student, tmp_path)
    golden = compute_golden(student, "open_clip")
    got = target.consumer_features(tmp_path, "float32", golden.preprocessing.normalise(golden.image), 2)
    assert (got.missing, got.unexpected) == ([], [])
    for (prefix, patches), (expected_prefix, expected_patches) in zip(got.layers, golden.layers, strict=True):
        assert torch.allclose(prefix, expected_prefix, rtol=0, atol=TOLERANCE)
        assert torch.allclose(patches, expected_patches, rtol=0, atol=TOLERANCE)
    before, _ = open_clip.create_model_from_pretrained(f"local-dir:{original}")
    after, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    tokens = open_clip.get_tokenizer("ViT-B-32")(["a photo of a cat", "a page of text"])
    with torch.inference_mode():
        assert torch.equal(after.eval().encode_text(tokens), before.eval().encode_text(tokens))
    assert torch.equal(after.logit_scale, before.logit_scale)
    assert (tmp_path / "tokenizer_config.json").is_file()


def test_the_image_feature_is_the_class_token_after_the_students_norm_and_the_original_projection(
    original: Path, tmp_path: Path
) -> None:
    student = make_student()
    OpenCLIPTarget(original).write(student, tmp_path)
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    picture = draw_image(56, 56)
    with torch.inference_mode():
        got = model.eval().encode_image(preprocess(Image.fromarray(picture)).unsqueeze(0))
        prefix, _ = student.forward_hidden_states(torch.from_numpy(picture).permute(2, 0, 1)[None], 1)[0]
    state = student.timm_state_dict()
    pooled = nn.functional.layer_norm(prefix[:, 0], (32,), state["norm.weight"], state["norm.bias"], eps=1e-5)
    projection = load_file(original / "open_clip_model.safetensors")["visual.proj"]
    assert torch.allclose(got, pooled @ projection, rtol=0, atol=TOLERANCE)


def test_the_transform_squashes_to_the_students_size(original: Path, tmp_path: Path) -> None:
    student, target = make_student(), OpenCLIPTarget(original)
    target.write(student, tmp_path)
    picture = Image.fromarray(draw_image(90, 131))
    expected = compute_golden(student, "open_clip").preprocessing.prepare(picture)
    assert torch.allclose(target.consumer_pixels(tmp_path, picture), expected, rtol=0, atol=1e-5)


def changed(original: Path, directory: Path, **changes: object) -> Path:
    directory.mkdir()
    config = json.loads((original / "open_clip_config.json").read_text())
    for key, value in changes.items():
        place = config["model_cfg"]["vision_cfg"] if key in ("width", "pool_type", "no_ln_pre") else config["model_cfg"]
        place[key] = value
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    save_file(load_file(original / "open_clip_model.safetensors"), directory / "open_clip_model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"width": 48}, "its vision tower has width 48, the student 32"),
        ({"quick_gelu": False}, "its quick_gelu is False and holds for both towers; the student's activation is quick"),
        ({"pool_type": "avg"}, "its vision_cfg sets pool_type"),
        ({"no_ln_pre": True}, "its vision_cfg sets no_ln_pre"),
        ({"embed_dim": 40}, r"a visual\.proj of shape \(32, 24\); \(32, 40\) fits"),
    ],
)
def test_a_text_tower_that_does_not_fit_is_refused_with_the_reason(
    original: Path, tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    directory, out = changed(original, tmp_path / "other", **changes), tmp_path / "out"
    out.mkdir()
    with pytest.raises(ExportError, match=reason):
        OpenCLIPTarget(directory).write(make_student(), out)
    assert list(out.iterdir()) == []


def test_a_missing_or_damaged_text_tower_is_refused_by_its_flag(original: Path, tmp_path: Path) -> None:
    student = make_student()
    with pytest.raises(ExportError, match="give --text_tower DIR"):
        OpenCLIPTarget().check(student)
    with pytest.raises(ExportError, match="is no open_clip directory: open_clip_config.json is missing"):
        OpenCLIPTarget(tmp_path).check(student)
    broken = changed(original, tmp_path / "broken")
    (broken / "open_clip_model.safetensors").write_bytes(b"1234")
    with pytest.raises(ExportError, match=r"open_clip_model\.safetensors is missing or damaged"):
        OpenCLIPTarget(broken).write(student, tmp_path)
    with pytest.raises(ExportError, match="'internvit' layout cannot be exported as open_clip"):
        OpenCLIPTarget(original).check(make_student(InternViT))


@pytest.mark.slow
def test_it_is_published_after_open_clip_reproduced_it_in_a_fresh_process(original: Path, tmp_path: Path) -> None:
    exported = export_encoder(make_student(), "open_clip", tmp_path / "out", companion=original)
    assert exported.verification.worst_difference <= TOLERANCE
    assert exported.verification.variants[0].latency_ms is not None
    with pytest.raises((ConfigError, ExportError), match="--text_tower"):
        export_encoder(make_student(), "open_clip", tmp_path / "none")


def write_mean(directory: Path) -> None:
    file = directory / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
    file.write_text(json.dumps(config))


def exchange_blocks(directory: Path) -> None:
    file = directory / "open_clip_model.safetensors"
    turned = {".resblocks.0.": ".resblocks.1.", ".resblocks.1.": ".resblocks.0."}
    weights: dict[str, torch.Tensor] = {}
    for key, value in load_file(file).items():
        old = next((part for part in turned if key.startswith("visual.") and part in key), None)
        weights[key.replace(old, turned[old]) if old else key] = value
    save_file(weights, file)


def truncate(directory: Path) -> None:
    file = directory / "open_clip_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def change_depth(directory: Path) -> None:
    file = directory / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 2
    file.write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tamper", "cause"),
    [
        (write_mean, "normalises otherwise"),
        (exchange_blocks, "other features than the encoder"),
        (truncate, "cannot load the open_clip export"),
        (change_depth, "cannot load the open_clip export|ignores"),
    ],
)
def test_a_tampered_export_is_refused_with_its_cause(
    original: Path, tmp_path: Path, tamper: Callable[[Path], None], cause: str
) -> None:
    student = make_student()
    OpenCLIPTarget(original).write(student, tmp_path)
    write_golden(tmp_path, compute_golden(student, "open_clip"))
    tamper(tmp_path)
    with pytest.raises(ExportError, match=cause):
        verify_export(tmp_path)
