"""Exports as strangers meet them: verified in fresh processes, refused when tampered with."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from distill.cli import main
from distill.errors import ConfigError, ExportError
from distill.export import executorch_file, fresh_process, onnx_graph, weights
from distill.export.compare import RESIZE_MAX_LEVELS, RESIZE_MEAN_LEVELS
from distill.export.golden import compute_golden, draw_image, read_golden, write_golden
from distill.export.run import Exported, export, export_encoder
from distill.export.targets import TARGETS, find_target
from distill.export.verify import TOLERANCE, verify_export
from students import CLIPViT, InternViT

pytestmark = pytest.mark.usefixtures("forked_consumers")

SIZES = {"img_size": 56, "embed_dim": 32, "depth": 3, "num_heads": 2}
STUDENTS: dict[str, Callable[..., nn.Module]] = {"internvl-hf": InternViT, "clip-hf": CLIPViT, "timm": InternViT}
FORMATS = list(STUDENTS)


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


@pytest.fixture
def new_consumers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load exports in new interpreters, as a user's are."""
    monkeypatch.setattr(fresh_process, "subprocess", subprocess)


@pytest.mark.usefixtures("new_consumers")
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
    (variant,) = manifest["verification"]["variants"]
    assert variant["name"] == "float32"
    assert variant["min_cosine"] > 0.999999
    assert variant["latency_ms"] > 0
    assert variant["size_bytes"] == (exported.directory / variant["file"]).stat().st_size
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
    exec(
        compile(code.replace("photo.jpg", "photo.png").replace("/path/to/export", str(directory)), "README.md", "exec"),
        names,
    )
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
@pytest.mark.usefixtures("new_consumers")
def test_a_consumer_that_hangs_is_given_up(exports: dict[str, Exported]) -> None:
    with pytest.raises(ExportError, match=r"did not end within 0\.05 s"):
        verify_export(exports["timm"].directory, timeout_s=0.05)


# --- preprocessing of real images ------------------------------------------------------------------------------------

IMAGES = Path(__file__).resolve().parents[3] / "shared" / "assets" / "images"


def real_images() -> list[Path]:
    """Return one image of each data set that lies beside the project."""
    files = [sorted(file for file in folder.rglob("*.*") if file.is_file()) for folder in sorted(IMAGES.glob("*"))]
    return [found[len(found) // 2] for found in files if found]


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_real_images_are_prepared_as_the_student_saw_them(exports: dict[str, Exported], format: str) -> None:
    files = real_images()
    if not files:
        pytest.skip("no real images beside the project (shared/assets/images)")
    directory = exports[format].directory
    preprocessing = read_golden(directory).preprocessing
    for file in files:
        image = Image.open(file).convert("RGB")
        got, expected = find_target(format).consumer_pixels(directory, image), preprocessing.prepare(image)
        levels = (got - expected).abs() * 255 * torch.tensor(preprocessing.image_std).view(3, 1, 1)
        assert levels.max() <= RESIZE_MAX_LEVELS, file
        assert levels.mean() <= RESIZE_MEAN_LEVELS, file


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
def test_the_verb_publishes_all_that_is_possible_and_names_the_rest_with_the_reason(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long to translate; test_docs_exports.py publishes them among all others, test_export_onnx.py checks CLIP's graph.
    for target in (executorch_file, onnx_graph):
        monkeypatch.setattr(target, "REQUIRES", ("no_such_package",))
    paths = export(run)
    names = [path.relative_to(run.resolve() / "exports").name for path in paths]
    assert {"clip-hf", "timm"} <= set(names)
    printed = capsys.readouterr().out
    for word in ("worst difference", "cosine", "latency, batch 1", str(paths[0])):
        assert word in " ".join(printed.split())
    left_out = re.findall(r"^left out: (\S+): (.+)$", printed, re.MULTILINE)
    assert sorted([*names, *(name for name, _ in left_out)]) == sorted(TARGETS)
    reasons = dict(left_out)
    assert "LayerNorm in front of the first block" in reasons["internvl-hf"]
    assert "--text_tower" in reasons["open_clip"]
    assert all("no_such_package, which is not installed" in reasons[name] for name in ("executorch", "onnx"))
    card = (run / "exports" / "timm" / "README.md").read_text()
    assert "teachers.InternViT(weights=InternViT-6B-448px-V1-5)" in card
    assert "/data" not in card
    with pytest.raises(ExportError, match="holds an export already"):
        export(run, format="timm")


@pytest.mark.slow
def test_one_export_that_fails_is_named_and_does_not_keep_the_others_from_being_published(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(weights.ACTIVATION_NAMES, ("QuickGELU", "none"), "gelu")  # a wrong config field
    with pytest.raises(ExportError, match=r"1 of 2 exports failed\. clip-hf: .* other features than the encoder"):
        export(run, format=["clip-hf", "timm"])
    assert [path.name for path in (run / "exports").iterdir()] == ["timm"]
    assert "FAILED: clip-hf" in capsys.readouterr().out


@pytest.mark.slow
def test_depth_and_size_are_changed_by_flags_and_recorded(run: Path) -> None:
    (path,) = export(run, format="timm", out=run / "small", layers=2, img_size=28)
    features = json.loads((path / "manifest.json").read_text())["features"]
    assert (features["layers_kept"], features["layers_of_the_student"]) == (2, 3)
    assert features["position_embedding_resized_by_export"] is True
    assert features["position_embedding_method"] == "bicubic, antialias, float32"
    assert features["position_embedding_from_img_size"] == 56
    assert features["trained_layers"] == [-1, -2]  # of the recipe's four, the cut took one, and two are left
    card = (path / "README.md").read_text()
    assert "the first 2 of the student's 3 layers" in card
    assert "from 56 px to 28 px (bicubic, antialias, float32)" in card
    state = load_file(path / "model.safetensors")
    assert state["pos_embed"].shape[1] == 5
    assert verify_export(path).worst_difference <= TOLERANCE


def test_the_verb_refuses_before_it_writes(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'mlx'; choose from internvl, internvl-hf, .*, or all"):
        export(run, format=["timm", "mlx"])
    with pytest.raises(ConfigError, match="--text_tower is used by open_clip, which --format leaves out"):
        export(run, format="timm", text_tower=tmp_path)
    with pytest.raises(ConfigError, match=r"--layers 9 is out of range"):
        export(run, format="timm", layers=9)
    with pytest.raises(ConfigError, match=r"--into DIR needs --out NEW"):
        export(run, into=tmp_path)
    for flags in ({"format": "timm"}, {"overwrite": True}, {"projector": tmp_path}, {"text_tower": tmp_path}):
        with pytest.raises(ConfigError, match=f"--into takes no --{next(iter(flags))}"):
            export(run, into=tmp_path, out=tmp_path / "new", **cast(Any, flags))
    with pytest.raises(ExportError, match="cannot be exported as internvl-hf"):
        export(run, format=["timm", "internvl-hf"])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("")
    with pytest.raises(ExportError, match="is no export"):
        export(run, format="timm", out=tmp_path / "notes", overwrite=True)
    assert not (run / "exports").exists()


@pytest.mark.parametrize("words", ["mlx", "[timm,mlx]"])
def test_the_command_line_takes_one_format_or_a_list(run: Path, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(run), "--format", words])
    assert "error: There is no export format 'mlx'; choose from" in capsys.readouterr().err
