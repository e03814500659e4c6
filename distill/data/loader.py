"""DataLoaders whose batches a sampler decides alone, and whose workers change nothing."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from distill.data.fetch import Batch, collate

StartMethod = Literal["fork", "spawn", "forkserver"]


class PlanLoader(DataLoader[Batch]):
    """A DataLoader that tells Lightning it can be resumed within an epoch: its sampler asks for the position itself.

    Lightning keeps the loader state of rank 0 only, so there must be none that ranks differ in: there is none at all.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return no state; the data module keeps the position."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take no state."""


def build_loader(
    dataset: Dataset[Batch],
    sampler: Sampler[list[int]],
    *,
    num_workers: int = 0,
    start_method: StartMethod | None = None,
) -> PlanLoader:
    """Return a loader of the batches that a sampler names; workers, if any, stay from one pass to the next.

    Args:
        dataset: map-style.
        sampler: yields the items of each batch; has a length.
        num_workers: processes that read and decode; 0 does it in this one.
        start_method: how they start; None means Python's default.
    """
    return PlanLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_use_one_thread,
        multiprocessing_context=start_method if num_workers else None,
        persistent_workers=num_workers > 0,
        # Its own: a loader draws a seed for its workers, and must not take it from the model's random numbers.
        generator=torch.Generator(),
    )


def _use_one_thread(worker_id: int) -> None:
    """Keep each worker to one thread: there are as many workers as there are cores to use."""
    torch.set_num_threads(1)
