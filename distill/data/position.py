"""Where training stands in its plan: all the state that its data has, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distill.errors import DataError


@dataclass(frozen=True)
class PlanPosition:
    """A place in a plan, and what the plan depends on.

    Attributes:
        consumed: plan positions that the model has gone through, over all ranks.
        within_step: how many of these belong to an optimiser step that was not finished; 0 at a step's end.
        global_step: optimiser steps finished.
        fingerprint: SHA-256 of the training data, hex.
        seed: of the plan.
        weights: of the domains.
        global_batch_size: images an optimiser step. Another value may go on from here: the plan is by sample.
        accumulated: batches an optimiser step.
        epoch_batches: batches of the present epoch that the model has gone through.
    """

    consumed: int
    within_step: int
    global_step: int
    fingerprint: str
    seed: int
    weights: dict[str, float]
    global_batch_size: int
    accumulated: int
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
            return cls(**state)
        except TypeError as error:
            raise DataError(
                f"The checkpoint's data position has the fields {', '.join(state)}, which this version does not "
                "read; resume with the version that wrote it."
            ) from error

    def check_continues(self, saved: PlanPosition) -> None:
        """Refuse to go on from a position in another plan, or from one that cannot be met exactly.

        Raises:
            DataError: data, seed or weights differ, or the number of accumulated batches changed in the middle of a
                step's batches.
        """
        advice = {
            "fingerprint": "restore the shards that data.train had",
            "seed": "set data.seed back",
            "weights": "set data.weights back",
        }
        for name, remedy in advice.items():
            mine, theirs = getattr(self, name), getattr(saved, name)
            if mine != theirs:
                raise DataError(
                    f"The checkpoint's data differs in its {name}: {theirs} there, {mine} here; {remedy}, or start a "
                    "new run."
                )
        if saved.accumulated != self.accumulated and saved.epoch_batches % self.accumulated:
            raise DataError(
                f"The checkpoint was saved after {saved.epoch_batches} batches of an epoch with "
                f"trainer.accumulate_grad_batches = {saved.accumulated}; with {self.accumulated} the next optimiser "
                "step would be cut short. Set it back, or resume from the end of an epoch."
            )
