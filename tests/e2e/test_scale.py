"""Two ranks, with whole and with sharded teachers, train as one process does; torchrun as the documentation has it."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds
import yaml
from PIL import Image
from safetensors.torch import save_file

from distill.checkpoint import read_checkpoint
from teachers import InternViT, InternViTConfig

pytestmark = pytest.mark.slow

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports each test file by itself
RankProcesses = import_module("rank_processes").RankProcesses

ROOT = Path(__file__).resolve().parents[2]
TEACHER = InternViTConfig(embed_dim=48, depth=3, num_heads=2, mlp_dim=96, img_size=56)
LOSS_TOLERANCE = 1e-5  # float32, other batch sizes a process: kernels round differently
STEPS = 20
SHARDED = "--model.engine.teacher_sharding=blocks"
DDP = ("--trainer.devices=2", "--trainer.strategy=ddp")


def write_release(folder: Path) -> None:
    """Write a tiny InternViT as the release's files are: two shards, an index and a config."""
    folder.mkdir()
    model = InternViT("random", TEACHER, dtype="float32", seed=5)
    model.load_weights()
    tensors, names = model.state_dict(), sorted(model.state_dict())
    weight_map = {}
    for number, members in enumerate((names[::2], names[1::2])):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name].contiguous() for name in members}, folder / file)
        weight_map |= dict.fromkeys(members, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "intern_vit_6b", "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96, "image_size": 56}))


def write_validation_shards(folder: Path) -> None:
    """Write 13 images: of two ranks one has 7 and the other 6."""
    folder.mkdir()
    noise = torch.Generator().manual_seed(0)
    for domain, count in {"natural": 7, "ocr": 6}.items():
        with wds.TarWriter(str(folder / f"{domain}-000000.tar")) as writer:
            for number in range(count):
                pixels = torch.randint(0, 256, (56, 56, 3), dtype=torch.uint8, generator=noise).numpy()
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                writer.write({"__key__": f"{number:06d}", "png": buffer.getvalue()})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, demo_images: Path) -> Path:
    folder = tmp_path_factory.mktemp("scale")
    write_release(folder / "release")
    write_validation_shards(folder / "val")
    architecture = {"class_path": "teachers.InternViTConfig", "init_args": vars(TEACHER)}
    teacher = {"weights": str(folder / "release"), "architecture": architecture, "dtype": "float32"}
    student = {"weights": "random", "img_size": 56, "embed_dim": 32, "depth": 2, "num_heads": 2}
    content = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "precision": "32-true",
            "max_steps": STEPS,
            "val_check_interval": 1.0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {
            "teachers": {"big": {"class_path": "teachers.InternViT", "init_args": teacher}},
            "students": {"small": {"class_path": "students.InternViT", "init_args": student}},
            "alignments": [{"student": "small", "teacher": "big", "num_layers": 2, "standardise": "mean_std"}],
            "optimizer": {"lr_student": 1e-3, "lr_heads": 1e-3},
            "calibration_batches": 2,
            "teacher_micro_batch": 2,  # of 7 and 6 validation images: four passes on one rank, three on the other
        },
        "data": {
            "train": str(demo_images / "train"),
            "val": str(folder / "val"),
            "img_size_px": 56,
            "global_batch_size": 8,
            "num_workers": 0,
            "val_batch_size_per_device": 3,
            "augment": {"reencode": "none"},
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


class Run:
    """What a run left behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def losses(self) -> dict[int, float]:
        """The mean over ranks at each step."""
        files = sorted((self.folder / "ranks").glob("losses-*.jsonl"))
        ranks = [dict(json.loads(line) for line in file.read_text().splitlines()) for file in files]
        return {step: sum(rank[step] for rank in ranks) / len(ranks) for step in ranks[0]}

    @property
    def teachers(self) -> list[dict[str, Any]]:
        return [json.loads(file.read_text()) for file in sorted((self.folder / "ranks").glob("teacher-*.json"))]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def validation(self) -> list[float]:
        lines = csv.DictReader((self.folder / "metrics.csv").read_text().splitlines())
        return [float(line["val/cosine"]) for line in lines if line.get("val/cosine")]


def fit(recipe: Path, folder: Path, *words: str, stop_after: int | None = None) -> Run:
    arguments = {"folder": str(folder / "ranks"), "stop_after": stop_after}
    callback = {"class_path": "rank_losses.RankLosses", "init_args": arguments}
    command = ["fit", f"--config={recipe}", f"--trainer.default_root_dir={folder}"]
    command += [f"--trainer.callbacks+={json.dumps(callback)}", *words]
    world_size = 2 if DDP[0] in words else 1
    ranks = RankProcesses(command, world_size, folder.with_suffix(".log"))
    assert ranks.finish(timeout_s=600) == [0] * world_size, ranks.text()[-3000:]
    return Run(folder)


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(recipe, tmp_path_factory.mktemp("alone") / "run", SHARDED)


@pytest.mark.parametrize("words", [DDP, (*DDP, SHARDED)], ids=["whole teachers", "sharded teachers"])
def test_two_ranks_have_the_losses_of_one_process(
    recipe: Path, alone: Run, tmp_path: Path, words: tuple[str, ...]
) -> None:
    run = fit(recipe, tmp_path / "run", *words)
    assert list(run.losses) == list(range(STEPS))
    assert run.losses == pytest.approx(alone.losses, abs=LOSS_TOLERANCE)
    assert run.validation == pytest.approx(alone.validation, abs=LOSS_TOLERANCE)
    whole = alone.teachers[0]["held"]
    held = [rank["held"] for rank in run.teachers]
    if SHARDED in words:
        assert sum(held) == whole
        assert max(held) < 0.52 * whole
    else:
        assert held == [whole, whole]
    assert_holds_no_teacher(run.checkpoint)


def assert_holds_no_teacher(file: Path) -> None:
    checkpoint = read_checkpoint(file)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"students", "alignments"}
    assert all(type(tensor) is torch.Tensor for tensor in checkpoint["state_dict"].values())
    widths = {tensor.shape for tensor in checkpoint["state_dict"].values()}
    assert (3 * TEACHER.embed_dim, TEACHER.embed_dim) not in widths


def test_a_run_goes_from_whole_to_sharded_teachers_to_one_process(recipe: Path, alone: Run, tmp_path: Path) -> None:
    first = fit(recipe, tmp_path / "first", *DDP, stop_after=7)
    second = fit(recipe, tmp_path / "second", *DDP, SHARDED, f"--ckpt_path={first.checkpoint}", stop_after=14)
    third = fit(recipe, tmp_path / "third", f"--ckpt_path={second.checkpoint}")
    assert [next(iter(run.losses)) for run in (first, second, third)] == [0, 7, 14]
    fingerprints = [read_checkpoint(run.checkpoint)["teacher_fingerprints"] for run in (first, second, third)]
    assert fingerprints[0] == fingerprints[1] == fingerprints[2] != {}
    assert (first.losses | second.losses | third.losses) == pytest.approx(alone.losses, abs=LOSS_TOLERANCE)


def documented_torchrun() -> str:
    """Return the command that the documentation has for two processes on one machine."""
    text = (ROOT / "docs" / "scaling.md").read_text()
    (line,) = re.findall(r"^ {4}(torchrun --standalone --nproc-per-node 2 -m distill fit .*)$", text, re.MULTILINE)
    return line


def test_torchrun_trains_on_two_processes_as_documented(demo_recipe: Any, tmp_path: Path) -> None:
    words = shlex.split(documented_torchrun())
    assert words[words.index("--config") + 1] == "configs/demo.yaml"
    small = demo_recipe.words(tmp_path / "run", "--trainer.max_steps=2", "--trainer.limit_val_batches=1")[3:]
    command = [str(Path(sys.executable).with_name(words[0])), *words[1:], *small]
    done = subprocess.run(
        command, cwd=ROOT, env=demo_recipe.environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 2
    hparams = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert hparams["trainer"]["devices"] in (2, "2")


def test_documentation_and_readme_have_the_same_torchrun_command() -> None:
    lines = [line.strip() for line in (ROOT / "README.md").read_text().splitlines() if "torchrun" in line]
    assert all(line == documented_torchrun() for line in lines if line.startswith("torchrun"))
