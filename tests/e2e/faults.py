"""Lightning callbacks that do harm at a given place, for the tests of what a run does about it."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class SignalAt(Callback):
    """Sends signals to its own process.

    Args:
        hook: train_batch, validation_batch, save, or sanity.
        step: at this optimiser step, or the first such hook after it.
        ranks: which processes do it.
        signals: names, sent one after another.
    """

    def __init__(self, hook: str, step: int, ranks: list[int], signals: list[str]) -> None:
        self.hook, self.step, self.ranks, self.signals = hook, step, ranks, signals
        self.is_done = False

    def _maybe(self, hook: str, trainer: Trainer) -> None:
        if hook != self.hook or self.is_done or trainer.global_step < self.step:
            return
        self.is_done = True
        if trainer.global_rank in self.ranks:
            for name in self.signals:
                os.kill(os.getpid(), signal.Signals[name])
                time.sleep(0.05)  # another moment in the save or validation, so that they are two

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Do it within a step."""
        self._maybe("train_batch", trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Do it within a validation, at its second batch."""
        if batch_idx == 1:
            self._maybe("sanity" if trainer.sanity_checking else "validation_batch", trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Do it within a save."""
        self._maybe("save", trainer)


class FailAt(Callback):
    """Ends its own process, or makes it hang, at a training batch.

    Args:
        how: raise, exit, hang, interrupt, or the name of a signal.
        step: at this optimiser step.
        rank: which process does it.
    """

    def __init__(self, how: str, step: int, rank: int) -> None:
        self.how, self.step, self.rank = how, step, rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Do it."""
        if trainer.global_step != self.step or trainer.global_rank != self.rank:
            return
        if self.how == "raise":
            raise ValueError("the fault of this test")
        if self.how == "exit":
            os._exit(0)  # as library code might; nothing but the process table tells
        if self.how == "hang":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
        os.kill(os.getpid(), signal.Signals[self.how])
        time.sleep(600)


class SpoilAt(Callback):
    """Makes values of given steps NaN.

    Args:
        what: student (its output), teacher (its output for one image), or gradient.
        steps: optimiser steps.
        rank: on which process.
    """

    def __init__(self, what: str, steps: list[int], rank: int = 0) -> None:
        self.what, self.steps, self.rank = what, steps, rank
        self.hooks: list[Any] = []

    def _due(self, trainer: Trainer) -> bool:
        return trainer.global_step in self.steps and trainer.global_rank == self.rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Wrap the encoder's output for this batch."""
        if not self._due(trainer) or self.what == "gradient":
            return
        owner = pl_module.teachers.encoder("efficientnet_lite0") if self.what == "teacher" else pl_module.students.vit
        original = owner.forward_hidden_states

        def spoiled(images: torch.Tensor, num_layers: int) -> Any:
            layers = original(images, num_layers)
            prefix, patches = layers[-1]
            patches = patches.clone()
            patches[0, 0] = torch.nan
            owner.forward_hidden_states = original
            return [*layers[:-1], (prefix, patches)]

        owner.forward_hidden_states = spoiled

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Spoil one gradient value."""
        if self.what == "gradient" and self._due(trainer):
            next(p for p in pl_module.parameters() if p.grad is not None).grad.view(-1)[0] = torch.inf
