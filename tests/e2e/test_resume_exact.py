"""A run that is interrupted anywhere and resumed equals, bit for bit, the run that was not interrupted."""

from __future__ import annotations

import csv
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import training_cli
from distill.callbacks.checkpoint_io import AtomicCheckpointIO

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

# What the clock decides.
UNEQUAL = ("throughput/", "time")
SHORT = ("--data.samples_per_epoch=32", "--trainer.max_epochs=3")
EVERY_STEP = (
    '--trainer.callbacks+={"class_path": "distill.callbacks.last_checkpoint.LastCheckpoint", '
    '"init_args": {"dirpath": "DIR", "every_n_steps": 1}}'
)
EMA = (
    '--trainer.callbacks+={"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.5}}'
)

COURSES = {
    # epochs of 4 steps, a validation after every second one; a worker is ahead of the model
    "validation by epochs, with a worker": ("--trainer.check_val_every_n_epoch=2", "--data.num_workers=1"),
    # validations within epochs, and batches of half a step
    "accumulation, EMA and validation within epochs": (
        "--trainer.check_val_every_n_epoch=1",
        "--trainer.val_check_interval=4",
        "--trainer.accumulate_grad_batches=2",
        EMA,
    ),
    # the end is a step, not an epoch; dropout and drop path draw random numbers
    "max_steps, dropout and drop path": (
        "--trainer.max_steps=10",
        "--trainer.check_val_every_n_epoch=1",
        "--trainer.val_check_interval=2",
        "--model.students.vit.init_args.drop_path_rate=0.3",
    ),
}


class Saves:
    """Copies each checkpoint that a run writes, so that the run can be taken up from every one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[Path] = []

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        write = AtomicCheckpointIO.save_checkpoint

        def spy(own: Any, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            write(own, checkpoint, path, storage_options)
            copy = self.folder / f"{len(self.files)}"
            copy.mkdir(parents=True)
            for file in Path(path).parent.glob("last.ckpt*"):
                shutil.copy2(file, copy / file.name)
            self.files.append(copy)

        monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", spy)

    def of_each_kind(self) -> dict[Path, str]:
        """Return the first and the last checkpoint, and one of each further kind of place, with what it is."""
        kinds: dict[tuple[object, ...], tuple[Path, str]] = {}
        for number, folder in enumerate(self.files[:-1]):
            saved = torch.load(folder / "last.ckpt", weights_only=True)
            loops, due = saved["loops"]["fit_loop"], saved["resume_point"]["validation_is_due"]
            batch, epoch = loops["epoch_loop.batch_progress"], loops["epoch_progress"]["current"]
            is_between_epochs = epoch["processed"] == epoch["ready"]
            # The last place of a kind, so that what goes wrong in an earlier one has no time to heal.
            kind = (number == 0, due, is_between_epochs, batch["is_last_batch"], number == len(self.files) - 2)
            kinds[kind] = (folder, f"save {number} at step {saved['global_step']}: validation due {due}, {epoch}")
        return dict(kinds.values())


def fit(demo_recipe: Any, run: Path, *overrides: str) -> None:
    words = [word.replace("DIR", str(run / "checkpoints")) for word in (*SHORT, EVERY_STEP, *overrides)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training_cli.run(demo_recipe.words(run, *words))


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return nested values by path."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{path}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{path}/{i}").items()}
    return {path: value}


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    first, second = flat(one), flat(two)
    found = sorted(first.keys() ^ second.keys())
    for key in first.keys() & second.keys():
        a, b = first[key], second[key]
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        if not same and "Timer" not in key and "dirpath" not in key and "last_model_path" not in key:
            found.append(f"{key}: {a} {b}" if not isinstance(a, torch.Tensor) else key)
    return found


def logged(run: Path) -> list[tuple[int, str, float]]:
    """Return all logged values in order of step, those of the clock left out."""
    values = []
    for file in [*run.glob("metrics-*.csv"), run / "metrics.csv"]:
        if not file.is_file():
            continue
        with file.open(newline="") as stream:
            for row in csv.DictReader(stream):
                for key, value in row.items():
                    if value and key not in ("step", "epoch") and not key.startswith(UNEQUAL):
                        values.append((int(row["step"]), key, float(value)))
    return sorted(values)


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("course", COURSES.values(), ids=COURSES.keys())
def test_resuming_from_any_checkpoint_of_a_run_gives_the_same_run_bit_for_bit(
    demo_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, course: tuple[str, ...]
) -> None:
    whole, saves = tmp_path / "whole", Saves(tmp_path / "saves")
    with monkeypatch.context() as patch:
        saves.watch(patch)
        fit(demo_recipe, whole, *course)
    end, log = checkpoint(whole), logged(whole)
    # With accumulation, Lightning logs the learning rate at each batch of a step.
    keys = [(step, key) for step, key, _ in log if not key.startswith("lr-")]
    assert len(keys) == len(set(keys))
    assert not any(math.isnan(value) for _, _, value in log)
    assert {key.split(".")[0] for key in end["state_dict"]} == {"students", "alignments"}
    for saved, place in saves.of_each_kind().items():
        # What a kill -9 leaves: steps after the checkpoint are in the log.
        run = tmp_path / f"resumed-{saved.name}"
        shutil.copytree(whole, run)
        shutil.rmtree(run / "checkpoints")
        shutil.copytree(saved, run / "checkpoints")
        fit(demo_recipe, run, *course, "--resume=auto")
        assert differences(end, checkpoint(run)) == [], place
        assert logged(run) == log, place
        shutil.rmtree(run)
