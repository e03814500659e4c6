"""Checkpoints from which Lightning goes on exactly where training stood, wherever they were made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.loop import _Loop  # pyright: ignore[reportPrivateUsage]

from distill.callbacks.rank_agreement import Fact, check_agreement
from distill.checkpoint_files import claimed_step
from distill.errors import DataError
from distill.resume import RESUME_POINT_KEY

FIT_LOOP = "fit_loop"


@runtime_checkable
class PlannedData(Protocol):
    """Data that all ranks take from one plan."""

    def facts(self) -> dict[str, Fact]:
        """Return what has to be the same on every rank."""
        ...

    @property
    def has_other_batches(self) -> bool:
        """Whether the checkpoint's batches are of another size."""
        ...

    def batches_of(self, epoch_batches: int) -> int:
        """Return how many of this run's batches the checkpoint's are."""
        ...


class ResumePoint(Callback):
    """Writes the trainer's counters into each checkpoint so that nothing is skipped and nothing is done twice.

    Lightning's own counters, saved as they are, skip a validation that was due, count a step of the log twice, and
    end an epoch that `max_steps` has cut. Here a checkpoint says: so many batches of this epoch are done, and the
    validation after them is due, or is not.
    """

    def __init__(self) -> None:
        self._validated_at = -1
        self._step_to_validate = -1
        self._max_steps = -1
        self._has_other_batches = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that all processes have the same data and plan, and go on from the same checkpoint.

        Raises:
            ConfigError: one found another than the first; every rank raises it.
        """
        if stage != "fit":
            return
        path = trainer.ckpt_path
        own = f"{Path(path).name} (step {claimed_step(Path(path))})" if path else "no checkpoint (step 0)"
        advice = "trainer.default_root_dir must be a folder that all machines share."
        check_agreement(trainer, {"the checkpoint to go on from": own}, advice)
        data = cast(Any, trainer).datamodule
        facts = data.facts() if isinstance(data, PlannedData) else {}
        check_agreement(trainer, facts, "Start every rank with the same recipe, on the same shards.")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember that the validation after this batch is done."""
        if not trainer.sanity_checking:
            self._validated_at = batches_done(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Replace the loops' counters, and have the log on disk: the steps before this point are not done again."""
        if trainer.state.fn != "fit" or "loops" not in checkpoint:
            return
        is_due = validation_is_due(trainer) and self._validated_at != batches_done(trainer)
        set_counters(trainer, checkpoint["loops"][FIT_LOOP], is_due=is_due)
        checkpoint[RESUME_POINT_KEY] = {"validation_is_due": is_due}
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember whether the validation was done, and count the epoch's batches in those of this run's size.

        Raises:
            DataError: the batch size changed where the epoch's images are no whole number of steps.
        """
        if RESUME_POINT_KEY not in checkpoint:
            return
        data = cast(Any, trainer).datamodule
        # Of the total nothing is taken but differences: it stays, and with it the position's `batches`.
        progress = checkpoint["loops"][FIT_LOOP]["epoch_loop.batch_progress"]
        self._has_other_batches = isinstance(data, PlannedData) and data.has_other_batches
        if self._has_other_batches and not progress["is_last_batch"]:
            set_all(progress["current"], data.batches_of(int(progress["current"]["processed"])))
        if checkpoint[RESUME_POINT_KEY]["validation_is_due"]:
            self._step_to_validate = int(checkpoint["global_step"])
        else:
            batches = checkpoint["loops"][FIT_LOOP]["epoch_loop.batch_progress"]["total"]
            self._validated_at = int(batches["processed"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a run begin that has all its steps and lacks the last validation: Lightning would end at once."""
        epoch_loop = trainer.fit_loop.epoch_loop
        if 0 < epoch_loop.max_steps <= self._step_to_validate:
            self._max_steps, epoch_loop.max_steps = epoch_loop.max_steps, self._step_to_validate + 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End after this validation, where it was the only thing left to do."""
        if self._max_steps > 0 and not trainer.sanity_checking:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the loops for going on, before Lightning looks where it stands.

        Raises:
            DataError: the epoch has become shorter by another batch size, and nothing of it is left.
        """
        loop = cast(Any, trainer.fit_loop)
        if not loop.is_resuming:
            return
        epoch_loop = loop.epoch_loop
        progress = epoch_loop.batch_progress.current
        begins_epoch = progress.ready == 0
        if begins_epoch:
            # With max_steps set, Lightning takes a run between two epochs for one within an epoch.
            cast(Any, _Loop.restarting).fset(loop, False)
        if self._has_other_batches and not begins_epoch:
            set_epoch_batches(trainer)
        # It adds the step of a batch whose validation it comes back to, and no other.
        comes_back = not begins_epoch and epoch_loop._should_check_val_fx(loop._data_fetcher)
        is_step = not epoch_loop._should_accumulate()
        epoch_loop._batches_that_stepped = trainer.global_step - int(comes_back and is_step)
        if self._has_other_batches and self._max_steps > 0 and not comes_back:
            # By the new count no validation is due here: all is done.
            epoch_loop.max_steps, self._max_steps = self._max_steps, -1

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log the step that ended just before: Lightning does so after its last hook, and a checkpoint has it."""
        progress = cast(Any, trainer.fit_loop).epoch_loop.batch_progress.total
        if trainer.training and progress.processed == progress.completed + 1:
            cast(Any, trainer)._logger_connector.update_train_step_metrics()


def set_epoch_batches(trainer: Trainer) -> None:
    """Make a finished epoch finished by the present batch size, too, and refuse one that was cut to its end.

    Args:
        trainer: going on from a checkpoint with batches of another size, within an epoch.

    Raises:
        DataError: nothing is left of the epoch, and what comes at its end would be left out.
    """
    progress, planned = cast(Any, trainer.fit_loop).epoch_loop.batch_progress, int(trainer.num_training_batches)
    if progress.is_last_batch:
        current = progress.current
        current.ready = current.started = current.processed = current.completed = planned
    elif progress.current.ready >= planned:
        raise DataError(
            f"The checkpoint was saved within an epoch, after what are {progress.current.ready} batches with the "
            f"present data.global_batch_size and trainer.accumulate_grad_batches; the epoch now has {planned}. Set "
            "them back, or resume from a checkpoint of an epoch's end."
        )


def batches_done(trainer: Trainer) -> int:
    """Return the training batches that the model has gone through, over all epochs."""
    return int(cast(Any, trainer.fit_loop).epoch_loop.batch_progress.total.processed)


def validation_is_due(trainer: Trainer) -> bool:
    """Whether the settings have a validation between the last batch that was done and the next."""
    loop = cast(Any, trainer.fit_loop)
    progress = loop.epoch_loop.batch_progress
    if trainer.sanity_checking or progress.current.processed == 0:
        return False
    if trainer.validating:
        return True
    # Once the next batch has begun, or the epoch has ended, it is behind.
    has_gone_on = progress.current.ready > progress.current.processed
    if has_gone_on or epoch_has_ended(trainer):
        return False
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def epoch_has_ended(trainer: Trainer) -> bool:
    """Whether the loop over the present epoch's batches has ended, be it because of `max_steps`."""
    epochs = cast(Any, trainer.fit_loop).epoch_progress.current
    return bool(epochs.processed == epochs.ready)


def set_counters(trainer: Trainer, loops: dict[str, Any], *, is_due: bool) -> None:
    """Write what is done into a checkpoint's loop state.

    Args:
        trainer: within `fit`.
        loops: the state of the fit loop, changed in place.
        is_due: whether a validation comes next.
    """
    progress = cast(Any, trainer.fit_loop).epoch_loop.batch_progress
    done, total = int(progress.current.processed), int(progress.total.processed)
    epochs = int(trainer.fit_loop.epoch_progress.current.ready)
    is_whole = done >= trainer.num_training_batches
    # Between the last validation of an epoch and its end, the hooks at the epoch's end are still to come.
    ends_epoch = is_whole and not is_due and not (trainer.validating and not epoch_has_ended(trainer))
    if ends_epoch:
        done = 0
    finished = epochs - int(not ends_epoch)
    for part, count in (("current", done), ("total", total)):
        set_all(loops["epoch_loop.batch_progress"][part], count)
        epoch = loops["epoch_progress"][part]
        set_all(epoch, finished)
        epoch.update(ready=epochs, started=epochs)
        validation = loops["epoch_loop.val_loop.batch_progress"][part]
        set_all(validation, 0)
        if is_due:
            # What Lightning takes for "within the first batch of the validation"; none counts as done.
            validation.update(ready=1, started=1)
    loops["epoch_loop.batch_progress"]["is_last_batch"] = is_whole and not ends_epoch


def set_all(counters: dict[str, int], count: int) -> None:
    """Set all four counters of a progress."""
    counters.update(ready=count, started=count, processed=count, completed=count)
