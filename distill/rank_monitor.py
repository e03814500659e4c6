"""Knowing within seconds that another process of a run failed, and which one was first.

A collective operation waits for its peers; it does not say that one is gone. Here each process has a thread that looks
at a store which rank 0 serves: the first failure stands there, and every process adds to a counter of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from subprocess import Popen
from typing import Any, TypeVar, cast

import torch.distributed as dist

from distill.control_group import ControlGroup
from distill.errors import INTERRUPTED, OVERDUE, PREEMPTED
from distill.stop_signals import end_process, start_up_message

LOOK_EVERY_S = 0.25
STORE_TIMEOUT_S = 10.0
ACKNOWLEDGE_S = 3.0
FIRST_FAILURE, STOP_CODE = "first_failure", "stop_code"
T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """What ended a process.

    Attributes:
        rank: the process, from 0.
        time: when, in seconds since 1970.
        step: optimiser steps done; -1 where it is not known.
        cause: one line.
        traceback: of the exception; empty where there was none.
        first: the failure of another process that caused this one, where it is known.
    """

    rank: int
    time: float
    step: int
    cause: str
    traceback: str = ""
    first: str = ""

    def write(self, folder: Path) -> Path:
        """Write `rank-N.json` into a folder, whole or not at all, and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{self.rank}.json"
        temporary = folder / f".rank-{self.rank}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")
        temporary.replace(path)
        return path

    def describe(self) -> str:
        """Return one line that names rank and cause."""
        return f"rank {self.rank} failed first: {self.cause}"


