"""What the model card and the manifest tell of an encoder's origin, and what they must not tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.checkpoint import RunDir
from distill.export.card import write_card, write_manifest
from distill.export.contract import bind_companion
from distill.export.files import sha256
from distill.export.libmtmd import TESTED_VERSION
from distill.export.provenance import Provenance, Source, read_provenance
from distill.export.run import as_timm_layout
from distill.export.targets import find_target
from distill.export.verify import VariantProof, Verification
from students import CLIPViT

PROOF = VariantProof("float32", "model.safetensors", 4096, 2.5e-7, 1e-5, 0.99999, None, 12.5)
VERIFICATION = Verification((PROOF,), 1.0, "CLIPVisionModel of transformers 5", 3.0)


def make_run(path: Path, weights: str = "/home/someone/weights/InternViT-6B-448px-V1-5") -> RunDir:
    """Write a run's config and metrics, as `distill fit` leaves them."""
    path.mkdir()
    student = {"class_path": "students.CLIPViT", "init_args": {"weights": "/data/clip.safetensors", "img_size": 448}}
    teacher = {"class_path": "teachers.InternViT", "init_args": {"weights": weights}}
    config = {
        "seed_everything": 7,
        "trainer": {"max_steps": 10, "default_root_dir": str(path), "gradient_clip_val": float("inf")},
        "model": {"teachers": {"big": teacher}, "students": {"small": student}, "limit": float("inf")},
        "data": {"class_path": "distill.data.ShardDataModule", "init_args": {"train": "/cluster/secret/natural-*.tar"}},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "metrics.csv").write_text(
        "epoch,loss/total,step,val/cosine/ocr,val/baseline/ocr,val/skill/ocr,val/cosine,val/cosine_layer_-1/ocr\n"
        ",,0,0.25,0.5,-0.5,0.25,0.2\n"
        "0,0.9,4,,,,,\n"
        "0,,9,0.75,0.5,0.5,0.75,0.7\n"
    )
    return RunDir(path)


def test_metrics_are_the_last_values_by_domain_beside_the_first_cosine(tmp_path: Path) -> None:
    provenance = read_provenance(make_run(tmp_path / "run"), "small", "last")
    assert provenance.metrics == {"ocr": {"cosine": 0.75, "initial_cosine": 0.25, "baseline": 0.5, "skill": 0.5}}


