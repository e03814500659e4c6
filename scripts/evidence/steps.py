"""Steps of the evidence study: what is done once, several at a time, by commands that are logged and can be stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

TAIL_LINES = 15


class StepError(Exception):
    """A step ended with an error; its log says why."""


@dataclass(frozen=True, eq=False)
class Step:
    """Something to do once.

    Attributes:
        title: shown while it is done.
        is_done: whether its result is there.
        do: does it.
        needs: steps whose results it reads.
    """

    title: str
    is_done: Callable[[], bool]
    do: Callable[[], object]
    needs: tuple[Step, ...] = ()


class Cost(NamedTuple):
    """CPU time (user and system, of a process and its children) and wall time, in seconds."""

    cpu_s: float
    wall_s: float


class Commands:
    """Runs commands from a folder; those that are running can be stopped from another thread.

    Args:
        folder: where they are started.
        threads: how many a command computes with; None leaves that to it.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        self.folder = folder
        self.environment = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        self._running: set[int] = set()
        self._lock = threading.Lock()
        self._is_stopped = False

    def run(self, words: list[str], log: Path, extra: Mapping[str, str] | None = None) -> Cost:
        """Run a command, and return what it and its children cost.

        Args:
            words: the command.
            log: takes what it prints; appended to.
            extra: environment variables.

        Raises:
            StepError: it ended with another status than 0; the message has the end of its log.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        environment = {**os.environ, **self.environment, **(extra or {})}
        with log.open("a", encoding="utf-8") as stream:
            with self._lock:
                if self._is_stopped:
                    raise StepError(f"{' '.join(words)}\nwas not started: the study is being stopped.")
                child = subprocess.Popen(
                    words, cwd=self.folder, stdout=stream, stderr=subprocess.STDOUT, env=environment
                )
                self._running.add(child.pid)
            try:
                # WNOWAIT leaves the process where it is, so that `stop` cannot signal another of the same number.
                os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            finally:
                with self._lock:
                    self._running.discard(child.pid)
            _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])
            raise StepError(f"{' '.join(words)}\nended with status {child.returncode}; the end of {log}:\n{tail}")
        return Cost(usage.ru_utime + usage.ru_stime, time.monotonic() - start)

    def stop(self) -> None:
        """Ask every running command to end (training saves where it stands), and start no more."""
        with self._lock:
            self._is_stopped = True
            for pid in self._running:
                os.kill(pid, signal.SIGTERM)


def perform(steps: list[Step], console: Console, jobs: int = 1, stop: Callable[[], None] = lambda: None) -> None:
    """Do the steps that are not done yet, and say so.

    Args:
        steps: each after those that it needs.
        console: what is begun is shown here.
        jobs: how many are done at a time.
        stop: ends the steps that are under way; called before an interruption is handed on.

    Raises:
        StepError: of the first step that failed, once the others that were under way have ended; no more are begun.
    """
    start = time.monotonic()
    waiting = dict(enumerate(steps, start=1))
    running: dict[Future[object], Step] = {}
    finished: set[Step] = set()
    error: StepError | None = None

    def ready() -> int | None:
        return next((number for number, step in waiting.items() if finished.issuperset(step.needs)), None)

    def begin() -> None:
        while error is None and len(running) < jobs and (number := ready()) is not None:
            step = waiting.pop(number)
            is_done = step.is_done()
            place = f"[{number:3}/{len(steps)}, {time.monotonic() - start:5.0f} s]"
            note = ": there already" if is_done else ""
            console.print(f"{place} {step.title}{note}", highlight=False, markup=False, soft_wrap=True)
            if is_done:
                finished.add(step)
            else:
                running[pool.submit(step.do)] = step

    with ThreadPoolExecutor(jobs) as pool:
        try:
            begin()
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    step = running.pop(future)
                    try:
                        future.result()
                        finished.add(step)
                    except StepError as failed:
                        error = error or failed
                begin()
        except BaseException:
            stop()
            raise
    if error is not None:
        raise error
