"""Where training stands in its plan: all the state that its data has, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distill.data.index import DatasetIndex
from distill.data.plan import SamplePlan
from distill.data.plan_segments import Schedule, Segment, WeightChange, segment_on_new_data
from distill.errors import DataError


@dataclass(frozen=True)
class PlanPosition:
    """A place in a plan, and what the plan depends on.

    Attributes:
        consumed: plan positions that the model has gone through, over all ranks.
        within_step: how many of these belong to an optimiser step that was not finished; 0 at a step's end.
        step: optimiser steps that were finished, by the plan: a global batch each.
        fingerprint: SHA-256 of the training data, hex.
        seed: of the plan.
        shuffle_window: of the plan.
        segments: the mixes that were begun, in order.
        global_batch_size: images an optimiser step. Another value may go on from here: the plan is by sample.
        accumulated: batches an optimiser step.
        batches: batches that the model has gone through on one rank, over all epochs.
        epoch_batches: those of the present epoch.
    """

    consumed: int
    within_step: int
    step: int
    fingerprint: str
    seed: int
    shuffle_window: int | None
    segments: list[Segment]
    global_batch_size: int
    accumulated: int
    batches: int
    epoch_batches: int

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, which a checkpoint may hold."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> PlanPosition:
        """Return the position that a checkpoint holds.

        Raises:
            DataError: it is not that of this version.
        """
        try:
            values: dict[str, Any] = {**state, "segments": [Segment(**segment) for segment in state["segments"]]}
            return cls(**values)
        except (TypeError, KeyError) as error:
            raise DataError(
                f"The checkpoint's data position has the fields {', '.join(state)}, which this version does not "
                "read; resume with the version that wrote it."
            ) from error

    @property
    def batch_size(self) -> int:
        """Images of one batch over all ranks; A of them make a global batch."""
        return self.global_batch_size // self.accumulated

    @property
    def step_start(self) -> tuple[int, int]:
        """The position that the present optimiser step starts at, and its number."""
        return self.consumed - self.within_step, self.step

    def check_continues(self, saved: PlanPosition, *, allow_new_data: bool = False) -> None:
        """Refuse to go on from a position in another plan, or from one that cannot be met exactly.

        Args:
            saved: where to go on from.
            allow_new_data: whether other data may follow.

        Raises:
            DataError: seed, window or data differ, or the global batch changed within one.
        """
        advice = {
            "seed": "set data.seed back",
            "shuffle_window": "set data.shuffle_window back",
            "fingerprint": "restore the shards that data.train had, set data.allow_new_data to true to go on with the "
            "new ones from here",
        }
        if allow_new_data:
            del advice["fingerprint"]
        for name, remedy in advice.items():
            mine, theirs = getattr(self, name), getattr(saved, name)
            if mine != theirs:
                raise DataError(
                    f"The checkpoint's data differs in its {name}: {theirs} there, {mine} here; {remedy}, or start a "
                    "new run."
                )
        if saved.within_step and saved.global_batch_size != self.global_batch_size:
            raise DataError(
                f"The checkpoint was saved within an optimiser step of {saved.global_batch_size} images; with "
                f"data.global_batch_size = {self.global_batch_size} that step cannot be finished. Set it back, or "
                "resume from a checkpoint of a step's end."
            )

    def batches_of(self, saved: PlanPosition, epoch_batches: int) -> int:
        """Return how many batches of the present size the saved ones of an unfinished epoch are.

        The trainer counts an epoch in batches. Their size is `global_batch_size / accumulated`, over all ranks.

        Args:
            saved: where to go on from.
            epoch_batches: those of its epoch that are done, of its size.

        Raises:
            DataError: the images that they hold do not make up whole optimiser steps.
        """
        images = epoch_batches * saved.batch_size
        if images % self.global_batch_size:
            raise DataError(
                f"The checkpoint was saved after {images} images of an epoch, with data.global_batch_size = "
                f"{saved.global_batch_size} and trainer.accumulate_grad_batches = {saved.accumulated}; with "
                f"{self.global_batch_size} and {self.accumulated} these are no whole number of optimiser steps. Set "
                f"them back, choose a global batch that divides {images}, or resume from an epoch's end."
            )
        return images // self.batch_size


def lay_plan(
    index: DatasetIndex,
    schedule: Schedule,
    *,
    seed: int,
    shuffle_window: int | None,
    global_batch_size: int,
    saved: PlanPosition | None = None,
) -> SamplePlan:
    """Return the plan of a new run, or of one that goes on: what was gone through stays, the rest is as scheduled.

    Args:
        index: the training data.
        schedule: the mix of each optimiser step.
        seed: of the plan.
        shuffle_window: of the plan.
        global_batch_size: images an optimiser step, from here on.
        saved: where to go on from; None means from the start.

    Raises:
        DataError: the schedule would have mixed what was gone through otherwise.
        ConfigError: seed or window are out of range.
    """
    begun = _begun(index, schedule, saved) if saved else []
    position, step = saved.step_start if saved and begun else (0, 0)
    plan = SamplePlan(index, schedule.at(step), seed, shuffle_window=shuffle_window, segments=begun)
    for change in schedule.after(step):
        plan = plan.with_change(position + (change.from_step - step) * global_batch_size, change)
    return plan


def _begun(index: DatasetIndex, schedule: Schedule, saved: PlanPosition) -> list[Segment]:
    """Return the segments of which samples were gone through, and one on the new data where these are new.

    Raises:
        DataError: the schedule would have mixed them otherwise.
    """
    begun = [segment for segment in saved.segments if segment.start < saved.consumed]
    if not begun:
        return []
    step = saved.step
    if saved.fingerprint != index.fingerprint:
        return [*begun, segment_on_new_data(index, schedule.at(step), begun[-1], (saved.consumed, step))]
    on_this_data = [segment for segment in begun if segment.data == begun[-1].data]
    schedule.check_past(on_this_data, step if saved.within_step else step - 1)
    if not saved.within_step and schedule.at(step) != begun[-1].weights:
        # The change falls on the very step that comes next.
        change = WeightChange(step, schedule.at(step))
        return [*begun, _segment(begun[-1], saved.consumed, change)]
    return begun


def _segment(before: Segment, start: int, change: WeightChange) -> Segment:
    return Segment(start, change.from_step, change.weights, before.passed_at(start), before.data)
