"""The evidence study from images to tables, with tiny random encoders on generated images; and its real recipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT.parent / "shared" / "assets"
SIZE_PX = 64
TINY = {"model_name": "test_convnext", "weights": "random"}
RECIPE = {
    "seed_everything": 0,
    "trainer": {"accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0, "enable_progress_bar": False},
    "model": {
        "teachers": {"teacher": {"class_path": "teachers.TimmTeacher", "init_args": TINY | {"seed": 1}}},
        "students": {"student": {"class_path": "students.TimmStudent", "init_args": TINY | {"img_size": SIZE_PX}}},
        "alignments": [{"student": "student", "teacher": "teacher", "num_layers": 1, "head": "none"}],
        "calibration_batches": 1,
    },
    "data": {
        "train": "runs/evidence/data/train",
        "val": "runs/evidence/data/val",
        "img_size_px": SIZE_PX,
        "global_batch_size": 4,
        "augment": {"reencode": "none"},
        "num_workers": 0,
        "samples_per_epoch": 8,
    },
}
STUDY = {
    "variants": {
        "ours": {
            "title": "ours",
            "base": "base.yaml",
            "states": "teacher",
            "changes": {"model.alignments.0.standardise": "procrustes"},
        },
    },
    "settings": {
        "tiny": {
            "img_size_px": SIZE_PX,
            "datasets": ["trashnet"],
            "rungs": ["knn", "linear"],
            "seeds": [0],
            "variants": ["ours"],
            "report": "ours",
        }
    },
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    rows = []
    for number in range(48):
        label = "ab"[number % 2]
        path = f"images/trashnet/{label}/{number}.jpg"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        blocks = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((SIZE_PX, SIZE_PX), Image.Resampling.NEAREST).save(folder / path)
        rows.append({"path": path, "dataset": "trashnet", "domain": "natural", "label": label})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run_study(setting: str, study: Path, assets: Path, work: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(ROOT / "scripts" / "evidence" / "study.py"), setting]
    words += ["--study", str(study), "--assets", str(assets), "--work", str(work)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=1200, env=environment, cwd=ROOT)


@pytest.mark.slow
def test_the_study_goes_on_where_it_was_stopped_and_ends_in_tables(assets: Path, tmp_path: Path) -> None:
    configs, work = tmp_path / "configs", tmp_path / "work"
    configs.mkdir()
    (configs / "base.yaml").write_text(yaml.safe_dump(RECIPE))
    (configs / "study.yaml").write_text(yaml.safe_dump(STUDY))
    first = run_study("tiny", configs / "study.yaml", assets, work)
    assert first.returncode == 0, first.stdout + first.stderr
    runs = work / "tiny"
    text = (runs / "results.md").read_text()
    for row in ("initialisation", "| ours |", "teacher teacher"):
        assert row in text
    run = runs / "ours-seed0"
    shown = json.loads((run / "probe.json").read_text())
    assert [encoder["role"] for encoder in shown["encoders"]] == ["initial", "student", "teacher"]
    assert (runs / "report.html").stat().st_size > 10_000
    cost = json.loads((run / "cost.json").read_text())
    assert cost["images"] == 8
    assert cost["cpu_s"] > 0
    trained = (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    # As if it had been stopped while it judged: all else is there.
    (run / "judge" / "trashnet.json").unlink()
    second = run_study("tiny", configs / "study.yaml", assets, work)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("there already") == 6
    assert (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns == trained
    assert (runs / "results.md").read_text() == text


@pytest.mark.slow
def test_the_assets_student_and_teachers_load_as_the_recipes_name_them() -> None:
    if not (ASSETS / "weights").is_dir():
        pytest.skip(f"the study's weights are not there: {ASSETS / 'weights'}")
    import torch

    from distill.checkpoint import build_encoder

    sys.path.insert(0, str(ROOT / "scripts" / "evidence"))
    import variants

    study = variants.read_study(ROOT / "configs" / "evidence" / "study.yaml", "controls", ASSETS, ASSETS)
    recipe = next(variant.recipe["model"] for variant in study.variants if variant.name == "both_teachers")
    teachers = recipe["teachers"]
    grids = {}
    for name, spec in {**recipe["students"], **teachers}.items():
        encoder = build_encoder(spec)
        encoder.load_weights()
        with torch.no_grad():
            images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
            grids[name] = tuple(encoder.eval().forward_hidden_states(images, 1)[0][1].shape[1:])
    assert grids == {"tinyvit": (4, 4, 320), "lite2": (2, 2, 352), "resnet50": (2, 2, 2048)}