class RankMonitor:
    """Ends this process in bounded time after another process of the run failed.

    Args:
        rank: this process.
        world_size: the number of processes.
        folder: where failures are written.
        children: processes that this one started as further ranks, by rank.
        heartbeat_timeout_s: a process that has not been heard of for so long counts as gone.
        grace_s: how long the main thread has to end by itself, so that logs are written.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        folder: Path,
        children: Mapping[int, Popen[Any]],
        *,
        heartbeat_timeout_s: float,
        grace_s: float,
    ) -> None:
        self.rank, self.world_size, self.folder = rank, world_size, folder
        self.children = dict(children)
        self.heartbeat_timeout_s, self.grace_s = heartbeat_timeout_s, grace_s
        self.first: Failure | None = None
        self._known = threading.Event()
        self._closing = threading.Event()
        self._parent = os.getppid()
        self._store: Any = None
        self._heard: dict[int, tuple[int, float]] = {}
        self._thread = threading.Thread(target=self._watch, name="rank-monitor", daemon=True)

    def start(self, group: ControlGroup) -> None:
        """Connect all ranks to rank 0's store and begin to watch; all ranks have to call this."""
        make_store, timeout = cast(Any, dist).TCPStore, timedelta(seconds=STORE_TIMEOUT_S)
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        if self.rank == 0:
            self._store = make_store(host, 0, None, True, timeout=timeout, wait_for_workers=False)
            group.share(self._store.port)
        else:
            self._store = make_store(host, group.share(None), None, False, timeout=timeout, wait_for_workers=False)
        self._thread.start()

    def close(self) -> None:
        """Stop watching, because the run ends as it should."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout=STORE_TIMEOUT_S)

    def report(self, failure: Failure) -> Failure:
        """Tell the others of this process's failure; return the first failure of the run, which may be another's."""
        try:
            answer = self._ask(lambda: self._store.compare_set(FIRST_FAILURE, "", json.dumps(asdict(failure))))
            first = Failure(**json.loads(answer))
            self._wait_for_the_others("ack")
        except Exception:  # rank 0 and its store are gone or do not answer, and with them whoever failed first
            return self.first or failure
        return first

    def announce_stop(self, code: int) -> None:
        """Tell the others that this process ends before the first step, and with which status."""
        self._closing.set()  # how the others end now is no news
        self._ask(lambda: self._store.set(f"stopping/{self.rank}", "1"))
        self._ask(lambda: self._store.set(STOP_CODE, str(code)))
        self._wait_for_the_others("stopping")

    def wait_for_first(self, timeout_s: float) -> Failure | None:
        """Return the failure of another process, waiting for the news.

        Whoever waits has reason to believe that one is gone, so that a shorter silence tells.
        """
        self.heartbeat_timeout_s = min(self.heartbeat_timeout_s, timeout_s / 2)
        self._known.wait(timeout_s)
        return self.first

    def _lives(self, rank: int) -> bool:
        return rank not in self.children or self.children[rank].poll() is None

    def _wait_for_the_others(self, word: str) -> None:
        """Let the others read the store first, which ends with rank 0."""
        if self.rank == 0:
            names = [f"{word}/{rank}" for rank in range(1, self.world_size) if self._lives(rank)]
            with contextlib.suppress(Exception):
                self._ask(lambda: self._store.wait(names, timedelta(seconds=ACKNOWLEDGE_S)))

    def _ask(self, question: Callable[[], T]) -> T:
        """Ask the store, in a bounded time, which its own time limits do not give when rank 0 is frozen."""
        return within(lambda: min(STORE_TIMEOUT_S, self.heartbeat_timeout_s), question)

    def _patience(self) -> float:
        return 0.0 if self._closing.is_set() else self.heartbeat_timeout_s

    def _watch(self) -> None:
        while not self._closing.wait(LOOK_EVERY_S):
            first = self._look()
            if first is None or self._closing.is_set():
                continue
            self.first = first
            self._known.set()
            # The main thread usually ends by itself now, since its collective fails; else it is ended here.
            if not self._closing.wait(self.grace_s):
                self._end(first)
            return

    def _look(self) -> Failure | None:
        """Return the first failure of another process, if there is one."""
        for rank, child in self.children.items():
            if (status := child.poll()) not in (None, 0):
                return self._dead(rank, status)
        if self.rank and not self.children and os.getppid() != self._parent:
            return self._gone(0, f"its process, or what started rank {self.rank}, is gone")
        try:
            return within(self._patience, self._read_store)
        except TimeoutError:
            return self._gone(0, f"it has not answered for {self.heartbeat_timeout_s:g} s")
        except Exception as error:  # whatever the store says when the process that serves it is gone
            return self._gone(0, f"its process is gone, and the store it served with it ({type(error).__name__})")

    def _read_store(self) -> Failure | None:
        if self._store.check([STOP_CODE]) and not self._closing.is_set():
            code = int(self._store.get(STOP_CODE))  # read first: once all have acknowledged, the store may end
            self._store.set(f"stopping/{self.rank}", "1")
            self._wait_for_the_others("stopping")
            end_process(code, start_up_message("another process of the run"))
        self._store.add(f"beat/{self.rank}", 1)
        if self._store.check([FIRST_FAILURE]):
            failure = Failure(**json.loads(self._store.get(FIRST_FAILURE)))
            self._store.set(f"ack/{self.rank}", "1")
            return failure if failure.rank != self.rank else None
        return self._silent()

    def _dead(self, rank: int, status: int) -> Failure | None:
        if status in (PREEMPTED, INTERRUPTED):
            end_process(status, start_up_message(f"rank {rank}"))
        if status == OVERDUE:
            end_process(OVERDUE, f"Rank {rank} was ended without saving (status {OVERDUE}). Older checkpoints stand.")
        # A rank that could still speak has told the store; one that was killed has not.
        with contextlib.suppress(Exception):
            if self._ask(lambda: self._store.check([FIRST_FAILURE])):
                return Failure(**json.loads(self._ask(lambda: self._store.get(FIRST_FAILURE))))
        end = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        return self._gone(rank, f"its process {end}")

    def _gone(self, rank: int, cause: str) -> Failure | None:
        if self._closing.is_set():
            return None
        path = self.folder / f"rank-{rank}.json"
        if path.is_file():  # it wrote its own cause
            with contextlib.suppress(ValueError, TypeError):
                return Failure(**json.loads(path.read_text()))
        failure = Failure(rank, time.time(), -1, cause)
        with contextlib.suppress(OSError):
            failure.write(self.folder)
        if rank:  # else there is no store any more, and the others see it themselves
            with contextlib.suppress(Exception):
                self._ask(lambda: self._store.compare_set(FIRST_FAILURE, "", json.dumps(asdict(failure))))
        return failure

    def _silent(self) -> Failure | None:
        """Return a failure for a process whose counter has stood still too long; rank 0 looks for all."""
        if self.rank:
            return None
        now = time.monotonic()
        for rank in range(1, self.world_size):
            beats = int(self._store.add(f"beat/{rank}", 0))
            if self._heard.get(rank, (-1, 0.0))[0] != beats:
                self._heard[rank] = (beats, now)
            elif now - self._heard[rank][1] > self.heartbeat_timeout_s:
                return self._gone(rank, f"it has not been heard of for {self.heartbeat_timeout_s:g} s")
        return None

    def _end(self, first: Failure) -> None:
        own = self.folder / f"rank-{self.rank}.json"
        if not own.is_file():
            with contextlib.suppress(OSError):
                Failure(self.rank, time.time(), -1, "ended with the run", first=first.describe()).write(self.folder)
        end_process(1, f"error: rank {self.rank} ends because {first.describe()} (see {self.folder})")


def within(limit_s: Callable[[], float], question: Callable[[], T]) -> T:
    """Return the answer to a question, which a thread of its own waits for: nothing can interrupt a wait for a machine.

    Args:
        limit_s: returns how long to wait, in seconds in which this process itself was not stopped; asked for again
            while waiting.
        question: returns or raises.

    Raises:
        TimeoutError: there was no answer in time; the thread goes on waiting, and ends with the process.
    """
    answer: Future[T] = Future()

    def ask() -> None:
        try:
            answer.set_result(question())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=ask, name="rank-monitor-question", daemon=True).start()
    looks = 0
    while not wait([answer], timeout=min(LOOK_EVERY_S, limit_s())).done:
        looks += 1
        if looks * LOOK_EVERY_S >= limit_s():
            raise TimeoutError(f"no answer within {limit_s():g} s")
    return answer.result()
