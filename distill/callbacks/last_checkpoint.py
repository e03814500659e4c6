"""The one checkpoint every verb reads: `checkpoints/last.ckpt`, never far behind and never missing at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from distill.callbacks.resume_point import batches_done, validation_is_due
from distill.checkpoint_files import LAST_NAME
from distill.trainer_view import TrainerView


class LastCheckpoint(ModelCheckpoint):
    """Writes `last.ckpt` before and after each validation, at each epoch's end, every so many steps, and at the end.

    Lightning's own class saves after validation or by steps or at epoch ends, one of the three, so the steps behind
    the last occasion would be lost. The save before a validation means that leaving one loses nothing. The file before
    stays as `previous.ckpt`. A recipe may have further `ModelCheckpoint`s beside this one.

    Args:
        dirpath: the run's checkpoint folder.
        every_n_steps: optimiser steps between two saves when nothing else saves.
    """

    def __init__(self, dirpath: Path, every_n_steps: int = 1000) -> None:
        super().__init__(dirpath=dirpath, filename=LAST_NAME.removesuffix(".ckpt"), save_top_k=0)
        self.path = Path(dirpath) / LAST_NAME
        self.every_n_steps = every_n_steps
        self._saved_place = (-1, False)
        self._began_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the resumed step for saved."""
        self._began_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save when `every_n_steps` steps are done; by now the last of them is in the log."""
        step = trainer.global_step
        is_between_steps = TrainerView(trainer).batches_within_step == 0
        if step > self._began_step and is_between_steps and step % self.every_n_steps == 0:
            self.save(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Do nothing: the step is not in the log yet."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, with the validation still to do."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless validation runs alone or before the first step."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.save(trainer, is_validated=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the other occasions left."""
        self.save(trainer)

    def save(self, trainer: Trainer, *, is_validated: bool = False) -> None:
        """Write `last.ckpt`, unless this very place was saved; all ranks have to call this.

        Args:
            trainer: within `fit`.
            is_validated: the validation that comes after the last step is done.
        """
        place = (batches_done(trainer), validation_is_due(trainer) and not is_validated)
        # `fast_dev_run` promises to write nothing; its attribute is not typed.
        if place == self._saved_place or getattr(trainer, "fast_dev_run", False):
            return
        trainer.save_checkpoint(self.path)
        self._saved_place = place
