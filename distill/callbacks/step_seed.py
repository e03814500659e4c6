"""Randomness that depends on the step alone, so that a resumed run draws what an uninterrupted one would."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from distill.trainer_view import TrainerView


class StepSeed(Callback):
    """Seeds torch, CUDA, NumPy and Python before each training batch, from seed, step, batch within it, and rank.

    Dropout and drop path then draw the same numbers whether or not the run was interrupted. Nothing has to be saved for
    each rank, and Lightning's checkpoints hold no state of random generators. A resumed run keeps the seed that its
    checkpoint holds.

    Args:
        seed: of the run, `seed_everything` of the recipe.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def state_dict(self) -> dict[str, int]:
        """Return the seed."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take the seed of the run that is continued."""
        self.seed = state_dict["seed"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed."""
        view = TrainerView(trainer)
        place = (self.seed, trainer.global_step, view.batches_within_step, view.rank)
        numbers = np.random.SeedSequence(place).generate_state(3, np.uint64)
        torch.manual_seed(int(numbers[0]))
        np.random.seed(int(numbers[1]) % 2**32)  # noqa: NPY002  (the state that libraries draw from)
        random.seed(int(numbers[2]))
