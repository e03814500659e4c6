"""A recipe read as `distill fit` reads it, with nothing of a run begun."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

from distill.data.datamodule import ShardDataModule
from distill.errors import ConfigError
from distill.planner.simulate import DeviceType
from distill.task import DistillationTask
from distill.training_cli import DistillCLI, as_list


class _RecipeReader(DistillCLI):
    """Builds task and data; neither takes a run directory nor makes a trainer, whose devices need not be here."""

    def before_instantiate_classes(self) -> None:
        """Leave the run directory alone."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make none."""
        return cast(Trainer, None)


@dataclass
class Recipe:
    """What a recipe says.

    Attributes:
        task: teachers, students and alignments, without weights.
        data: the data module, not yet set up.
        trainer: the trainer's settings by name.
        encoder_arguments: `init_args` of each encoder as the recipe has them, by role, for example "teacher NAME".
    """

    task: DistillationTask
    data: ShardDataModule
    trainer: dict[str, Any]
    encoder_arguments: dict[str, dict[str, Any]]

    @property
    def device(self) -> DeviceType:
        """The kind of device that `trainer.accelerator` names; "auto" is a GPU where this machine has one."""
        import torch

        named = self.trainer.get("accelerator") or "auto"
        return "cuda" if named in ("gpu", "cuda") or (named == "auto" and torch.cuda.is_available()) else "cpu"

    @property
    def world_size(self) -> int:
        """Devices in all; those that are left to "auto" count as one."""
        devices, nodes = self.trainer.get("devices"), self.trainer.get("num_nodes") or 1
        if isinstance(devices, str) and devices.lstrip("-").isdigit():
            devices = int(devices)
        if isinstance(devices, list | tuple):
            return len(cast(list[Any], devices)) * int(nodes)
        return (devices if isinstance(devices, int) and devices > 0 else 1) * int(nodes)

    @property
    def accumulated(self) -> int:
        """Batches an optimiser step."""
        return int(self.trainer.get("accumulate_grad_batches") or 1)

    @property
    def batch_size_per_device(self) -> int:
        """Images a device sees at a time.

        Raises:
            ConfigError: the global batch cannot be shared out evenly.
        """
        parts = self.world_size * self.accumulated
        if self.data.global_batch_size % parts:
            raise ConfigError(
                f"data.global_batch_size {self.data.global_batch_size} is no multiple of {parts} (devices times "
                "trainer.accumulate_grad_batches); choose one that is."
            )
        return self.data.global_batch_size // parts

    @property
    def is_ddp(self) -> bool:
        """Whether gradients travel in buckets between devices."""
        strategy = self.trainer.get("strategy") or "auto"
        return self.world_size > 1 and (strategy == "auto" or "ddp" in str(strategy).lower())

    @property
    def averages_weights(self) -> bool:
        """Whether a callback keeps a moving average of the weights."""
        return any(isinstance(callback, WeightAveraging) for callback in self._callbacks)

    @property
    def kept_checkpoints(self) -> int | None:
        """Most checkpoint files at any instant; None if a callback keeps all.

        `last.ckpt`, `previous.ckpt` and the one that is being written; further `ModelCheckpoint`s add their own.
        """
        count = 3
        for callback in self._callbacks:
            if isinstance(callback, ModelCheckpoint):
                if callback.save_top_k < 0:
                    return None
                count += callback.save_top_k + bool(callback.save_last)
        return count

    @property
    def _callbacks(self) -> list[Any]:
        return as_list(self.trainer.get("callbacks"))


def read_recipe(config: Path, overrides: list[str]) -> Recipe:
    """Return the recipe of a YAML file and the flags that win over it.

    Args:
        config: the file.
        overrides: further words of `distill fit`, for example `--trainer.devices=1` or `--config=overlay.yaml`.

    Raises:
        ConfigError: the file does not exist, or its classes refuse what it says.
        SystemExit: with status 2, if it does not parse; the reason is printed.
    """
    if not config.is_file():
        raise ConfigError(f"The recipe {config} does not exist; give the path of a YAML file.")
    with ExitStack() as held, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
        cli = _RecipeReader(
            DistillationTask,
            ShardDataModule,
            run=False,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"default_env": False},
            held=held,
            args=[f"--config={config}", *overrides],
        )
    settings = cast(dict[str, Any], cli.config_init["trainer"].as_dict())
    settings["callbacks"] = cli.config_init["trainer"]["callbacks"]
    arguments = {
        f"{role} {name}": dict(entry.get("init_args") or {})
        for role in ("teacher", "student")
        for name, entry in cast(dict[str, Any], cli.config["model"][f"{role}s"]).items()
    }
    return Recipe(cast(DistillationTask, cli.model), cast(ShardDataModule, cli.datamodule), settings, arguments)
