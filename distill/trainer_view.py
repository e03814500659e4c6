"""What the data has to know of the trainer: this process's rank, and how far the model is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lightning import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor

from distill.errors import ConfigError


@dataclass(frozen=True)
class TrainerView:
    """The trainer as the data sees it; None stands for a single process without one.

    Attributes:
        trainer: the trainer, if there is one.
    """

    trainer: Trainer | None

    @property
    def place(self) -> dict[str, int]:
        """Rank and world size, by name.

        Taken in the training process and passed on: a worker process cannot be relied on to know them.
        """
        trainer = self.trainer
        if trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": int(trainer.global_rank), "world_size": int(trainer.world_size)}

    @property
    def rank(self) -> int:
        """This process, from 0."""
        return self.place["rank"]

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.place["world_size"]

    @property
    def ranks_to_look_ahead_for(self) -> range | None:
        """The ranks of this machine, on the one process of it that fetches shards for them; None on the others."""
        if self.trainer is None or int(self.trainer.local_rank) != 0:
            return None
        return range(self.rank, self.rank + int(self.trainer.num_devices))

    @property
    def accumulated(self) -> int:
        """Batches an optimiser step."""
        return 1 if self.trainer is None else int(self.trainer.accumulate_grad_batches)

    @property
    def batches(self) -> int:
        """Batches that this rank's model has gone through, over all epochs and earlier runs."""
        return 0 if self.trainer is None else int(self._progress.total.processed)

    @property
    def epoch_batches(self) -> int:
        """Those of the present epoch."""
        return 0 if self.trainer is None else int(self._progress.current.processed)

    @property
    def batches_within_step(self) -> int:
        """Those of an optimiser step that is not finished."""
        if self.trainer is None or self.epoch_batches == self.trainer.num_training_batches:
            return 0
        return self.epoch_batches % self.accumulated

    @property
    def is_fitting(self) -> bool:
        """Whether the trainer trains, or there is none; false for validation alone."""
        return self.trainer is None or self.trainer.state.fn in (None, "fit")

    @property
    def run_dir(self) -> Path | None:
        """The run's folder; None where nothing is to be written."""
        if self.trainer is None or getattr(self.trainer, "fast_dev_run", False):
            return None
        return Path(self.trainer.default_root_dir)

    @property
    def _progress(self) -> Any:
        return cast(Any, self.trainer).fit_loop.epoch_loop.batch_progress

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Return the sum of every rank's values, on the CPU; all ranks have to call this."""
        if self.trainer is None or self.world_size == 1:
            return values
        strategy = self.trainer.strategy
        return cast(Tensor, strategy.reduce(values.to(strategy.root_device), reduce_op="sum")).cpu()

    def check(self) -> None:
        """Refuse trainer settings that an exact plan cannot follow.

        Raises:
            ConfigError: naming the setting.
        """
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in cast(Any, self.trainer).callbacks):
            raise ConfigError(
                "The callback GradientAccumulationScheduler changes the batches a step between epochs, which an exact "
                "plan cannot follow; remove it and set trainer.accumulate_grad_batches."
            )
        # No public attribute tells; without this check Lightning would put its own sampler in place of the plan's.
        connector = getattr(self.trainer, "_accelerator_connector", None)
        if self.world_size > 1 and getattr(connector, "use_distributed_sampler", False):
            raise ConfigError("trainer.use_distributed_sampler is true; set it to false: the plan shares out the data.")
