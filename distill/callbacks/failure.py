"""One process's failure ends the whole run in bounded time, and its cause is printed and kept."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from subprocess import Popen
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from distill.control_group import control_group
from distill.errors import UnfinishedError
from distill.rank_monitor import Failure, RankMonitor
from distill.stop_signals import stop_signals

SECONDARY = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out|barrier", re.IGNORECASE)
"""What a collective operation says when it is another process that failed."""


class FailureReports(Callback):
    """Writes each failure to `failures/rank-N.json` and ends all processes when one of them fails.

    Args:
        collective_timeout_s: how long a process waits for the others before it fails, for what no failure explains,
            such as processes that do different things. Longer than the slowest thing one process does alone.
        heartbeat_timeout_s: a process that has not been heard of for so long counts as gone. Dead processes on the same
            machine are seen at once.
        grace_s: how long a process whose peer failed may take to end by itself.
    """

    def __init__(
        self, collective_timeout_s: float = 600.0, heartbeat_timeout_s: float = 120.0, grace_s: float = 5.0
    ) -> None:
        self.collective_timeout_s = collective_timeout_s
        self.heartbeat_timeout_s, self.grace_s = heartbeat_timeout_s, grace_s
        self._monitor: RankMonitor | None = None

    def limit_waits(self, trainer: Trainer) -> None:
        """Give the strategy's process group this callback's time limit; before the run starts."""
        # Lightning takes it as an argument of the strategy only, which a recipe that says `strategy: ddp` cannot give.
        if hasattr(trainer.strategy, "_timeout"):
            cast(Any, trainer.strategy)._timeout = timedelta(seconds=self.collective_timeout_s)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put an earlier attempt's failures aside, and watch the other processes."""
        if stage != "fit":
            return
        group = control_group(self.collective_timeout_s)
        folder = failures_folder(trainer)
        if trainer.is_global_zero:
            put_aside(folder)
        if trainer.world_size == 1:
            return
        self._monitor = RankMonitor(
            trainer.global_rank,
            trainer.world_size,
            folder,
            take_over_children(trainer),
            heartbeat_timeout_s=self.heartbeat_timeout_s,
            grace_s=self.grace_s,
        )
        self._monitor.start(group)
        if (signals := stop_signals()) is not None:
            signals.announce_by(self._monitor.announce_stop)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the cause, tell the other processes, and name the first cause where it is another's."""
        monitor, self._monitor = self._monitor, None
        if isinstance(exception, UnfinishedError):
            close(monitor)
            return
        text = str(exception)
        cause = f"{type(exception).__name__}: {text}" if text else type(exception).__name__
        lines = "".join(traceback.format_exception(exception))
        own = Failure(trainer.global_rank, time.time(), trainer.global_step, cause, lines)
        first = own
        if monitor is not None:
            # What a collective says when a peer is gone is no first cause: wait for the news of that.
            is_secondary = not isinstance(exception, KeyboardInterrupt) and bool(SECONDARY.search(cause))
            news = monitor.wait_for_first(2 * self.grace_s) if is_secondary else monitor.first
            if news is None:
                keep(own, trainer)  # first, since telling the others takes time where rank 0 does not answer
            first = news or monitor.report(own)
        if first.rank != own.rank:
            own = Failure(own.rank, own.time, own.step, own.cause, own.traceback, first.describe())
            print(f"error: rank {own.rank} ends because {first.describe()}", file=sys.stderr, flush=True)
        keep(own, trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching, after all processes have come to the end."""
        monitor, self._monitor = self._monitor, None
        close(monitor)


def keep(failure: Failure, trainer: Trainer) -> None:
    """Write a failure where it can be written: on a full disk, its cause must still be raised and printed."""
    if not getattr(trainer, "fast_dev_run", False):
        with contextlib.suppress(OSError):
            failure.write(failures_folder(trainer))


def close(monitor: RankMonitor | None) -> None:
    """End a monitor's watching on all ranks together, so that none takes another's end for a failure."""
    if monitor is None:
        return
    monitor.close()
    if (signals := stop_signals()) is not None:
        signals.announce_by(None)
    control_group().meet(timeout_s=60.0)


def failures_folder(trainer: Trainer) -> Path:
    """Return where a run's failures are kept."""
    return Path(trainer.default_root_dir) / "failures"


def put_aside(folder: Path) -> None:
    """Move the failures of an earlier attempt to `earlier-1/`, ..., so that what lies in the folder is this one's."""
    if files := [file for file in folder.glob("rank-*") if file.is_file()]:
        target = folder / f"earlier-{len(list(folder.glob('earlier-*'))) + 1}"
        target.mkdir()
        for file in files:
            file.replace(target / file.name)


def take_over_children(trainer: Trainer) -> dict[int, Popen[Any]]:
    """Return the processes that Lightning's launcher started here as further ranks, by rank.

    Its own observer looks at them every five seconds and answers a failure by killing this process, which then can
    neither say nor keep the cause; so it is left without anything to observe.
    """
    processes: list[Popen[Any]] = list(getattr(trainer.strategy.launcher, "procs", []))
    if processes:
        for thread in threading.enumerate():
            if thread.name == "child-process-observer":
                cast(Any, thread)._child_processes = []
    first = trainer.global_rank + 1
    return {first + place: process for place, process in enumerate(processes)}
