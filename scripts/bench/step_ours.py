"""Our side of scripts/bench/step.py, and the sides of lightning_overhead.py and second_student.py.

    python scripts/bench/step_ours.py fit   --recipe FILE --threads 1 --channel READ,WRITE
    python scripts/bench/step_ours.py bare  --recipe FILE --threads 1 --channel READ,WRITE
    python scripts/bench/step_ours.py alone --recipe FILE --threads 1 --channel READ,WRITE

`fit` is `distill fit`, `bare` a loop of the same step, `alone` that loop with one batch and its teacher's states, so
that the student is all that runs. All keep freed memory, as every verb of `distill` does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from sides import Gate
from torch.utils.data import DataLoader

from distill import training_cli
from distill.data.fetch import PlannedDataset, collate
from distill.data.samplers import PlanSampler
from distill.heap import keep_freed_memory
from distill.optim import build_optimizer, build_scheduler, parameter_groups
from distill.planner.recipe import Recipe, read_recipe
from distill.precision import AUTOCAST_DTYPES


class Gated(Callback):
    """Holds training at the start of each step until the parent lets it through.

    Args:
        channel: as for `Gate`.
        losses: file for each step's loss, a line each.
    """

    def __init__(self, channel: str, losses: str | None = None) -> None:
        self.gate = Gate(channel)
        self.losses = Path(losses) if losses else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Wait."""
        self.gate.step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the loss."""
        if self.losses is not None:
            with self.losses.open("a") as file:
                file.write(f"{float(outputs['loss'])!r}\n")


def fit(recipe: Path, channel: str, losses: Path | None = None) -> None:
    """Train by `distill fit`, with all of its own callbacks and loggers."""
    arguments = {"channel": channel} | ({"losses": str(losses)} if losses is not None else {})
    callback = json.dumps({"class_path": "step_ours.Gated", "init_args": arguments})
    training_cli.run(["fit", f"--config={recipe}", f"--trainer.callbacks+={callback}"])


class StandIn:
    """The little that an engine asks of a trainer: sizes and precision."""

    world_size = accumulate_grad_batches = 1

    def __init__(self, data: Any, precision: str) -> None:
        self.datamodule, self.precision = data, precision


def bare(recipe: Path, channel: str) -> None:
    """Take the same step in a loop without a trainer: no callbacks, logs, checkpoints or metrics."""
    read = read_recipe(recipe, [])
    prepare(read)
    loop(Gate(channel), read, batches(read))


def alone(recipe: Path, channel: str) -> None:
    """Take the same step on one batch whose teacher's states are there already."""
    read = read_recipe(recipe, [])
    prepare(read)
    batch, task = next(iter(batches(read))), read.task
    targets = task._targets(batch, "train")
    task._targets = lambda batch, split: targets  # type: ignore[method-assign]
    loop(Gate(channel), read, itertools.repeat(batch))


def prepare(read: Recipe) -> None:
    """Read the weights, and choose kernels and micro-batch."""
    read.data.setup("validate")
    read.task.configure_model()
    trainer: Any = StandIn(read.data, str(read.trainer["precision"]))
    read.task.engine.start(trainer, read.task.teachers, read.task.students, torch.device("cpu"))


def batches(read: Recipe) -> Iterable[dict[str, Any]]:
    """Return the recipe's training batches, as `distill fit` would see them."""
    data, steps = read.data, int(read.trainer["max_steps"])
    dataset = PlannedDataset(data.plan, data.img_size_px, data.augment)
    sampler = PlanSampler(steps * data.global_batch_size, data.global_batch_size, rank=0, world_size=1, start=0)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)


def loop(gate: Gate, read: Recipe, source: Iterable[dict[str, Any]]) -> None:
    """Take a step a batch."""
    task, precision = read.task, str(read.trainer["precision"])
    groups = parameter_groups(task.students, task.alignments, task.optimizer_config)
    optimizer = build_optimizer(groups, task.optimizer_config)
    scheduler = build_scheduler(optimizer, int(read.trainer["max_steps"]), task.optimizer_config)
    dtype, clip = AUTOCAST_DTYPES.get(precision), read.trainer["gradient_clip_val"]
    parameters = [parameter for group in groups for parameter in group["params"]]
    task.train()
    for batch in source:
        gate.step()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = task._step(batch)["loss/total"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        scheduler.step()


def main() -> None:
    """Run a side until the parent closes the channel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("fit", "bare", "alone"))
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channel", required=True)
    parser.add_argument("--losses", type=Path, help="file for the losses of fit")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    if options.side == "fit":
        fit(options.recipe, options.channel, options.losses)
    else:
        {"bare": bare, "alone": alone}[options.side](options.recipe, options.channel)


if __name__ == "__main__":
    main()
