"""Data workers leave signals to the process that started them, and still end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from distill.data.fetch import Batch
from distill.data.loader import build_loader
from distill.data.samplers import PlanSampler

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
BATCHES = 12
METHODS = ["fork", pytest.param("spawn", marks=pytest.mark.slow)]


class Numbers(Dataset[Batch]):
    """Samples that are their own number."""

    def __len__(self) -> int:
        """Return how many there are."""
        return 2 * BATCHES

    def __getitem__(self, index: int) -> Batch:
        """Return one."""
        return {"row": torch.tensor(index), "image": torch.full((1, 1, 2), float(index))}


def start(method: Any) -> tuple[Any, list[Any]]:
    """Return a running iterator over two workers, and the workers."""
    sampler = PlanSampler(2 * BATCHES, 2)
    iterator: Any = iter(build_loader(Numbers(), sampler, num_workers=2, start_method=method))
    return iterator, list(iterator._workers)


def send_all(workers: list[Any]) -> None:
    """Send every stop signal to every worker, as a scheduler does: from another process than the workers' parent."""
    code = "import os, sys; [os.kill(int(pid), int(n)) for pid in sys.argv[2:] for n in sys.argv[1].split(',')]"
    numbers = ",".join(str(int(number)) for number in STOP_SIGNALS)
    subprocess.run([sys.executable, "-S", "-c", code, numbers, *(str(worker.pid) for worker in workers)], check=True)


@pytest.mark.parametrize("method", METHODS)
def test_workers_outlive_stop_signals_from_their_start_on_and_end_with_the_loader(method: str) -> None:
    iterator, workers = start(method)
    send_all(workers)
    rows = next(iterator)["row"].tolist()
    send_all(workers)
    rows += [row for batch in iterator for row in batch["row"].tolist()]
    assert sorted(rows) == list(range(2 * BATCHES))
    iterator._shutdown_workers()
    assert [worker.exitcode for worker in workers] == [0, 0]


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_that_does_not_end_by_itself_is_ended_by_its_parent(method: str) -> None:
    iterator, workers = start(method)
    next(iterator)
    for worker in workers:
        worker.terminate()  # as PyTorch and Python do
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_the_process_that_starts_workers_still_hears_signals() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        iterator, _ = start("fork")
        os.kill(os.getpid(), signal.SIGUSR1)
        next(iterator)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]
