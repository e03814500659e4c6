"""What a run that stopped before its last step says, and with which status it ends."""

from __future__ import annotations

import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer

from distill import training_cli
from distill.errors import ConfigError, UnfinishedError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

SHORT = (
    "--data.samples_per_epoch=32",
    "--trainer.max_epochs=3",
    "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.check_val_every_n_epoch=1",
)
EARLY = (
    '--trainer.callbacks+={"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": '
    '{"monitor": "loss/total", "stopping_threshold": THRESHOLD, "check_on_train_epoch_end": false}}'
)
"""Stops at a validation where the loss is below the threshold."""


class StopsAt(Callback):
    """A callback of a user's own, which decides that a step was the last."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step >= self.step:
            trainer.should_stop = True


class ExpiresAt(Timer):
    """A time limit that is over at a step."""

    def __init__(self, step: int, late_s: float = 0.0) -> None:
        super().__init__(timedelta(hours=1))
        self.step, self.late_s = step, late_s

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step >= self.step:
            self._duration = 1e-9
        super().on_train_batch_end(trainer, *args, **kwargs)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.late_s:
            time.sleep(self.late_s)
            self._duration = 1e-9
        super().on_train_end(trainer, pl_module)


def fit(demo_recipe: Any, run: Path, *words: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training_cli.run(demo_recipe.words(run, *SHORT, *words))


def own(name: str, **arguments: Any) -> str:
    given = ", ".join(f'"{key}": {value}' for key, value in arguments.items())
    return f'--trainer.callbacks+={{"class_path": "{__name__}.{name}", "init_args": {{{given}}}}}'


def test_early_stopping_in_the_first_epoch_finishes_a_run(
    demo_recipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(demo_recipe, tmp_path / "run", EARLY.replace("THRESHOLD", "1e9"))
    assert "Finished at step 4 of 12, as early stopping decided." in caplog.text


def test_the_time_limit_asks_for_another_start_although_an_earlier_part_was_stopped_early(
    demo_recipe: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fit(demo_recipe, run, EARLY.replace("THRESHOLD", "1e9"))
    with pytest.raises(UnfinishedError, match="stopped at step 6 of 12: trainer.max_time is over") as caught:
        fit(demo_recipe, run, EARLY.replace("THRESHOLD", "1e9"), own("ExpiresAt", step=6), "--resume=auto")
    assert caught.value.exit_code == 75


def test_another_callbacks_stop_finishes_a_run_and_is_said(
    demo_recipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The time limit that passes during the last save stopped nothing.
    fit(demo_recipe, tmp_path / "run", own("StopsAt", step=5), own("ExpiresAt", step=99, late_s=0.01))
    assert "Finished at step 5 of 12, as a callback that set trainer.should_stop decided." in caplog.text


def test_a_run_whose_earlier_parts_used_all_the_time_says_so(demo_recipe: Any, tmp_path: Path) -> None:
    run, limit = tmp_path / "run", "--trainer.max_time=00:00:00:01"
    with pytest.raises(UnfinishedError, match="trainer.max_time is over"):
        fit(demo_recipe, run, limit, "--trainer.max_epochs=4000")
    with pytest.raises(ConfigError, match="used all of trainer.max_time"):
        fit(demo_recipe, run, limit, "--trainer.max_epochs=4000", "--resume=auto")


def test_lightning_still_has_what_the_decision_is_taken_from() -> None:
    assert EarlyStopping("x").stopped_epoch == 0
    assert hasattr(Timer(timedelta(1)), "_offset")
