"""Steps with values that are not finite change nothing, and leave word of what they met."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from distill.control_group import ControlGroup, control_group
from distill.errors import TrainingError

NAMED_GRADIENTS = 5
"""So many parameters are named; a bad gradient is usually bad everywhere."""


class NonFiniteGuard(Callback):
    """Skips an optimiser step whose loss, gradients or teacher output are not finite, on all ranks alike.

    Parameters and optimiser state stay bit for bit as they were; schedule, EMA and data go on. What was met is appended
    to `non_finite/rank-N.jsonl`, and `non_finite/skipped` counts the steps. Looking costs one wait for the GPU and one
    small message a step.

    With a gradient scaler (precision 16-mixed) infinite gradients are how the scaler finds its scale, and it skips
    those steps itself; here they are left alone. An optimiser that takes the scale away itself (`fused`) is looked at
    by the scaler only after this: its gradients are made infinite, so that the scaler skips the step.

    Args:
        max_in_a_row: so many skipped steps one after another end the run: it is not bad luck then.
    """

    def __init__(self, max_in_a_row: int = 10) -> None:
        self.max_in_a_row = max_in_a_row
        self.skipped = 0
        self.in_a_row = 0
        self._group = ControlGroup(None)
        self._losses: list[Tensor] = []
        self._samples: list[dict[str, Tensor]] = []
        self._teachers: list[dict[str, Tensor]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the ranks' control group."""
        if stage == "fit":
            self._group = control_group()

    def state_dict(self) -> dict[str, int]:
        """Return the counts, which are the same on every rank."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on counting."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember which samples the step is made of."""
        self._samples.append({name: batch[name] for name in ("row", "index") if name in batch})

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember the loss, and what the task found about its teachers' output."""
        self._losses.append(loss.detach())
        self._teachers.append(dict(getattr(pl_module, "teacher_is_finite", {})))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take the gradients away when any rank met a value that is not finite.

        Raises:
            TrainingError: too many steps in a row were skipped.
        """
        has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
        found = self._find(optimizer, pl_module, checks_gradients=not has_scaler)
        if self._group.highest(int(bool(found))):
            spoil_gradients(optimizer, has_scaler=has_scaler)
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            path = self._write(trainer, found) if found else folder_of(trainer)
            rank_zero_warn(
                f"Step {trainer.global_step} was skipped: {', '.join(found) or 'another rank'} not finite; "
                f"{self.skipped} skipped so far. The samples are in {path}."
            )
            self._refuse_to_go_on(found, path)
        else:
            self.in_a_row = 0
        self._losses, self._teachers, self._samples = [], [], []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the count."""
        pl_module.log("non_finite/skipped", float(self.skipped), batch_size=1)

    def _find(self, optimizer: Optimizer, pl_module: LightningModule, *, checks_gradients: bool) -> list[str]:
        """Return the names of what is not finite on this rank, causes before consequences."""
        names = [f"teacher {name}" for checks in self._teachers for name in checks]
        flags = [samples.all() for checks in self._teachers for samples in checks.values()]
        names += ["loss"] * len(self._losses)
        flags += [loss.isfinite().all() for loss in self._losses]
        gradients = gradients_of(optimizer) if checks_gradients else []
        if gradients:
            names.append("gradient")
            flags.append(torch.nn.utils.get_total_norm(gradients).isfinite())
        if not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all()):
            return []
        found = dict.fromkeys(name for name, flag in zip(names, flags, strict=True) if not bool(flag))
        if "gradient" in found:
            bad = [name for name, p in pl_module.named_parameters() if p.grad is not None and not is_finite(p.grad)]
            del found["gradient"]
            found |= dict.fromkeys(f"gradient of {name}" for name in bad[:NAMED_GRADIENTS] or ["all together"])
        return list(found)

    def _write(self, trainer: Trainer, found: list[str]) -> Path:
        path = folder_of(trainer) / f"rank-{trainer.global_rank}.jsonl"
        if getattr(trainer, "fast_dev_run", False):
            return path
        record = {
            "time": time.time(),
            "step": trainer.global_step,
            "rank": trainer.global_rank,
            "not_finite": found,
            "samples": self._described(trainer),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        return path

    def _described(self, trainer: Trainer) -> list[dict[str, Any]]:
        """Return the step's samples on this rank: row, place in the plan, shard and key, and whose output was bad."""
        data: Any = cast(Any, trainer).datamodule
        index = getattr(data, "train_index", None)
        described: list[dict[str, Any]] = []
        for samples, checks in zip(self._samples, self._teachers, strict=True):
            bad = {name: (~flags).tolist() for name, flags in checks.items()}
            for place, row in enumerate(samples["row"].tolist() if "row" in samples else []):
                entry: dict[str, Any] = {"row": row}
                if "index" in samples:
                    entry["index"] = int(samples["index"][place])
                if index is not None:
                    entry["sample"] = index.name_of(row)
                if teachers := [name for name, flags in bad.items() if flags[place]]:
                    entry["not_finite_from"] = teachers
                described.append(entry)
        return described

    def _refuse_to_go_on(self, found: list[str], path: Path) -> None:
        if self.in_a_row >= self.max_in_a_row:
            raise TrainingError(
                f"{self.in_a_row} steps in a row were not finite ({', '.join(found) or 'on another rank'}), as many as "
                f"max_in_a_row of the callback NonFiniteGuard allows. The samples are in {path}. Lower "
                "model.optimizer's learning rates, set trainer.gradient_clip_val, or use trainer.precision 32-true, "
                "and resume from a checkpoint before these steps."
            )


def folder_of(trainer: Trainer) -> Path:
    """Return where a run's records of skipped steps are."""
    return Path(trainer.default_root_dir) / "non_finite"


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return all parameters of an optimiser."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def spoil_gradients(optimizer: Optimizer, *, has_scaler: bool) -> None:
    """Make a step change nothing.

    A scaler skips a step whose gradients are infinite, and refuses one in which it has seen none. It has seen them by
    now, and would use what it is given, unless the optimiser takes the scale away itself, as fused ones do.
    """
    scaler_looks_later = has_scaler and bool(getattr(optimizer, "_step_supports_amp_scaling", False))
    for parameter in parameters_of(optimizer):
        if not scaler_looks_later:
            parameter.grad = None
        elif parameter.grad is not None:
            parameter.grad.fill_(torch.inf)


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the gradients an optimiser would use, each rank's own part where they are sharded."""
    gradients = [parameter.grad for parameter in parameters_of(optimizer) if parameter.grad is not None]
    return [cast(Any, gradient).to_local() if hasattr(gradient, "to_local") else gradient for gradient in gradients]


def is_finite(gradient: Tensor) -> bool:
    """Whether all values of a gradient are finite; of this rank's part where it is sharded."""
    part: Tensor = cast(Any, gradient).to_local() if hasattr(gradient, "to_local") else gradient
    return bool(part.isfinite().all())
