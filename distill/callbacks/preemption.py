"""Being preempted without losing a step: save at a step boundary, all ranks together, and say so by the exit status."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from distill.callbacks.last_checkpoint import LastCheckpoint
from distill.control_group import ControlGroup, control_group
from distill.errors import UnfinishedError
from distill.stop_signals import StopSignals, close_stop_signals, stop_signals


class Preemption(Checkpoint):
    """Saves and stops when SIGTERM, SIGUSR1 or Ctrl-C comes to any of the run's processes.

    The ranks agree at the end of an optimiser step, save `checkpoints/last.ckpt` and end with status 75 (130 after
    Ctrl-C). A validation that is due or under way is left, and run when the run is resumed: `LastCheckpoint` saves
    before it begins. Lightning's own answer to SIGTERM is switched off: it broadcasts from within the signal handler,
    which hangs when one of several processes gets the signal, and it ends with status 0.

    It is a `Checkpoint` to Lightning, which calls these after all other callbacks: what they change belongs to the
    step.

    Args:
        every_n_steps: optimiser steps between two agreements. Each costs a message over the network, which matters only
            where steps take milliseconds.
        deadline_s: seconds from the signal to the end of the process, which is ended with status 76 where that is not
            reached. Set it a little below what the scheduler grants before it kills.
    """

    def __init__(self, every_n_steps: int = 1, deadline_s: float = 90.0) -> None:
        self.every_n_steps = every_n_steps
        self.deadline_s = deadline_s
        self._group = ControlGroup(None)
        self._signals: StopSignals | None = None
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen for signals, instead of Lightning."""
        if stage != "fit":
            return
        self._group = control_group()
        self._signals = stop_signals()
        # No public switch; a SLURM requeue is done below, after the save.
        cast(Any, trainer)._signal_connector.register_signal_handlers = _register_nothing

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that from now on there is something to save."""
        self._step = trainer.global_step
        if self._signals is not None:
            name = f"rank-{trainer.global_rank}-stack.txt"
            self._signals.begin(self.deadline_s, Path(trainer.default_root_dir) / "failures" / name)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agree at the end of a step, and save and stop."""
        if trainer.global_step == self._step:
            return  # within gradient accumulation
        self._step = trainer.global_step
        if self._step % self.every_n_steps == 0 and (code := self._agree()):
            save_last(trainer)
            self._stop(trainer, code, "")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Leave the validation; all ranks have equally many batches of it."""
        is_between_steps = trainer.state.fn == "fit" and not trainer.sanity_checking
        if is_between_steps and (code := self._agree()):
            self._stop(trainer, code, ", during a validation, which will be run again")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._close()

    def _close(self) -> None:
        if self._signals is not None:
            close_stop_signals()
            self._signals = None

    def _agree(self) -> int:
        return self._group.highest(self._signals.exit_code if self._signals else 0)

    def _stop(self, trainer: Trainer, code: int, where: str) -> None:
        name = self._signals.signal_name if self._signals else ""
        if trainer.is_global_zero:
            requeue_slurm_job(trainer, name)
        raise UnfinishedError(
            f"Preempted by {name or 'a signal to another process'} at step {trainer.global_step}"
            f"{where}; saved {last_path(trainer)}. Continue with the same command and --resume auto.",
            code,
        )


def last_checkpoint(trainer: Trainer) -> LastCheckpoint:
    """Return the callback that writes `last.ckpt`, made here where the run has none."""
    own = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, LastCheckpoint)]
    return own[0] if own else LastCheckpoint(Path(trainer.default_root_dir) / "checkpoints")


def last_path(trainer: Trainer) -> Path:
    """Return where the run's last checkpoint is written."""
    return last_checkpoint(trainer).path


def save_last(trainer: Trainer) -> None:
    """Write the run's last checkpoint; all ranks have to call this."""
    last_checkpoint(trainer).save(trainer)


def requeue_slurm_job(trainer: Trainer, signal_name: str) -> None:
    """Ask SLURM to run the job again, where it sent the signal that announces the end of the job's time.

    As Lightning does: for the environment's `requeue_signal` (SIGUSR1), unless `auto_requeue` is off.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return
    job, requeue_signal = os.environ.get("SLURM_JOB_ID", ""), environment.requeue_signal
    if requeue_signal is None or signal_name != requeue_signal.name or not job.isdigit():
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=30)
        rank_zero_info(f"SLURM will run job {job} again.")
    except (OSError, subprocess.SubprocessError) as error:
        rank_zero_warn(f"SLURM would not run job {job} again ({error}); submit it again yourself.")


def _register_nothing() -> None:
    """Stand in for Lightning's registration of its signal handlers."""
