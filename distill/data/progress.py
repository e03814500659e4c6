"""How far training is in its plan: what the trainer has done since the position that it went on from."""

from __future__ import annotations

from dataclasses import dataclass

from distill.data.plan import SamplePlan
from distill.data.position import PlanPosition
from distill.trainer_view import TrainerView


@dataclass(frozen=True)
class Progress:
    """Training's progress in samples of the plan, the same on every rank.

    Counted in what the model has finished, not in batches fetched: a loader may be ahead of the model.

    Attributes:
        view: the trainer.
        global_batch_size: images an optimiser step.
        saved: the position that training went on from; None where it is new.
    """

    view: TrainerView
    global_batch_size: int
    saved: PlanPosition | None = None

    @property
    def batch_size(self) -> int:
        """Images of one batch over all ranks; A of them make a global batch."""
        return self.global_batch_size // self.view.accumulated

    @property
    def consumed(self) -> int:
        """Plan positions that the model has gone through, over all ranks and earlier runs."""
        if self.saved is None:
            return self.view.batches * self.batch_size
        # The trainer's counters are restored after this position, and not without a trainer. Workers that Lightning
        # starts in between, to see whether it can iterate, already read ahead.
        batches = max(0, self.view.batches - self.saved.batches)
        return self.saved.consumed + batches * self.batch_size

    def position(self, plan: SamplePlan) -> PlanPosition:
        """Return where training stands in a plan."""
        consumed, within_step = self.consumed, self.view.batches_within_step * self.batch_size
        start, step = self.saved.step_start if self.saved else (0, 0)
        return PlanPosition(
            consumed=consumed,
            within_step=within_step,
            step=step + (consumed - within_step - start) // self.global_batch_size,
            fingerprint=plan.index.fingerprint,
            seed=plan.seed,
            shuffle_window=plan.shuffle_window,
            segments=[segment for segment in plan.segments if segment.start <= consumed],
            global_batch_size=self.global_batch_size,
            accumulated=self.view.accumulated,
            batches=self.view.batches,
            epoch_batches=self.view.epoch_batches,
        )
