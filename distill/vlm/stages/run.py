"""Running a recipe's stages one after the other: each is resumable, and a finished one is not run again."""

from __future__ import annotations

import csv
import json
import time
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table

from distill.callbacks.checkpoint_io import AtomicCheckpointIO
from distill.callbacks.failure import FailureReports
from distill.callbacks.last_checkpoint import LastCheckpoint
from distill.callbacks.non_finite import NonFiniteGuard
from distill.callbacks.preemption import Preemption
from distill.callbacks.resume_point import ResumePoint
from distill.callbacks.step_seed import StepSeed
from distill.checkpoint_files import sweep
from distill.data.pack.durable import durable_file
from distill.precision import choose_precision
from distill.resume import make_room, resume_from
from distill.run_lock import RunLock
from distill.stop_signals import stop_signals
from distill.vlm.build import BuiltVLM, build_vlm
from distill.vlm.parameters import count_parameters
from distill.vlm.recipe import StageConfig, TrainerConfig, VLMRecipe
from distill.vlm.runs import FINISHED, STAGE_FORMAT, VLMRun, load_kept, trained_state
from distill.vlm.stages.data import StageData, accumulated_batches
from distill.vlm.stages.task import VLMTask
from distill.vlm.trained import kept_names


@dataclass(frozen=True)
class StageSummary:
    """What a stage did.

    Attributes:
        format: of the file that holds this.
        name: of the stage.
        trained: parts, joined by " + ".
        parameters: how many were trained.
        steps: optimiser steps.
        seconds: of the last part of the stage that ran.
        first_loss: mean of the first tenth of the steps.
        last_loss: mean of the last tenth.
    """

    format: str
    name: str
    trained: str
    parameters: int
    steps: int
    seconds: float
    first_loss: float | None
    last_loss: float | None


def run_recipe(recipe: VLMRecipe, content: Mapping[str, Any], *, resume: str, console: Console) -> VLMRun:
    """Run the stages of a recipe that are not finished, and return the run.

    Args:
        recipe: what to train.
        content: the plain mapping behind it, kept as config.yaml.
        resume: "auto" goes on where the run stands, "no" begins anew and moves what lies there to earlier-N/.
        console: where progress and the summary go.

    Raises:
        ConfigError: a path or value cannot be used, or the run that lies there is of another recipe.
        DataError: the stages' data cannot be used.
        WeightsError: weights are missing or damaged, or are not those that the run began with.
        UnfinishedError: told to stop; what was done is saved.
    """
    run = VLMRun(recipe.run_dir)
    with RunLock(recipe.run_dir), quiet_warnings():
        run.begin(content, resume=resume)
        seed_everything(recipe.seed, verbose=False)
        with console.status("building the model"):
            built = build_vlm(recipe)
        console.print(str(count_parameters(built.model)), highlight=False, markup=False, soft_wrap=True)
        kept: frozenset[str] = frozenset()
        for number, name in enumerate(recipe.stages, start=1):
            folder = run.stage_dir(number, name)
            if (folder / FINISHED).is_file():
                console.print(f"Stage {name} is finished: {folder}", highlight=False, markup=False, soft_wrap=True)
                kept |= kept_names(built.model, [recipe.stages[name]], built.tunable)
                load_kept(built.model, trained_state(folder, built.fingerprints), kept, str(folder))
            else:
                kept = run_stage(built, recipe, name, folder, kept=kept, resume=resume, console=console)
    print_summary(run, console)
    return run


def run_stage(
    built: BuiltVLM,
    recipe: VLMRecipe,
    name: str,
    folder: Path,
    *,
    kept: frozenset[str],
    resume: str,
    console: Console,
) -> frozenset[str]:
    """Train one stage from where it stands, and return the names of all tensors that were trained so far."""
    stage = recipe.stages[name]
    stop_signals()  # the stage before gave them back
    for leftover in sweep(folder / "checkpoints"):
        console.print(f"Removed {leftover}, which a killed run left half-written.", markup=False)
    start = resume_from(folder, resume, None)
    for notice in start.notices if start else ():
        console.print(notice, highlight=False, markup=False, soft_wrap=True)
    make_room(folder, start)
    task = VLMTask(built.model, stage, name, tunable=built.tunable, kept=kept, fingerprints=built.fingerprints)
    workers = recipe.trainer.num_workers
    data = StageData(lambda: built.open_samples(name), stage, pad_id=built.pad_id, num_workers=workers)
    trainer = build_trainer(recipe, stage, folder)
    parameters = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    console.print(
        f"Stage {name}: {data.steps} steps of {stage.global_batch_size} samples; trains {' + '.join(stage.rates)}, "
        f"{parameters:,} parameters.",
        highlight=False,
        markup=False,
    )
    began = time.perf_counter()
    trainer.fit(task, datamodule=data, ckpt_path=str(start.path) if start else None)
    seconds = round(time.perf_counter() - began, 1)
    write_summary(folder, name, stage, parameters=parameters, steps=int(trainer.global_step), seconds=seconds)
    return task.kept


