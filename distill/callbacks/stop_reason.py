"""Which callback stopped training before its last step: the time limit, early stopping or another."""

from __future__ import annotations

from enum import Enum
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer


class StopCause(Enum):
    """What set `trainer.should_stop` in this process."""

    EARLY_STOPPING = "early stopping"
    TIMER = "timer"
    OTHER = "other"


class StopReason(Callback):
    """Keeps what stopped this process's training, as it is when the stop is first seen.

    Later it is not to be told: the time limit may pass during the last validation and save. What `EarlyStopping` takes
    from a checkpoint says why another process stopped.
    """

    def __init__(self) -> None:
        self.cause: StopCause | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget which epoch early stopping ended an earlier part of the run in; 0 would be the first."""
        for own in early_stoppings(trainer):
            own.stopped_epoch = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look whether something stopped training."""
        self._look(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether something stopped training; Lightning validates then."""
        self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether something stopped training."""
        self._look(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether something stopped training, before the last save."""
        self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        if self.cause is None:
            self.cause = stop_cause(trainer)


def stop_cause(trainer: Trainer) -> StopCause | None:
    """Return what stopped training, by the present state of its callbacks; None where nothing did."""
    if not trainer.should_stop:
        return None
    if any(own.stopped_epoch >= 0 for own in early_stoppings(trainer)):
        return StopCause.EARLY_STOPPING
    remaining = [own.time_remaining() for own in cast(Any, trainer).callbacks if isinstance(own, Timer)]
    if any(seconds is not None and seconds <= 0 for seconds in remaining):
        return StopCause.TIMER
    return StopCause.OTHER


def kept_cause(trainer: Trainer) -> StopCause | None:
    """Return what stopped training, as it was first seen; None where it came to its end."""
    kept = [own.cause for own in cast(Any, trainer).callbacks if isinstance(own, StopReason) and own.cause]
    return kept[0] if kept else stop_cause(trainer)


def early_stoppings(trainer: Trainer) -> list[EarlyStopping]:
    """Return the trainer's early-stopping callbacks."""
    return [own for own in cast(Any, trainer).callbacks if isinstance(own, EarlyStopping)]
