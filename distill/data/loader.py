"""DataLoaders whose batches a sampler decides alone, and whose workers change nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any, Literal, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from distill.data.fetch import Batch, collate

StartMethod = Literal["fork", "spawn", "forkserver"]
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What tells a run to stop, often sent to all its processes; the last batches of the run still need the workers."""


class PlanLoader(DataLoader[Batch]):
    """A DataLoader that tells Lightning it can be resumed within an epoch: its sampler asks for the position itself.

    Lightning keeps the loader state of rank 0 only, so there must be none that ranks differ in: there is none at all.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return no state; the data module keeps the position."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take no state."""

    def _get_iterator(self) -> Any:
        """Start the workers, if any, with the stop signals held back until `_begin_worker`."""
        if not self.num_workers:
            return cast(Any, super())._get_iterator()
        with held_stop_signals():
            return cast(Any, super())._get_iterator()


@contextmanager
def held_stop_signals() -> Generator[None]:
    """Hold the stop signals back in this thread, and in the processes it starts until they let them through.

    A worker ignores them once it has imported everything, which takes seconds. The server of `forkserver`, when it is
    started here, holds them back for ever: its workers would end with it.
    """
    resource_tracker.ensure_running()  # which lets SIGTERM and SIGINT through again, where it starts something
    held = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


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
        worker_init_fn=_begin_worker,
        multiprocessing_context=start_method if num_workers else None,
        persistent_workers=num_workers > 0,
        # Its own: a loader draws a seed for its workers, and must not take it from the model's random numbers.
        generator=torch.Generator(),
    )


def _begin_worker(worker_id: int) -> None:
    """Keep each worker to one thread, since there are as many as there are cores to use, and leave signals to the run.

    SIGTERM stays held back in all threads, and is read in one: only its parent's ends a worker, which PyTorch and
    Python send to a worker that does not end by itself. A worker whose parent is gone sees that itself, too.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR1, signal.SIGINT))
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    threading.Thread(target=_end_for_parent, name="sigterm", daemon=True).start()


def _end_for_parent() -> None:
    parent = multiprocessing.parent_process()
    while parent is not None:
        received = signal.sigwaitinfo((signal.SIGTERM,))
        if received.si_pid == parent.pid or not parent.is_alive():
            os._exit(0)  # as PyTorch's own handler does
