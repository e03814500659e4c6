"""A rank learns that another one is gone, stopped or frozen, and ends in bounded time with its own cause kept."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked_python
import pytest
from forked_python import ForkedPython
from lightning import LightningModule, Trainer

from distill.callbacks.failure import FailureReports
from distill.control_group import ControlGroup
from distill.errors import OVERDUE, PREEMPTED, WeightsError
from distill.rank_monitor import Failure, RankMonitor

BOUND_S = 60
SERVE = """
import time, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""
RANK = """
import os, sys, time
from pathlib import Path
from distill.control_group import ControlGroup
from distill.rank_monitor import RankMonitor

class Told(ControlGroup):
    def share(self, value):
        if value is None:
            return int(sys.stdin.readline())
        print(value, flush=True)
        return value

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
monitor = RankMonitor(rank, 2, folder, {}, heartbeat_timeout_s=60, grace_s=1)
monitor.start(Told(None))
if sys.argv[3:]:
    sys.stdin.readline()
    monitor.announce_stop(int(sys.argv[3]))
    os._exit(int(sys.argv[3]))  # as `end_process` does
print("watching", flush=True)
time.sleep(600)
"""
CHILD = """
import subprocess, sys, time
from pathlib import Path
from distill.control_group import ControlGroup
from distill.rank_monitor import RankMonitor
child = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({sys.argv[1]})"])
monitor = RankMonitor(0, 2, Path(sys.argv[2]), {1: child}, heartbeat_timeout_s=60, grace_s=1)
monitor.start(ControlGroup(None))
time.sleep(600)
"""


class Told(ControlGroup):
    """A group that has shared one value already."""

    def __init__(self, value: int) -> None:
        super().__init__(None)
        self.value = value

    def share(self, value: Any) -> Any:
        """Return it."""
        return self.value


@pytest.fixture
def store() -> Iterator[tuple[ForkedPython, int]]:
    """Yield a process that serves a store as rank 0 does, and its port."""
    with ForkedPython([sys.executable, "-c", SERVE], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
        process.kill()


def start_rank(rank: int, folder: Path, *arguments: str) -> ForkedPython:
    """Start a process that watches as one of two ranks."""
    command = [sys.executable, "-c", RANK, str(rank), str(folder), *arguments]
    return ForkedPython(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.slow
def test_a_frozen_rank_0_counts_as_gone_after_the_heartbeats_time_and_reports_return(
    store: tuple[ForkedPython, int], tmp_path: Path
) -> None:
    process, port = store
    monitor = RankMonitor(1, 2, tmp_path, {}, heartbeat_timeout_s=2, grace_s=600)
    monitor.start(Told(port))
    assert monitor.wait_for_first(1) is None
    monitor.heartbeat_timeout_s = 2
    process.send_signal(signal.SIGSTOP)
    own = Failure(1, time.time(), 3, "ValueError: own")
    begin = time.monotonic()
    assert monitor.report(own) == own or monitor.first is not None
    first = monitor.wait_for_first(BOUND_S)
    assert time.monotonic() - begin < BOUND_S / 2
    assert first is not None
    assert (first.rank, first.cause) == (0, "it has not answered for 2 s")
    assert json.loads((tmp_path / "rank-0.json").read_text())["cause"] == first.cause
    monitor.close()


@pytest.mark.slow
def test_a_stop_before_the_first_step_reaches_the_other_rank_before_the_store_ends(tmp_path: Path) -> None:
    with start_rank(0, tmp_path, str(PREEMPTED)) as rank_0, start_rank(1, tmp_path) as rank_1:
        assert rank_0.stdout is not None
        assert rank_0.stdin is not None
        assert rank_1.stdout is not None
        assert rank_1.stdin is not None
        rank_1.stdin.write(rank_0.stdout.readline())
        rank_1.stdin.flush()
        assert rank_1.stdout.readline() == "watching\n"
        rank_0.stdin.write("\n")
        rank_0.stdin.flush()
        assert [rank.wait(BOUND_S) for rank in (rank_0, rank_1)] == [PREEMPTED, PREEMPTED]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("status", "own"), [(OVERDUE, OVERDUE), (PREEMPTED, PREEMPTED), (3, 1)])
def test_what_a_started_rank_ends_with_is_the_commands_status(tmp_path: Path, status: int, own: int) -> None:
    done = forked_python.run([sys.executable, "-c", CHILD, str(status), str(tmp_path)], timeout=BOUND_S)
    assert done.returncode == own
    assert (tmp_path / "rank-1.json").is_file() == (own == 1)


def test_a_failure_that_cannot_be_written_stays_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Failure, "write", full)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    FailureReports().on_exception(trainer, LightningModule(), WeightsError("Free space there"))


def test_a_failure_is_kept_before_the_other_ranks_are_told(tmp_path: Path) -> None:
    file = tmp_path / "failures" / "rank-0.json"
    seen: list[bool] = []

    class Slow(RankMonitor):
        def report(self, failure: Failure) -> Failure:
            seen.append(file.is_file())
            return failure

    reports = FailureReports()
    reports._monitor = Slow(0, 2, file.parent, {}, heartbeat_timeout_s=60, grace_s=1)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    reports.on_exception(trainer, LightningModule(), WeightsError("damaged"))
    assert seen == [True]
