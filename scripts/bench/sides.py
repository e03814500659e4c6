"""Sides of a benchmark as processes that take turns: each trains only when told, and says what CPU time it took.

A worker calls `Gate.step` where a step begins. Between two such calls lie the data, forward, backward and optimiser of
one step, whatever framework runs them. The parent lets one side through for so many steps, then the next: what else
the machine does meanwhile falls on all sides alike, and CPU seconds leave out the time spent waiting.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path


class Gate:
    """A worker's end: holds it at the start of a step until the parent says how many it may take.

    Args:
        channel: two file descriptors, "READ,WRITE", as the parent gave them.
    """

    def __init__(self, channel: str) -> None:
        read, write = (int(number) for number in channel.split(","))
        self._orders, self._answers = os.fdopen(read), os.fdopen(write, "w")
        self._left, self._began = 0, -1.0

    def step(self) -> None:
        """Return when a step may begin.

        Raises:
            SystemExit: the parent wants no more.
        """
        if self._left == 0:
            if self._began >= 0:
                self._answers.write(f"{time.process_time() - self._began}\n")
            else:
                self._answers.write("ready\n")
            self._answers.flush()
            order = self._orders.readline().strip()
            if not order:
                os._exit(0)  # frameworks catch SystemExit, and save, plot or send before they leave
            self._left, self._began = int(order), time.process_time()
        self._left -= 1


@dataclass
class Side:
    """The parent's end of a worker.

    Args:
        name: in the table.
        command: starts the worker; `--channel READ,WRITE` is added.
        environment: of the worker.
        log: file for what it prints.
        rates: images per CPU second, one a round.
        first_step_s: wall seconds of its first step.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    rates: list[float] = field(default_factory=list)
    first_step_s: float = 0.0

    def start(self) -> None:
        """Start the worker, and return when it stands at its first step.

        Raises:
            RuntimeError: it ended before, with the end of its log.
        """
        orders_read, orders_write = os.pipe()
        answers_read, answers_write = os.pipe()
        channel = f"{orders_read},{answers_write}"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [*self.command, "--channel", channel],
                pass_fds=(orders_read, answers_write),
                stdout=log,
                stderr=log,
                env=self.environment,
            )
        os.close(orders_read)
        os.close(answers_write)
        self._orders, self._answers = os.fdopen(orders_write, "w"), os.fdopen(answers_read)
        self._answer()

    def run(self, steps: int) -> float:
        """Let the worker take so many steps; return their CPU seconds."""
        self._orders.write(f"{steps}\n")
        self._orders.flush()
        return float(self._answer())

    def stop(self) -> None:
        """End the worker."""
        if hasattr(self, "_orders"):
            self._orders.close()
        if hasattr(self, "_process"):
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def _answer(self) -> str:
        line = self._answers.readline().strip()
        if not line:
            self._process.wait()
            raise RuntimeError(f"The side {self.name!r} ended: {self.log.read_text(errors='replace')[-3000:]}")
        return line

    @property
    def median(self) -> float:
        """Median of the rates."""
        return statistics.median(self.rates)


def measure(sides: list[Side], *, rounds: int, steps: int, batch: int, warm_up: int = 2) -> None:
    """Fill every side's `rates` and `first_step_s`, in turns; the order alternates from round to round."""
    try:
        for side in sides:
            side.start()
            began = time.perf_counter()
            side.run(1)
            side.first_step_s = time.perf_counter() - began
            side.run(warm_up - 1)
        for number in range(rounds):
            for side in sides if number % 2 == 0 else sides[::-1]:
                side.rates.append(steps * batch / side.run(steps))
    finally:
        for side in sides:
            side.stop()
