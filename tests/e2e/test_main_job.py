"""The main job through the command line: draw, distil, validate, export, probe, report, at toy size."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forked_python
import pytest
import torch
import yaml
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

TEACHER = {
    "class_path": "teachers.TimmTeacher",
    "init_args": {"model_name": "resnet10t", "weights": "random", "dtype": "float32"},
}
STUDENT = {
    "class_path": "students.InternViT",
    "init_args": {
        "weights": "random",
        "img_size": 64,
        "patch_size": 16,
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 2,
    },
}


def distill(*words: str, check: bool = True, is_new: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own; `is_new` says in a new interpreter, as a user does."""
    command = [sys.executable, "-m", "distill", *words]
    if is_new:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    else:
        result = forked_python.run(command, timeout=900)
    if check:
        assert result.returncode == 0, f"{' '.join(words)}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("main_job")
    for split, count in (("train", "24"), ("heldout", "80")):
        words = ["--split", split, "--images_per_domain", count, "--img_size_px", "64", "--num_workers", "1"]
        distill("synthesize", str(folder / split), *words)
    settings = {
        "seed_everything": 0,
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "accelerator": "cpu",
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {
            "teachers": {"resnet": TEACHER},
            "students": {"vit": STUDENT},
            "alignments": [{"student": "vit", "teacher": "resnet", "num_layers": 2, "standardise": "mean_std"}],
            "calibration_batches": 2,
            "optimizer": {"lr_student": 0.001, "lr_heads": 0.01},
        },
        "data": {
            "train": str(folder / "train"),
            "val": str(folder / "heldout"),
            "img_size_px": 64,
            "global_batch_size": 16,
            "num_workers": 0,
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(scope="module")
def run(recipe: Path) -> Path:
    distill("fit", "--config", str(recipe), is_new=True)
    return recipe.parent / "run"


def test_fit_leaves_recipe_checkpoint_initial_weights_and_metrics(run: Path) -> None:
    assert {"config.yaml", "metrics.csv", "checkpoints", "initial", "tensorboard"} <= {f.name for f in run.iterdir()}
    with (run / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    first = next(row for row in rows if row.get("val/skill"))
    last = [row for row in rows if row.get("val/skill")][-1]
    assert first["step"] == "0"
    assert float(last["val/skill"]) > float(first["val/skill"])
    for domain in ("natural", "ocr", "chart", "multidisciplinary"):
        for column in (f"val/cosine/{domain}", f"val/cosine_layer_-1/{domain}", f"val/baseline/{domain}"):
            assert last[column]


def test_the_checkpoint_holds_no_teacher_tensor(run: Path) -> None:
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert state
    assert {key.split(".")[0] for key in state} == {"students", "alignments"}


def test_validate_repeats_the_last_values_from_the_checkpoint(run: Path, recipe: Path) -> None:
    before = (run / "config.yaml").read_text()
    ckpt = str(run / "checkpoints" / "last.ckpt")
    other = str(recipe.parent / "validation")
    words = ["--config", str(recipe), "--ckpt_path", ckpt, "--trainer.default_root_dir", other]
    out = distill("validate", *words).stdout
    assert "val/skill" in out
    with (run / "metrics.csv").open() as stream:
        last = [row for row in csv.DictReader(stream) if row.get("val/skill")][-1]
    with (Path(other) / "validation" / "metrics.csv").open() as stream:
        again = next(csv.DictReader(stream))
    assert float(again["val/skill"]) == pytest.approx(float(last["val/skill"]), abs=1e-5)
    assert (run / "config.yaml").read_text() == before


def test_a_resumed_fit_goes_on_where_the_first_ended_and_keeps_its_log(run: Path, recipe: Path) -> None:
    same = recipe.parent / "resumed"
    shutil.copytree(run, same)
    words = ["--config", str(recipe), "--trainer.default_root_dir", str(same), "--trainer.max_epochs", "3"]
    before = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    distill("fit", *words, "--ckpt_path", str(same / "checkpoints" / "last.ckpt"))
    after = torch.load(same / "checkpoints" / "last.ckpt", weights_only=True)
    assert (before["global_step"], after["global_step"]) == (12, 18)
    assert after["initial_metrics"] == before["initial_metrics"]
    with (same / "metrics.csv").open() as stream:
        steps = [int(row["step"]) for row in csv.DictReader(stream) if row.get("loss/total")]
    assert steps == list(range(12, 18))
    assert (same / "metrics-1.csv").read_text() == (run / "metrics.csv").read_text()


def test_a_run_resumed_into_another_folder_takes_the_initial_student_along(run: Path, recipe: Path) -> None:
    other = recipe.parent / "elsewhere"
    words = ["--config", str(recipe), "--trainer.default_root_dir", str(other), "--trainer.max_steps", "13"]
    distill("fit", *words, "--trainer.max_epochs", "3", "--ckpt_path", str(run / "checkpoints" / "last.ckpt"))
    assert (other / "initial" / "vit.safetensors").read_bytes() == (run / "initial" / "vit.safetensors").read_bytes()


def test_two_ranks_train_what_one_does(run: Path, recipe: Path) -> None:
    other = recipe.parent / "two_ranks"
    words = ["--config", str(recipe), "--trainer.default_root_dir", str(other), "--trainer.devices", "2"]
    distill("fit", *words, "--trainer.strategy", "ddp", "--trainer.use_distributed_sampler", "false")
    one = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    two = torch.load(other / "checkpoints" / "last.ckpt", weights_only=True)
    assert two["global_step"] == one["global_step"]
    for key in one["initial_metrics"]:
        assert two["initial_metrics"][key] == pytest.approx(one["initial_metrics"][key], abs=1e-5), key
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for key, value in one["state_dict"].items():  # standardisers included; ranks add up in another order
        assert torch.allclose(value.float(), two["state_dict"][key].float(), rtol=1e-3, atol=2e-3), key


def test_a_new_fit_in_the_same_folder_keeps_the_earlier_log_apart(run: Path, recipe: Path) -> None:
    same = recipe.parent / "again"
    shutil.copytree(run, same)
    words = ["--config", str(recipe), "--trainer.default_root_dir", str(same)]
    distill("fit", *words, "--trainer.max_steps", "1", "--trainer.max_epochs", "1")
    assert (same / "earlier-1" / "metrics.csv").read_text() == (run / "metrics.csv").read_text()
    assert torch.load(same / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1


def export(run: Path) -> None:
    """Export as scripts/demo.sh does; test_docs_exports.py exports in all formats at once."""
    distill("export", str(run), "--format", "[internvl-hf,timm]", is_new=True)


def test_export_probe_and_report_follow(run: Path, recipe: Path) -> None:
    export(run)
    assert {folder.name for folder in (run / "exports").iterdir()} == {"internvl-hf", "timm"}
    distill(
        "probe",
        str(run),
        "--data",
        str(recipe.parent / "heldout"),
        "--img_size_px",
        "64",
        "--rungs",
        "[linear,knn,fidelity]",
        is_new=True,
    )
    result = json.loads((run / "probe.json").read_text())
    assert [encoder["role"] for encoder in result["encoders"]] == ["initial", "student", "teacher"]
    assert set(result["data"]["domains"]) == {"natural", "ocr", "chart", "multidisciplinary"}
    distill("report", str(run), is_new=True)
    page = (run / "report.html").read_text()
    assert "data:image/" in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert not re.findall(r"url\((?!data:|#)", page)  # thumbnails that appear twice are in the style once
    assert list((run / "figures").glob("*.png"))


def test_the_readmes_python_runs_on_a_runs_exports(run: Path, tmp_path: Path) -> None:
    if not (run / "exports").is_dir():
        export(run)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    Image.new("RGB", (80, 50), (200, 30, 30)).save(tmp_path / "image.png")
    for block in blocks:
        code = block.replace("runs/demo", str(run)).replace('"image.png"', repr(str(tmp_path / "image.png")))
        assert code.count(str(run)) == 1
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.weights", "{natural: 1.0, maps: 1.0}"], "maps"),
        (["--data.img_size_px", "60"], "patch"),
        (["--model.students.vit.init_args.img_size", "60"], "60"),
        (["--data.train", "nowhere-*.tar"], "nowhere-"),
        (["--model.alignments", "[{student: vit, teacher: resnet, num_layers: 9}]"], "num_layers 9"),
        (["--model.teachers.resnet.init_args.weights", "gone.safetensors"], "gone.safetensors"),
    ],
)
def test_bad_input_is_one_clear_error_without_a_traceback(recipe: Path, words: list[str], message: str) -> None:
    other = str(recipe.parent / "never")
    result = distill("fit", "--config", str(recipe), "--trainer.default_root_dir", other, *words, check=False)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (recipe.parent / "never" / "checkpoints").exists()
