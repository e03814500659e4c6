"""`distill fit` told to stop: whatever rank hears it and whatever it is doing, the run goes on where it was."""

from __future__ import annotations

import csv
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.checkpoint import read_checkpoint
from distill.errors import INTERRUPTED, OVERDUE, PREEMPTED

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # pytest imports each test file by itself
RankProcesses = import_module("rank_processes").RankProcesses
DemoRecipe = Any  # the class of the fixture in conftest.py

pytestmark = pytest.mark.slow
TWO_EPOCHS = ("--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1", "--data.val_batch_size_per_device=2")
TWO_RANKS = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu")


def signal_at(hook: str, step: int, ranks: list[int], *signals: str) -> list[str]:
    """Return words that let a run's own processes send signals to themselves."""
    arguments = {"hook": hook, "step": step, "ranks": ranks, "signals": list(signals)}
    return [
        "--trainer.callbacks+=faults.SignalAt",
        *(f"--trainer.callbacks.{name}={str(value).replace(' ', '')}" for name, value in arguments.items()),
    ]


def start(recipe: DemoRecipe, run: Path, *words: str, world_size: int = 1) -> tuple[list[int | None], str]:
    """Run `distill fit` for two epochs, and return how its processes ended and what they wrote."""
    shared = (*TWO_EPOCHS, *(TWO_RANKS if world_size == 2 else ()))
    log = run.with_suffix(f".{len(list(run.parent.glob(run.name + '.*.log')))}.log")
    ranks = RankProcesses(recipe.words(run, *shared, *words), world_size, log)
    return ranks.finish(), ranks.text()


def validated_steps(run: Path) -> list[int]:
    """Return the steps at which validation values stand in the run's metrics, over all its parts."""
    steps = set[int]()
    for file in run.rglob("metrics*.csv"):
        with file.open() as stream:
            steps |= {int(row["step"]) for row in csv.DictReader(stream) if row.get("val/cosine")}
    return sorted(steps)


def test_two_ranks_preempted_in_a_step_in_a_validation_and_in_a_save_end_with_the_weights_of_an_undisturbed_run(
    demo_recipe: DemoRecipe, tmp_path: Path
) -> None:
    last = ("--resume", "auto")
    codes, _ = start(demo_recipe, tmp_path / "undisturbed", world_size=2)
    assert codes == [0, 0]

    one_rank = signal_at("train_batch", 3, [1], "SIGTERM")
    codes, text = start(demo_recipe, tmp_path / "run", *one_rank, world_size=2)
    assert codes == [PREEMPTED, PREEMPTED], text
    assert "Preempted by SIGTERM at step 4" in text or "Preempted by SIGTERM at step 5" in text

    twice_in_validation = signal_at("validation_batch", 12, [0], "SIGUSR1", "SIGTERM")
    codes, text = start(demo_recipe, tmp_path / "run", *last, *twice_in_validation, world_size=2)
    assert codes == [PREEMPTED, PREEMPTED], text
    assert "Preempted by SIGUSR1 at step 12, during a validation, which will be run again" in text
    assert validated_steps(tmp_path / "run") == [0]

    all_ranks_in_a_save = signal_at("save", 12, [0, 1], "SIGTERM", "SIGTERM")
    codes, text = start(demo_recipe, tmp_path / "run", *last, *all_ranks_in_a_save, world_size=2)
    assert codes == [PREEMPTED, PREEMPTED], text

    codes, text = start(demo_recipe, tmp_path / "run", *last, world_size=2)
    assert codes == [0, 0], text
    assert validated_steps(tmp_path / "run") == validated_steps(tmp_path / "undisturbed")
    undisturbed = read_checkpoint(tmp_path / "undisturbed" / "checkpoints" / "last.ckpt")
    disturbed = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert undisturbed["global_step"] == disturbed["global_step"] == 24
    for name, value in undisturbed["state_dict"].items():
        assert torch.equal(value, disturbed["state_dict"][name]), name


def test_a_signal_in_the_validation_before_the_first_step_asks_for_another_start(
    demo_recipe: DemoRecipe, tmp_path: Path
) -> None:
    codes, text = start(demo_recipe, tmp_path / "run", *signal_at("sanity", 0, [1], "SIGTERM"), world_size=2)
    assert codes == [PREEMPTED, PREEMPTED], text
    assert "before the first step: nothing was lost" in text


def test_ctrl_c_saves_and_ends_with_130_and_the_run_goes_on(demo_recipe: DemoRecipe, tmp_path: Path) -> None:
    codes, text = start(demo_recipe, tmp_path / "run", *signal_at("train_batch", 11, [0], "SIGINT"))
    assert codes == [INTERRUPTED], text
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    step = read_checkpoint(last)["global_step"]
    assert step in (12, 13)
    # The epoch's last step: its validation was due, and is run now.
    codes, text = start(demo_recipe, tmp_path / "run", "--resume", "auto")
    assert codes == [0], text
    assert len(validated_steps(tmp_path / "run")) == 3  # before the first step and after each of two epochs


def test_a_step_that_never_ends_is_ended_at_the_deadline(demo_recipe: DemoRecipe, tmp_path: Path) -> None:
    words = ["--trainer.callbacks+=distill.callbacks.preemption.Preemption", "--trainer.callbacks.deadline_s=2"]
    words += ["--trainer.callbacks+=faults.FailAt", "--trainer.callbacks.how=hang", "--trainer.callbacks.step=2"]
    codes, text = start(demo_recipe, tmp_path / "run", *words, "--trainer.callbacks.rank=0")
    assert codes == [OVERDUE], text
    assert "faults.py" in (tmp_path / "run" / "failures" / "rank-0-stack.txt").read_text()


def test_a_run_whose_time_is_over_is_unfinished(demo_recipe: DemoRecipe, tmp_path: Path) -> None:
    codes, text = start(demo_recipe, tmp_path / "run", "--trainer.max_time=00:00:00:01", "--trainer.max_epochs=500")
    assert codes == [PREEMPTED], text
    assert "trainer.max_time is over" in text
    words = ("--trainer.max_time=00:00:00:01", "--trainer.max_epochs=500", "--resume", "auto")
    codes, text = start(demo_recipe, tmp_path / "run", *words)
    assert codes == [1], text
    assert "set a longer one" in text