def test_metrics_of_several_alignments_are_those_of_the_exported_student(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.config["model"]["students"]["other"] = run.config["model"]["students"]["small"]
    (run.path / "metrics.csv").write_text(
        "step,val/small/big/cosine/ocr,val/other/big/cosine/ocr\n0,0.1,0.2\n9,0.6,nan\n"
    )
    assert read_provenance(run, "small", "last").metrics == {"ocr (big)": {"cosine": 0.6, "initial_cosine": 0.1}}
    assert read_provenance(run, "other", "last").metrics == {"ocr (big)": {"initial_cosine": 0.2}}


def test_the_initial_student_names_no_teacher_and_claims_no_metric(tmp_path: Path) -> None:
    provenance = read_provenance(make_run(tmp_path / "run"), "small", "initial")
    assert [source.role for source in provenance.sources] == ["first weights"]
    assert provenance.metrics == {}


def test_nobodys_folders_are_published(tmp_path: Path) -> None:
    provenance = read_provenance(make_run(tmp_path / "run"), "small", "last")
    text = json.dumps([provenance.recipe, *(source.description for source in provenance.sources)])
    assert "InternViT-6B-448px-V1-5" in text
    assert "natural-*.tar" in text
    for folder in ("/home", "someone", "/cluster", "secret", "/data", str(tmp_path)):
        assert folder not in text


def test_a_licence_is_read_from_the_readme_beside_the_weights_and_else_said_to_be_unknown(tmp_path: Path) -> None:
    weights = tmp_path / "release"
    weights.mkdir()
    (weights / "README.md").write_text("---\nlicense: mit\n---\n# Release\n")
    provenance = read_provenance(make_run(tmp_path / "run", str(weights)), "small", "last")
    assert {source.role: source.licence for source in provenance.sources} == {
        "first weights": "not recorded",
        "teacher big": "mit",
        "training data": "not recorded",
    }


def test_the_licence_of_the_training_data_is_read_from_the_readme_beside_the_shards(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    run = make_run(tmp_path / "run")
    run.config["data"]["init_args"]["train"] = {"natural": str(shards / "natural-*.tar"), "ocr": str(shards)}
    data = [source for source in read_provenance(run, "small", "last").sources if source.role == "training data"]
    assert [(source.description, source.licence) for source in data] == [
        ("natural-*.tar", "cc-by-4.0"),
        ("shards", "cc-by-4.0"),
    ]


@pytest.fixture
def student() -> Any:
    student = CLIPViT(weights="random", img_size=28, embed_dim=16, depth=2, num_heads=2)
    student.load_weights()
    return as_timm_layout(student.eval())


def test_the_card_has_front_matter_that_claims_no_licence_it_does_not_know(tmp_path: Path, student: Any) -> None:
    provenance = Provenance("small", sources=(Source("first weights", "students.CLIPViT()"),))
    write_card(tmp_path, student, find_target("clip-hf"), provenance, VERIFICATION)
    _, front, body = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "other"
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "| first weights | `students.CLIPViT()` | not recorded |" in body
    assert "check it before you publish" in body
    assert "select_layer = -1" in body
    assert "28 x 28 px into a 2 x 2 grid" in body
    assert "| `model.safetensors` | float32 | 0.0 MB | 2.5e-07 | 0.999990 | 12.5 ms |" in body


def test_the_card_shows_each_domain_before_and_after(tmp_path: Path, student: Any) -> None:
    provenance = read_provenance(make_run(tmp_path / "run"), "small", "last")
    write_card(tmp_path, student, find_target("clip-hf"), provenance, VERIFICATION)
    text = (tmp_path / "README.md").read_text()
    assert "| ocr | 0.2500 | 0.7500 | 0.5000 | 0.5000 |" in text
    assert "max_steps: 10" in text


def test_the_manifest_describes_the_features_and_hashes_every_file_but_the_card(tmp_path: Path, student: Any) -> None:
    target = find_target("clip-hf")
    target.write(student, tmp_path)
    provenance = read_provenance(make_run(tmp_path.parent / f"{tmp_path.name}-run"), "small", "last")
    write_card(tmp_path, student, target, provenance, VERIFICATION)
    write_manifest(tmp_path, student, target, provenance, VERIFICATION)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["format"] == "distill-export/2"
    assert manifest["preprocessing"]["resize"] == "squash"
    assert manifest["architecture"]["num_prefix_tokens"] == 1
    assert set(manifest["files"]) == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert manifest["files"]["config.json"]["sha256"] == sha256(tmp_path / "config.json")
    assert manifest["recipe"]["model"]["limit"] == "inf"  # JSON has no infinity


def test_a_file_address_is_published_as_its_last_part(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.config["data"]["init_args"]["train"] = ["file:///home/someone/shards/natural-*.tar", "s3://bucket/a/b-*.tar"]
    provenance = read_provenance(run, "small", "last")
    texts = [source.description for source in provenance.sources if source.role == "training data"]
    assert texts == ["natural-*.tar", "s3://bucket/a/b-*.tar"]
    assert "someone" not in json.dumps(provenance.recipe)


READINGS = [
    ("clip-hf", True, "1 token(s) in front of the patches; drop them", "The config in this directory"),
    ("timm", False, "not in `features`", "The config in this directory"),
    ("open_clip", False, "not in `features`", "The config in this directory"),
    ("onnx", False, "a second output (`prefix_tokens`)", "preprocessor.json has the numbers"),
    ("pt2", False, "a second output (`prefix_tokens`)", "preprocessor.json has the numbers"),
    ("executorch", False, "a second output (`prefix_tokens`)", "preprocessor.json has the numbers"),
    ("gguf", False, "which llama.cpp drops", "There is no config file"),
]


@pytest.mark.parametrize(("format", "in_output", "class_token", "preprocessing"), READINGS)
def test_card_and_manifest_say_where_this_formats_class_token_is(
    format: str, in_output: bool, class_token: str, preprocessing: str, tmp_path: Path, student: Any
) -> None:
    target = find_target(format)
    write_card(tmp_path, student, target, Provenance("small"), VERIFICATION)
    write_manifest(tmp_path, student, target, Provenance("small"), VERIFICATION)
    card = (tmp_path / "README.md").read_text()
    assert class_token in card
    assert preprocessing in card
    assert ("drop them" in card) is in_output
    assert ("gave the projected features of one fixed image" in card) is (format == "gguf")
    assert 'directory = "/path/to/export"' in card
    features = json.loads((tmp_path / "manifest.json").read_text())["features"]
    assert (features["has_cls"], features["cls_in_output"]) == (True, in_output)


@pytest.mark.parametrize(("format", "role"), [("open_clip", "text tower"), ("gguf", "projector")])
def test_what_was_given_beside_the_encoder_is_in_the_licences(
    format: str, role: str, tmp_path: Path, student: Any
) -> None:
    target = bind_companion(find_target(format), Path("/home/someone/original"))
    write_card(tmp_path, student, target, Provenance("small"), VERIFICATION)
    write_manifest(tmp_path, student, target, Provenance("small"), VERIFICATION)
    assert f"| {role} | `original` | terms of the directory given |" in (tmp_path / "README.md").read_text()
    sources = json.loads((tmp_path / "manifest.json").read_text())["sources"]
    assert [(source["role"], source["description"]) for source in sources] == [(role, "original")]


def test_the_gguf_card_names_the_tested_release_and_how_to_check_another(tmp_path: Path, student: Any) -> None:
    write_card(tmp_path, student, find_target("gguf"), Provenance("small"), VERIFICATION)
    card = (tmp_path / "README.md").read_text()
    assert f"llama-cpp-python {TESTED_VERSION}" in card
    assert "Another llama.cpp may read the class token's position from another row" in card
    assert "verify_export(directory)" in card
