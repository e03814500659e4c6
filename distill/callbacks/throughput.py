"""Images a second, in the progress bar and the logs."""

from __future__ import annotations

import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class Throughput(Callback):
    """Logs `throughput/images_per_s` over all devices, measured between two logged steps, validation left out.

    Args:
        every_n_steps: training batches between two measurements.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self._images = 0
        self._seconds = 0.0
        self._started = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock, unless it still runs from the batch before (its data loading counts)."""
        if not self._started:
            self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch, and log every `every_n_steps`."""
        now = time.perf_counter()
        self._images += len(batch["images"]) * trainer.world_size
        self._seconds += now - self._started
        self._started = now
        if (batch_idx + 1) % self.every_n_steps == 0:
            rate = self._images / self._seconds
            pl_module.log("throughput/images_per_s", rate, prog_bar=True, rank_zero_only=True, batch_size=1)
            self._images, self._seconds = 0, 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._started = 0.0
