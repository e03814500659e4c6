"""A Lightning callback that writes down every rank's losses: logs hold the first rank's only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class RankLosses(Callback):
    """Writes one JSON line a step, `[step, loss]`, and what of the teachers lies on this rank.

    Args:
        folder: for one file a rank.
        stop_after: steps after which training ends, as planned for as many as the trainer says.
    """

    def __init__(self, folder: str, stop_after: int | None = None) -> None:
        self.folder = Path(folder)
        self.stop_after = stop_after

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write how many values of the teachers this rank holds, and in what."""
        self.folder.mkdir(parents=True, exist_ok=True)
        parameters = [p for name in pl_module.teachers.names() for p in pl_module.teachers[name].parameters()]
        own = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in parameters)
        kinds = sorted({type(p.data).__name__ for p in parameters})
        facts = {"held": own, "whole": sum(p.numel() for p in parameters), "kinds": kinds}
        (self.folder / f"teacher-{trainer.global_rank}.json").write_text(json.dumps(facts))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the loss of the step that ended."""
        loss = float(outputs["loss"] if isinstance(outputs, dict) else torch.as_tensor(outputs))
        with (self.folder / f"losses-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps([trainer.global_step - 1, loss]) + "\n")
        if trainer.global_step == self.stop_after:
            trainer.should_stop = True
