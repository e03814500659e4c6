"""The one checkpoint every verb reads: `checkpoints/last.ckpt`, never far behind and never missing at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Writes `last.ckpt` after each validation, at each epoch's end, every so many steps, and when training ends.

    Lightning's own class saves after validation or by steps or at epoch ends, one of the three, so the steps behind
    the last occasion would be lost. A recipe may have further `ModelCheckpoint`s beside this one.

    Args:
        dirpath: the run's checkpoint folder.
        every_n_steps: optimiser steps between two saves when nothing else saves.
    """

    def __init__(self, dirpath: Path, every_n_steps: int = 1000) -> None:
        super().__init__(dirpath=dirpath, filename="last", save_top_k=0)
        self.path = Path(dirpath) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self._saved_step = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when `every_n_steps` steps have passed since the last time."""
        if trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless validation runs alone or before the first step."""
        if trainer.training or (trainer.validating and trainer.state.fn == "fit" and not trainer.sanity_checking):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the other occasions left."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        # `fast_dev_run` promises to write nothing; its attribute is not typed.
        if trainer.global_step == self._saved_step or getattr(trainer, "fast_dev_run", False):
            return
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.path)
