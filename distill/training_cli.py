"""`distill fit` and `distill validate`: LightningCLI over `DistillationTask` and `ShardDataModule`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import nn

from distill.callbacks.checkpoint_io import AtomicCheckpointIO
from distill.callbacks.initial_weights import SaveInitialWeights
from distill.callbacks.last_checkpoint import LastCheckpoint
from distill.callbacks.throughput import Throughput
from distill.data.datamodule import ShardDataModule
from distill.errors import ConfigError
from distill.task import DistillationTask


class SaveRecipe(SaveConfigCallback):
    """Writes the recipe as it runs to `config.yaml` in the run directory; a restarted run writes it again."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file when training starts; validation alone leaves the run's recipe as it is."""
        if stage == "fit":
            run_dir = Path(trainer.default_root_dir)
            run_dir.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, run_dir / "config.yaml", skip_none=False, overwrite=True, multifile=False)


class DistillCLI(LightningCLI):
    """Builds trainer, task and data from one or several YAML files, later files and flags winning.

    A run's files all lie under `trainer.default_root_dir`: config.yaml, metrics.csv, tensorboard/, checkpoints/.
    """

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
        parser.set_defaults({"trainer.num_sanity_val_steps": -1, "trainer.use_distributed_sampler": False})

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
        if self._get(self.config_init, "trainer.logger") in (None, True):
            if self.subcommand == "fit":
                keep_earlier_metrics(Path(run_dir), is_resumed=self._get(self.config, "ckpt_path") is not None)
                kwargs["logger"] = default_loggers(Path(run_dir))
            else:
                kwargs["logger"] = CSVLogger(run_dir, name="validation", version="")
        plugins = as_list(self._get(self.config_init, "trainer.plugins"))
        kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        callbacks: list[Callback] = as_list(self._get(self.config_init, "trainer.callbacks"))
        kwargs["callbacks"] = [*callbacks, *default_callbacks(Path(run_dir), callbacks)]
        return super().instantiate_trainer(**kwargs)


def as_list(value: Any) -> list[Any]:
    """Return a list for None, one item or several."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def keep_earlier_metrics(run_dir: Path, *, is_resumed: bool) -> None:
    """Put an earlier run's `metrics.csv` aside: Lightning's CSV logger would delete it.

    A resumed run goes on from it, so it becomes `metrics-1.csv`, `metrics-2.csv`, ..., which the report and the model
    card read first. A new run in the same folder starts anew: what was there moves to `earlier-1/`, ...
    """
    if getattr(rank_zero_only, "rank", 0) != 0:
        return
    if is_resumed and (run_dir / "metrics.csv").is_file():
        taken = len(list(run_dir.glob("metrics-*.csv")))
        (run_dir / "metrics.csv").replace(run_dir / f"metrics-{taken + 1}.csv")
    elif not is_resumed and (earlier := list(run_dir.glob("metrics*.csv"))):
        folder = run_dir / f"earlier-{len(list(run_dir.glob('earlier-*'))) + 1}"
        folder.mkdir()
        for file in earlier:
            file.replace(folder / file.name)


def default_loggers(run_dir: Path) -> list[Logger]:
    """Return CSV (`metrics.csv`) and TensorBoard (`tensorboard/`) loggers that write into the run directory."""
    csv = CSVLogger(run_dir, name="", version="", flush_logs_every_n_steps=20)
    return [csv, TensorBoardLogger(run_dir, name="tensorboard", version="")]


def default_callbacks(run_dir: Path, configured: list[Callback]) -> list[Callback]:
    """Return the callbacks every run has, leaving out a kind that the recipe configured itself."""
    defaults: list[Callback] = [
        LastCheckpoint(run_dir / "checkpoints"),
        LearningRateMonitor("step"),
        Throughput(),
        SaveInitialWeights(),
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


def run(words: list[str]) -> None:
    """Run `distill fit ...` or `distill validate ...`.

    Raises:
        DistillError: something a user can mend.
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
    DistillCLI(
        DistillationTask,
        ShardDataModule,
        save_config_callback=SaveRecipe,
        save_config_kwargs={"save_to_log_dir": False},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs={name: {"default_env": False} for name in ("fit", "validate")},
        args=None if words == sys.argv[1:] else words,  # Lightning warns when given what it would read itself
    )