def write_summary(folder: Path, name: str, stage: StageConfig, *, parameters: int, steps: int, seconds: float) -> None:
    """Say in the stage's folder that it is finished, and what it did."""
    losses = read_losses(folder)
    tenth = max(1, len(losses) // 10)
    first, last = (sum(part) / tenth if losses else None for part in (losses[:tenth], losses[-tenth:]))
    summary = StageSummary(STAGE_FORMAT, name, " + ".join(stage.rates), parameters, steps, seconds, first, last)
    with durable_file(folder / FINISHED) as file:
        file.write(json.dumps(asdict(summary), indent=1).encode())


def build_trainer(recipe: VLMRecipe, stage: StageConfig, folder: Path) -> Trainer:
    """Return the trainer of one stage, with this project's callbacks and checkpoint plugin."""
    config: TrainerConfig = recipe.trainer
    is_cuda = config.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    folder.mkdir(parents=True, exist_ok=True)
    callbacks: list[Callback] = [
        LastCheckpoint(folder / "checkpoints", every_n_steps=config.checkpoint_every),
        LearningRateMonitor("step"),
        ResumePoint(),
        FailureReports(),
        NonFiniteGuard(),
        Preemption(),
        StepSeed(recipe.seed),
    ]
    return Trainer(
        default_root_dir=folder,
        accelerator=config.accelerator,
        devices=1,
        precision=config.precision or choose_precision("cuda" if is_cuda else "cpu"),  # pyright: ignore[reportArgumentType]
        max_epochs=1,
        accumulate_grad_batches=accumulated_batches(stage),
        gradient_clip_val=stage.gradient_clip,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        logger=CSVLogger(folder, name="", version="", flush_logs_every_n_steps=20),
        log_every_n_steps=config.log_every,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=config.progress,
        use_distributed_sampler=False,
    )


def read_losses(folder: Path) -> list[float]:
    """Return the logged losses of a stage, oldest first, over all parts of its run."""
    earlier = sorted(folder.glob("metrics-*.csv"), key=lambda file: (len(file.name), file.name))
    losses: list[float] = []
    for file in (*earlier, folder / "metrics.csv"):
        if file.is_file():
            with file.open(newline="", encoding="utf-8") as stream:
                losses += [float(row["loss/total"]) for row in csv.DictReader(stream) if row.get("loss/total")]
    return losses


def print_summary(run: VLMRun, console: Console) -> None:
    """Print what each stage trained, and how its loss went."""
    table = Table("stage", "trained", "parameters", "steps", "loss", "seconds")
    for entry in run.stage_summaries():
        losses = [f"{entry[key]:.3f}" if entry[key] is not None else "?" for key in ("first_loss", "last_loss")]
        columns = (entry["name"], entry["trained"], f"{entry['parameters']:,}", str(entry["steps"]))
        table.add_row(*columns, " → ".join(losses), f"{entry['seconds']:.0f}")
    console.print(table)


@contextmanager
def quiet_warnings() -> Generator[None]:
    """Silence Lightning's advice about loaders, loggers and frozen parts that are as they should be."""
    with warnings.catch_warnings():
        for text in (
            ".*does not have many workers.*",
            ".*smaller than the logging interval.*",
            ".*Previous log files in this directory will be deleted.*",
            ".*`val_dataloader` .*",
            ".*module\\(s\\) in eval mode at the start of training.*",
            ".*treespec, LeafSpec.*",
        ):
            warnings.filterwarnings("ignore", message=text)
        yield
