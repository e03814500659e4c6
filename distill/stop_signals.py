"""Being told to stop: SIGTERM, SIGUSR1 and Ctrl-C become a flag that training reads at its step boundaries.

A Python signal handler runs only when the main thread is back in Python, which it is not while it waits for another
process. So the interpreter writes each signal's number into a socket at once (`signal.set_wakeup_fd`), and a thread
reads it there: the deadline counts from the signal, whatever the main thread does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from distill.errors import INTERRUPTED, OVERDUE, PREEMPTED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Listens for the signals that tell a run to stop.

    Before `begin`, there is nothing to save and a signal ends the process at once. From then on the first signal sets
    `exit_code`, and the process ends by itself within `deadline_s`, or is ended. Later signals change nothing, but a
    second Ctrl-C ends the process.

    Attributes:
        exit_code: 0 until a signal comes; then the status to exit with.
        signal_name: the signal that came first.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self.signal_name = ""
        self._deadline_s = 0.0
        self._overdue_at: float | None = None
        self._has_begun = False
        self._stack_file: Path | None = None
        self._announce: Callable[[int], None] | None = None
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._replaced: dict[signal.Signals, Any] = {}
        self._replaced_fd = -1
        self._thread = threading.Thread(target=self._watch, name="stop-signals", daemon=True)

    def listen(self) -> StopSignals:
        """Take the signals over; only the main thread can."""
        for number in STOP_SIGNALS:
            self._replaced[number] = signal.signal(number, _leave_it_to_the_thread)
            # A process can inherit a signal held back, from a server that started it; it would never hear it.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (number,))
        self._replaced_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread.start()
        return self

    def close(self) -> None:
        """Give the signals back to whoever had them, and stop counting."""
        signal.set_wakeup_fd(self._replaced_fd)
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._overdue_at = None
        self._writer.close()  # ends the thread's reading
        self._thread.join(timeout=10)
        self._reader.close()

    def begin(self, deadline_s: float, stack_file: Path | None) -> None:
        """Say that training begins, so that from now on a stop has something to save.

        Args:
            deadline_s: seconds from the signal to the end of the process.
            stack_file: where to write what the process was doing when the deadline passed.
        """
        self._deadline_s, self._stack_file, self._has_begun = deadline_s, stack_file, True

    def announce_by(self, announce: Callable[[int], None] | None) -> None:
        """Name what tells the run's other processes that this one ends before the first step."""
        self._announce = announce

    def _watch(self) -> None:
        while True:
            left = None if self._overdue_at is None else max(0.0, self._overdue_at - time.monotonic())
            try:
                self._reader.settimeout(left or (None if left is None else 0.001))
                received = self._reader.recv(64)
            except TimeoutError:
                if self._overdue_at is not None:
                    self._end_overdue()
                continue
            except OSError:
                return
            if not received:
                return
            for number in received:
                if number in STOP_SIGNALS:
                    self._receive(signal.Signals(number))

    def _receive(self, number: signal.Signals) -> None:
        if self.exit_code:
            if number == signal.SIGINT and self.exit_code == INTERRUPTED:
                end_process(INTERRUPTED, "Interrupted twice: ended without saving. Older checkpoints stand.")
            return
        self.signal_name = number.name
        code = INTERRUPTED if number == signal.SIGINT else PREEMPTED
        if not self._has_begun:
            if self._announce is not None:
                with contextlib.suppress(Exception):  # the others may be gone already
                    self._announce(code)
            end_process(code, start_up_message(number.name))
        self._overdue_at = time.monotonic() + self._deadline_s
        self.exit_code = code

    def _end_overdue(self) -> None:
        message = (
            f"{self.signal_name} came {self._deadline_s:g} s ago (the deadline_s of the callback Preemption) and no "
            "step boundary was reached and saved since: ended without saving. Older checkpoints stand. The threads "
            "were doing this:"
        )
        print(message, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=2, all_threads=True)
        if self._stack_file is not None:
            with contextlib.suppress(OSError):
                self._stack_file.parent.mkdir(parents=True, exist_ok=True)
                with self._stack_file.open("w") as stream:
                    stream.write(message + "\n")
                    stream.flush()
                    faulthandler.dump_traceback(file=stream, all_threads=True)
        end_process(OVERDUE, f"Exit status {OVERDUE}.")


def start_up_message(cause: str) -> str:
    """Return what to say when a run ends before it trained."""
    return f"Preempted by {cause} before the first step: nothing was lost. Start again with the same command."


def end_process(code: int, message: str) -> None:
    """Print and leave at once, from any thread and whatever the others wait for."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)
    os._exit(code)


def _leave_it_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing: the signal's number is in the socket already."""


def stop_signals() -> StopSignals | None:
    """Return what listens in this process, beginning to listen; None outside the main thread, which cannot."""
    global _listening
    if _listening is None and threading.current_thread() is threading.main_thread():
        _listening = StopSignals().listen()
    return _listening


def close_stop_signals() -> None:
    """Stop listening, if this process does."""
    global _listening
    if _listening is not None:
        _listening.close()
        _listening = None


_listening: StopSignals | None = None


def _forget_in_child() -> None:
    """Keep a forked data worker from taking part: a signal to the whole group is its parent's to handle."""
    global _listening
    if _listening is not None:
        _listening = None
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


os.register_at_fork(after_in_child=_forget_in_child)
