"""Our side of scripts/bench/step.py and both sides of lightning_overhead.py: `distill fit`, or a bare loop of its step.

python scripts/bench/step_ours.py fit  --recipe FILE --threads 1 --channel READ,WRITE
python scripts/bench/step_ours.py bare --recipe FILE --threads 1 --channel READ,WRITE
"""

from __future__ import annotations

import argparse
import warnings
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
from distill.optim import build_optimizer, build_scheduler, parameter_groups
from distill.planner.recipe import read_recipe
from distill.precision import AUTOCAST_DTYPES


class Gated(Callback):
    """Holds training at the start of each step until the parent lets it through.

    Args:
        channel: as for `Gate`.
    """

    def __init__(self, channel: str) -> None:
        self.gate = Gate(channel)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Wait."""
        self.gate.step()


def fit(recipe: Path, channel: str) -> None:
    """Train by `distill fit`, with all of its own callbacks and loggers."""
    callback = f'{{"class_path": "step_ours.Gated", "init_args": {{"channel": "{channel}"}}}}'
    training_cli.run(["fit", f"--config={recipe}", f"--trainer.callbacks+={callback}"])


class StandIn:
    """The little that an engine asks of a trainer: sizes and precision."""

    world_size = accumulate_grad_batches = 1

    def __init__(self, data: Any, precision: str) -> None:
        self.datamodule, self.precision = data, precision


def bare(recipe: Path, channel: str) -> None:
    """Take the same step in a loop without a trainer: no callbacks, logs, checkpoints or metrics."""
    gate, read = Gate(channel), read_recipe(recipe, [])
    task, data = read.task, read.data
    data.setup("validate")
    task.configure_model()
    precision = str(read.trainer["precision"])
    task.engine.start(StandIn(data, precision), task.teachers, task.students, torch.device("cpu"))  # type: ignore[arg-type]
    groups = parameter_groups(task.students, task.alignments, task.optimizer_config)
    optimizer = build_optimizer(groups, task.optimizer_config)
    scheduler = build_scheduler(optimizer, int(read.trainer["max_steps"]), task.optimizer_config)
    size, steps = data.global_batch_size, int(read.trainer["max_steps"])
    dataset = PlannedDataset(data.plan, data.img_size_px, data.augment)
    sampler = PlanSampler(steps * size, size, rank=0, world_size=1, start=0)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)
    dtype, clip = AUTOCAST_DTYPES.get(precision), read.trainer["gradient_clip_val"]
    parameters = [parameter for group in groups for parameter in group["params"]]
    task.train()
    for batch in loader:
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
    parser.add_argument("side", choices=("fit", "bare"))
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channel", required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    {"fit": fit, "bare": bare}[options.side](options.recipe, options.channel)


if __name__ == "__main__":
    main()
