"""`distill fit` and `distill validate`: LightningCLI over `DistillationTask` and `ShardDataModule`."""

from __future__ import annotations

import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import nn

from distill.callbacks.checkpoint_io import AtomicCheckpointIO
from distill.callbacks.failure import FailureReports
from distill.callbacks.initial_weights import SaveInitialWeights
from distill.callbacks.last_checkpoint import LastCheckpoint
from distill.callbacks.non_finite import NonFiniteGuard
from distill.callbacks.preemption import Preemption
from distill.callbacks.resume_point import ResumePoint
from distill.callbacks.step_seed import StepSeed
from distill.callbacks.stop_reason import StopCause, StopReason, kept_cause
from distill.callbacks.throughput import Throughput
from distill.checkpoint_files import sweep
from distill.data.datamodule import ShardDataModule
from distill.errors import ConfigError, UnfinishedError
from distill.precision import Precision, choose_precision
from distill.resume import ResumeFrom, make_room, resume_from
from distill.run_lock import RunLock
from distill.task import DistillationTask


class SaveRecipe(SaveConfigCallback):
    """Writes the recipe as it runs to `config.yaml` in the run directory; a restarted run writes it again."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file when training starts; validation alone leaves the run's recipe as it is."""
        if stage == "fit":
            run_dir = Path(trainer.default_root_dir)
            run_dir.mkdir(parents=True, exist_ok=True)
            # The recipe, not how this process was started.
            recipe = self.config.clone()
            recipe["ckpt_path"], recipe["resume"] = None, "no"
            self.parser.save(recipe, run_dir / "config.yaml", skip_none=False, overwrite=True, multifile=False)


