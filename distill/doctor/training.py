"""A real run of a few steps on drawn images, and a resumed one that must end with the same weights."""

from __future__ import annotations

import io
import logging
import tarfile
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from distill.checkpoint import load_student
from distill.data.pack.durable import durable_file
from distill.doctor.verdict import Verdict
from distill.errors import DistillError
from distill.training_cli import run

STEPS = 2
_IMAGES = 16
_SIDE_PX = 64


def check_two_steps(folder: Path) -> Verdict:
    """Train two steps through `distill fit` in a folder; the checkpoint and the log have to be there.

    Raises:
        DistillError: training refuses.
    """
    draw_shards(folder / "data")
    recipe = write_recipe(folder)
    train(recipe, folder / "straight", 2 * STEPS)
    train(recipe, folder / "resumed", STEPS)
    missing = [name for name in ("checkpoints/last.ckpt", "metrics.csv", "config.yaml") if not exists(folder, name)]
    if missing:
        return Verdict(
            "two-step run", "failed", f"{', '.join(missing)} not written", "Run it by hand and read its log."
        )
    return Verdict("two-step run", "ok", f"{STEPS} steps trained, validated and saved")


def check_resume(folder: Path) -> Verdict:
    """Go on with the run of `check_two_steps`, and compare with one that was not interrupted.

    Raises:
        DistillError: training refuses.
    """
    train(folder / "recipe.yaml", folder / "resumed", 2 * STEPS, "--resume=auto")
    straight, resumed = (student_weights(folder / name) for name in ("straight", "resumed"))
    differing = [name for name in straight if not torch.equal(straight[name], resumed[name])]
    if differing:
        found = f"{len(differing)} of {len(straight)} tensors differ from a run that was not interrupted"
        way_out = "On a GPU that can be rounding; set trainer.deterministic to true. On a CPU it is a fault: report it."
        return Verdict("resume", "warning" if torch.cuda.is_available() else "failed", found, way_out)
    return Verdict("resume", "ok", f"{STEPS} + {STEPS} steps end with the same weights as {2 * STEPS}, bit for bit")


def check_training() -> list[Verdict]:
    """Carry out both in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="distill-doctor-") as name:
        folder = Path(name)
        try:
            first = check_two_steps(folder)
            return [first, check_resume(folder)] if first.status == "ok" else [first]
        except (DistillError, OSError, RuntimeError, SystemExit) as error:
            reason = " ".join(str(error).split())[:400]
            kind = type(error).__name__
            return [Verdict("two-step run", "failed", f"{kind}: {reason}", "Mend what the message names.")]


def exists(folder: Path, name: str) -> bool:
    """Whether the run of `check_two_steps` has written a file."""
    return (folder / "resumed" / name).is_file()


def train(recipe: Path, run_dir: Path, steps: int, *more: str) -> None:
    """Run `distill fit` in this process, without its output."""
    words = ["fit", "--config", str(recipe), f"--trainer.default_root_dir={run_dir}", f"--trainer.max_steps={steps}"]
    said = io.StringIO()
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)  # what Lightning tells goes to the terminal by itself
    try:
        with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(said):
            warnings.simplefilter("ignore")
            run([*words, *more])
    finally:
        logging.disable(disabled)


def student_weights(run_dir: Path) -> dict[str, Tensor]:
    """Return the trained weights of a run's student."""
    return load_student(run_dir)[1].state_dict()


def draw_shards(folder: Path) -> None:
    """Write one training and one validation shard of smooth coloured images."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        with durable_file(folder / split / "drawn-000000.tar") as file, tarfile.open(fileobj=file, mode="w") as tar:
            for number in range(_IMAGES):
                coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
                stream = io.BytesIO()
                coarse.resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BICUBIC).save(stream, "JPEG")
                member = tarfile.TarInfo(f"{number:06d}.jpg")
                member.size = stream.tell()
                stream.seek(0)
                tar.addfile(member, stream)


def write_recipe(folder: Path) -> Path:
    """Write a recipe of small random encoders, with a learning rate that does not depend on the number of steps."""
    teacher = {"model_name": "test_vit", "weights": "random", "img_size": _SIDE_PX}
    student = {"weights": "random", "img_size": _SIDE_PX, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    recipe = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "auto",
            "devices": 1,
            "precision": "32-true",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        },
        "model": {
            "teachers": {"teacher": {"class_path": "teachers.TimmTeacher", "init_args": teacher}},
            "students": {"student": {"class_path": "students.InternViT", "init_args": student}},
            "alignments": [{"student": "student", "teacher": "teacher", "num_layers": 1}],
            "optimizer": {"warmup_fraction": 0.0, "final_fraction": 1.0},
        },
        "data": {
            "train": str(folder / "data" / "train"),
            "val": str(folder / "data" / "val"),
            "img_size_px": _SIDE_PX,
            "global_batch_size": 4,
            "num_workers": 0,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
