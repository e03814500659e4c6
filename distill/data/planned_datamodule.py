"""The part of the data module that goes into checkpoints: the plan, the place in it, and the books."""

from __future__ import annotations

from typing import Any

from lightning import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from distill.data.bookkeeping import Books, counts_from_state, counts_state
from distill.data.index import DatasetIndex
from distill.data.ledger import Counts, Ledger
from distill.data.plan import SamplePlan
from distill.data.plan_segments import Schedule, WeightChange
from distill.data.position import PlanPosition, lay_plan
from distill.data.progress import Progress
from distill.trainer_view import TrainerView


class PlannedDataModule(LightningDataModule):
    """A data module whose state is its place in a plan and what became of the samples, the same on every rank.

    A class built on it sets the attributes, and in `setup` the index and the plan.

    Attributes:
        weights: share of each domain from step 0 on; None means equal shares.
        weight_changes: other weights from later steps on.
        seed: of the plan.
        shuffle_window: of the plan.
        global_batch_size: images an optimiser step.
        max_bad_fraction: largest part of a domain's images that may be bad, in [0, 1].
        allow_new_data: whether a resumed run may have other data than the checkpoint's.
        record_samples: whether the samples of each batch are written to a file.
    """

    weights: dict[str, float] | None
    weight_changes: list[WeightChange]
    seed: int
    shuffle_window: int | None
    global_batch_size: int
    max_bad_fraction: float
    allow_new_data: bool
    record_samples: bool

    def __init__(self) -> None:
        super().__init__()
        self._train_index: DatasetIndex | None = None
        self._plan: SamplePlan | None = None
        self._saved: PlanPosition | None = None
        self._counts_before: dict[str, Counts] = {}
        self._books: Books | None = None

    @property
    def train_index(self) -> DatasetIndex:
        """The training samples.

        Raises:
            RuntimeError: `setup` has not run.
        """
        if self._train_index is None:
            raise RuntimeError("ShardDataModule.setup() has not run; call it, or use the module with a Trainer.")
        return self._train_index

    @property
    def plan(self) -> SamplePlan:
        """Which training sample stands where.

        Raises:
            RuntimeError: `setup` has not run.
        """
        if self._plan is None:
            raise RuntimeError("ShardDataModule.setup() has not run; call it, or use the module with a Trainer.")
        return self._plan

    @property
    def domains(self) -> tuple[str, ...]:
        """Names that domain ids stand for: those of the training data, then those that only validation has."""
        return self.train_index.domains

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the training data, hex."""
        return self.train_index.fingerprint

    @property
    def ledger(self) -> Ledger:
        """What became of this rank's samples since the run began or was resumed.

        Raises:
            RuntimeError: `setup` has not run.
        """
        return self._open_books().ledger

    @property
    def consumed(self) -> int:
        """Plan positions that the model has gone through, over all ranks: what decides where training goes on.

        Counted in what the model has finished, not in batches fetched: a loader may be ahead of the model.
        """
        return self._progress.consumed

    @property
    def _view(self) -> TrainerView:
        return TrainerView(self.trainer)

    @property
    def _progress(self) -> Progress:
        return Progress(self._view, self.global_batch_size, self._saved)

    def _open_books(self) -> Books:
        """Return the books, begun at the position that training starts from."""
        if self._books is None:
            self._books = Books(
                self._view,
                self.domains,
                self.max_bad_fraction,
                record_samples=self.record_samples,
                before=self._counts_before,
                start=self._saved.consumed if self._saved else 0,
            )
        return self._books

    def _lay_plan(self, index: DatasetIndex, saved: PlanPosition | None = None) -> SamplePlan:
        schedule = Schedule(self.weights, self.weight_changes, index.domains)
        size, window = self.global_batch_size, self.shuffle_window
        return lay_plan(index, schedule, seed=self.seed, shuffle_window=window, global_batch_size=size, saved=saved)

    def position(self) -> PlanPosition:
        """Return where training stands in the plan."""
        return self._progress.position(self.plan)

    @property
    def has_other_batches(self) -> bool:
        """Whether the checkpoint that training goes on from counts batches of another size, or other steps of them."""
        saved, own = self._saved, (self.global_batch_size, self._view.accumulated)
        return saved is not None and (saved.global_batch_size, saved.accumulated) != own

    def batches_of(self, epoch_batches: int) -> int:
        """Return how many of this run's batches the checkpoint's are.

        Args:
            epoch_batches: batches of the unfinished epoch that the checkpoint has behind it.

        Raises:
            DataError: they are no whole number of this run's optimiser steps.
        """
        return self.position().batches_of(self._saved, epoch_batches) if self._saved else epoch_batches

    def facts(self) -> dict[str, str | dict[str, str]]:
        """Return what has to be the same on every rank, by the recipe's keys."""
        plan = self.plan
        return {
            "data.train": listing(plan.index),
            "data.seed": str(self.seed),
            "data.shuffle_window": str(self.shuffle_window),
            "data.weights": str([segment.weights for segment in plan.segments]),
            "data.weight_changes": str(self.weight_changes),
            "data.global_batch_size": str(self.global_batch_size),
            "trainer.accumulate_grad_batches": str(self._view.accumulated),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return position and ledger counts, as plain values that are the same on every rank.

        All ranks have to call this, as they do for a checkpoint: the counts are summed over them.
        """
        position = self.position()
        return {**position.state_dict(), "ledger": counts_state(self._open_books().totals(position.consumed))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved position. The global batch size may differ from the saved one, and so may later weights.

        Raises:
            DataError: data, seed or weights are not those of the checkpoint, saying which.
        """
        if not self._view.is_fitting:
            return
        position = dict(state_dict)
        counts = counts_from_state(position.pop("ledger", {}))
        saved = PlanPosition.from_state_dict(position)
        self.position().check_continues(saved, allow_new_data=self.allow_new_data)
        if saved.within_step:
            rank_zero_warn(
                f"The checkpoint was saved within an optimiser step, whose first {saved.within_step} images are not "
                "gone through again. Save at step ends: make trainer.val_check_interval a multiple of "
                "trainer.accumulate_grad_batches."
            )
        self._plan = self._lay_plan(self.plan.index, saved)
        self._saved, self._counts_before, self._books = saved, counts, None


def listing(index: DatasetIndex) -> dict[str, str]:
    """Return a dataset's shards by domain and name, and its fingerprint."""
    shards = {f"{shard.domain}/{shard.name}": f"sha256 {shard.sha256[:12]}" for shard in index.shards}
    return {**shards, "the whole": f"{len(index.shards)} shards, fingerprint {index.fingerprint[:12]}"}