class DistillCLI(LightningCLI):
    """Builds trainer, task and data from one or several YAML files, later files and flags winning.

    A run's files all lie under `trainer.default_root_dir`: config.yaml, metrics.csv, tensorboard/, checkpoints/.

    Args:
        held: takes the lock on the run directory, and gives it back when it is closed.
    """

    def __init__(self, *arguments: Any, held: ExitStack, **settings: Any) -> None:
        self._held = held
        self._start: ResumeFrom | None = None
        super().__init__(*arguments, **settings)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Offer what a distillation run needs of Lightning's subcommands."""
        offered = LightningCLI.subcommands()
        return {name: offered[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the flag that is neither the trainer's, the task's nor the data's, and this project's defaults."""
        parser.add_argument(
            "--dry_run",
            type=bool,
            default=False,
            help="Build the recipe without reading weights or images, print its parameter counts, and stop.",
        )
        parser.add_argument(
            "--resume",
            type=str,
            default="no",
            help="Where to go on from: `auto` takes the newest checkpoint of the run directory that is whole, and "
            "begins a new run where there is none; a path takes that file; `no` begins anew, and moves what an "
            "earlier run left there to earlier-N/.",
        )
        parser.set_defaults({"trainer.num_sanity_val_steps": -1, "trainer.use_distributed_sampler": False})

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would read the whole file for hyperparameters, which these checkpoints lack."""

    def before_instantiate_classes(self) -> None:
        """Hold the run directory, tidy it, and choose the checkpoint to go on from.

        Raises:
            ConfigError: another run holds the directory, or the flags contradict each other.
            WeightsError: no checkpoint that was asked for can be used.
        """
        root = self._get(self.config, "trainer.default_root_dir")
        if not root or self._get(self.config, "dry_run"):
            return
        if self.subcommand == "fit" and is_rank_zero():
            self._held.enter_context(RunLock(Path(root)))
            for leftover in sweep(Path(root) / "checkpoints"):
                rank_zero_info(f"Removed {leftover}, which a killed run left half-written.")
        resume, ckpt_path = self._get(self.config, "resume"), self._get(self.config, "ckpt_path")
        self._start = resume_from(Path(root), resume, ckpt_path)
        if self._start is not None:
            self.config[str(self.subcommand)]["ckpt_path"] = str(self._start.path)
            for notice in self._start.notices:
                rank_zero_info(notice)
        elif resume == "auto":
            rank_zero_info(f"--resume auto: {Path(root) / 'checkpoints'} has no checkpoint; a new run begins.")

    def instantiate_classes(self) -> None:
        """Build task, data and trainer.

        Raises:
            ConfigError: a teacher, student or other class refuses an argument; teachers and students say so by a
                ValueError or FileNotFoundError of their own.
        """
        try:
            super().instantiate_classes()
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(f"The recipe cannot be built. {error}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, with this project's loggers, callbacks and checkpoint plugin beside the recipe's own.

        Raises:
            ConfigError: the recipe names no run directory.
            SystemExit: with status 0, after a dry run.
        """
        if self._get(self.config_init, "dry_run"):
            print_parameters(cast(DistillationTask, self.model))
            raise SystemExit(0)
        run_dir = self._get(self.config_init, "trainer.default_root_dir")
        if not run_dir:
            raise ConfigError("trainer.default_root_dir is not set; name the folder that this run writes to.")
        if self.subcommand == "fit" and is_rank_zero():
            make_room(Path(run_dir), self._start)
        if self._get(self.config_init, "trainer.logger") in (None, True):
            if self.subcommand == "fit":
                step = self._start and self._start.global_step
                kwargs["logger"] = default_loggers(Path(run_dir), purge_step=step)
            else:
                kwargs["logger"] = CSVLogger(run_dir, name="validation", version="")
        if self._get(self.config_init, "trainer.precision") is None:
            kwargs["precision"] = self._choose_precision()
        plugins = as_list(self._get(self.config_init, "trainer.plugins"))
        kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        callbacks: list[Callback] = as_list(self._get(self.config_init, "trainer.callbacks"))
        kwargs["callbacks"] = [*callbacks, *default_callbacks(Path(run_dir), callbacks)]
        # `seed_everything: false` asks for another course each time.
        if (seed := self._get(self.config_init, "seed_everything")) is not False and seed is not None:
            kwargs["callbacks"].append(StepSeed(int(seed)))
        trainer = super().instantiate_trainer(**kwargs)
        for callback in cast(Any, trainer).callbacks:
            if isinstance(callback, FailureReports):
                callback.limit_waits(trainer)
        return trainer

    def _choose_precision(self) -> Precision:
        """Return what the recipe leaves open, and say so: it decides the speed, and to some digits the numbers."""
        accelerator = self._get(self.config_init, "trainer.accelerator")
        device = "cuda" if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"
        precision = choose_precision(device)
        rank_zero_info(f"trainer.precision is not set: {precision}, the faster one on this {device}.")
        return precision


def as_list(value: Any) -> list[Any]:
    """Return a list for None, one item or several."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def is_rank_zero() -> bool:
    """Whether this process is the one that writes; told by the launcher's environment, before there is a trainer."""
    return getattr(rank_zero_only, "rank", 0) == 0


def default_loggers(run_dir: Path, *, purge_step: int | None = None) -> list[Logger]:
    """Return CSV (`metrics.csv`) and TensorBoard (`tensorboard/`) loggers that write into the run directory.

    Args:
        run_dir: the run's folder.
        purge_step: TensorBoard hides what a resumed run had logged from this step on.
    """
    csv = CSVLogger(run_dir, name="", version="", flush_logs_every_n_steps=20)
    return [csv, TensorBoardLogger(run_dir, name="tensorboard", version="", purge_step=purge_step)]


def default_callbacks(run_dir: Path, configured: list[Callback]) -> list[Callback]:
    """Return the callbacks every run has, leaving out a kind that the recipe configured itself."""
    defaults: list[Callback] = [
        StopReason(),  # first: it looks before others save
        LastCheckpoint(run_dir / "checkpoints"),
        LearningRateMonitor("step"),
        Throughput(),
        SaveInitialWeights(),
        ResumePoint(),
        FailureReports(),
        NonFiniteGuard(),
        Preemption(),
    ]
    kinds = {type(callback) for callback in configured}
    return [callback for callback in defaults if type(callback) not in kinds]


def print_parameters(task: DistillationTask) -> None:
    """Print how many parameters each part of a task has."""
    table = Table("part", "class", "parameters")
    for name in task.teachers.names():
        table.add_row(f"teacher {name}", *_described(task.teachers[name]))
    for name, student in task.students.items():
        table.add_row(f"student {name}", *_described(student))
    table.add_row("heads", "Alignment", f"{count_parameters(task.alignments):,}")
    Console(width=100).print(table)


def _described(module: nn.Module) -> tuple[str, str]:
    return type(module).__name__, f"{count_parameters(module):,}"


def count_parameters(module: nn.Module) -> int:
    """Return how many parameters a module has, frozen ones included."""
    return sum(parameter.numel() for parameter in module.parameters())


def check_finished(trainer: Trainer) -> None:
    """Refuse to call a run finished that the time limit stopped before its last step.

    Early stopping and other callbacks that set `trainer.should_stop` decide that the run is finished.

    Raises:
        ConfigError: earlier parts of the run had used all of the time limit, so another start would do nothing.
        UnfinishedError: with the status that asks for another start.
    """
    planned, done = trainer.estimated_stepping_batches, trainer.global_step
    cause = kept_cause(trainer)
    if cause is None or done >= planned or planned == float("inf") or getattr(trainer, "fast_dev_run", False):
        return
    if cause is not StopCause.TIMER:
        who = "early stopping" if cause is StopCause.EARLY_STOPPING else "a callback that set trainer.should_stop"
        rank_zero_info(f"Finished at step {done} of {planned:g}, as {who} decided.")
        return
    for timer in (own for own in cast(Any, trainer).callbacks if isinstance(own, Timer)):
        # The time of earlier parts, which Lightning takes from the checkpoint, has no public name.
        if getattr(timer, "_offset", 0.0) >= (getattr(timer, "_duration", None) or float("inf")):
            raise ConfigError(
                f"The run stands at step {done} of {planned:g}, and its earlier parts have used all of "
                "trainer.max_time, which counts the time of all parts; set a longer one."
            )
    raise UnfinishedError(
        f"The run stopped at step {done} of {planned:g}: trainer.max_time is over. Its checkpoint is saved. Continue "
        "with the same command, --resume auto and a longer trainer.max_time, which counts the time of all parts."
    )


def run(words: list[str]) -> None:
    """Run `distill fit ...` or `distill validate ...`.

    Raises:
        DistillError: something a user can mend.
        UnfinishedError: `fit` stopped before its last step.
        SystemExit: the command line does not parse.
    """
    # The plan decides how many batches there are: Lightning's advice on worker counts and on a short log interval is
    # about loaders it knows.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*Previous log files in this directory will be deleted.*")
    # torchmetrics has summed over the ranks before these values are logged.
    warnings.filterwarnings("ignore", message=".*recommended to use `self.log.*sync_dist=True.*")
    warnings.filterwarnings("ignore", message=".*Total length of `list` across ranks is zero.*")  # no validation data
    with ExitStack() as held:
        cli = DistillCLI(
            DistillationTask,
            ShardDataModule,
            save_config_callback=SaveRecipe,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={name: {"default_env": False} for name in ("fit", "validate")},
            held=held,
            args=None if words == sys.argv[1:] else words,  # Lightning warns when given what it would read itself
        )
        if cli.subcommand == "fit":
            check_finished(cli.trainer)
