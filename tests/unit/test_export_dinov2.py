"""Target `dinov2-hf`: the InternViT student by transformers' own classes, without remote code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distill.errors import ExportError
from distill.export.golden import compute_golden, write_golden
from distill.export.targets import find_target
from distill.export.verify import verify_export
from students import CLIPViT, InternViT, TimmStudent

pytestmark = pytest.mark.usefixtures("forked_consumers")

transformers = pytest.importorskip("transformers", reason="the consumer is an optional extra")

TOLERANCE = 1e-5  # the bound that an export is held to, float32
SIZES = {"img_size": 56, "embed_dim": 32, "depth": 3, "num_heads": 2}


def make_student(student_class: type[nn.Module] = InternViT, **sizes: Any) -> Any:
    student: Any = student_class(weights="random", **{**SIZES, **sizes})
    student.load_weights()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(0.0, 0.1)
    return student.eval()


def write_export(directory: Path, **sizes: Any) -> Any:
    student = make_student(**sizes)
    find_target("dinov2-hf").write(student, directory)
    write_golden(directory, compute_golden(student, "dinov2-hf"))
    return student


@pytest.mark.parametrize("sizes", [{}, {"mlp_ratio": 2.0}, {"act": "quick_gelu"}])
def test_hidden_states_are_the_students_and_the_last_one_is_not_normed(sizes: dict[str, Any], tmp_path: Path) -> None:
    student = write_export(tmp_path, **sizes)
    golden = compute_golden(student, "dinov2-hf", num_layers=3)
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        output = model(golden.preprocessing.normalise(golden.image), output_hidden_states=True)
    for state, (prefix, patches) in zip(output.hidden_states[1:], golden.layers, strict=True):
        assert torch.allclose(state, torch.cat([prefix, patches.flatten(1, 2)], dim=1), rtol=0, atol=TOLERANCE)
    # Why the card reads hidden_states[-1]: the class has one norm more.
    assert (output.last_hidden_state[:, 1:] - golden.layers[-1][1].flatten(1, 2)).abs().max() > 0.1


def test_the_backbone_gives_unnormed_maps_by_what_the_config_says(tmp_path: Path) -> None:
    student = write_export(tmp_path)
    golden = compute_golden(student, "dinov2-hf")
    backbone = transformers.Dinov2Backbone.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        (maps,) = backbone(golden.preprocessing.normalise(golden.image)).feature_maps
    assert torch.allclose(maps.permute(0, 2, 3, 1), golden.layers[-1][1], rtol=0, atol=TOLERANCE)


def test_keys_are_those_that_transformers_4_reads(tmp_path: Path) -> None:
    write_export(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "encoder.layer.0.attention.attention.query.weight" in weights
    assert "encoder.layer.2.layer_scale2.lambda1" in weights
    assert torch.equal(weights["layernorm.weight"], torch.ones(32))
    assert torch.equal(weights["layernorm.bias"], torch.zeros(32))
    assert torch.equal(weights["embeddings.mask_token"], torch.zeros(1, 32))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["mlp_ratio"], config["image_size"], config["layer_norm_eps"]) == (4, 56, 1e-6)
    assert config["apply_layernorm"] is False


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: make_student(CLIPViT), r"LayerNorm in front of the first block .* Use clip-hf or timm"),
    (lambda: make_student(mlp_ratio=2.5), r"80 wide at embed_dim 32, .* Use internvl or internvl-hf"),
    (lambda: TimmStudent("test_efficientnet", weights="random", img_size=64), "nothing else. Use timm"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_a_student_that_the_class_cannot_compute_is_refused(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        find_target("dinov2-hf").check(make())


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def exchange_blocks(directory: Path) -> None:
    path, other = directory / "model.safetensors", {"0": "1", "1": "0"}
    weights = load_file(path)
    swapped = {re.sub(r"(?<=layer\.)[01]", lambda match: other[match[0]], key): value for key, value in weights.items()}
    save_file(swapped, path, metadata={"format": "pt"})


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


TAMPERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "exchanged blocks": (exchange_blocks, "other features than the encoder"),
    "activation": (lambda d: edit_json(d / "config.json", hidden_act="relu"), "other features than the encoder"),
    "bias": (lambda d: edit_json(d / "config.json", qkv_bias=False), "ignores 9"),
    "mean": (lambda d: edit_json(d / "preprocessor_config.json", image_mean=[0.5] * 3), "normalises otherwise"),
    "truncated": (truncate, "cannot load the dinov2-hf export"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", list(TAMPERED))
def test_a_tampered_export_is_refused_with_its_cause(case: str, tmp_path: Path) -> None:
    tamper, cause = TAMPERED[case]
    write_export(tmp_path)
    tamper(tmp_path)
    with pytest.raises(ExportError, match=cause):
        verify_export(tmp_path)
