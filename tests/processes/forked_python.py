"""Python programs as processes of their own, without the seconds in which a new interpreter imports torch.

`run` and `ForkedPython` take the commands that `subprocess` takes, `[sys.executable, "-m", "distill", ...]`, and behave
like it; each process is forked from a server that has imported what `distill` imports. What such a process cannot show
is told by tests that start a new interpreter: its start and end, its imports and their time and memory, another hash
seed, and whatever is read from the environment when a library is loaded.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, Self

SERVER = Path(__file__).with_name("fork_server.py")
PRELOADED = ("distill.training_cli", "teachers", "students", "grain", "s3fs", "torch.utils.tensorboard")
"""What `distill fit` imports, the last three only on its way."""
NUMBER = struct.Struct("q")
SERVER_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
READ_AT_START = ("GLIBC_TUNABLES", "LD_", "MALLOC_", "PYTHONHASHSEED", "PYTHONWARNINGS", "PYTHONPROFILEIMPORTTIME")
"""Beginnings of names of variables that only a new interpreter, or its allocator, reads."""
ASKING = threading.Lock()
START_S = 300
"""Far more than the imports take on a busy machine."""


class ForkedPython:
    """A running Python program: what `subprocess.Popen` is for a command.

    Args:
        command: `[sys.executable, "-m", module, ...]`, `[sys.executable, "-c", code, ...]` or
            `[sys.executable, script, ...]`; -P before them as usual.
        stdin: an open file, a file descriptor, `subprocess.DEVNULL`, None for this process's, or `subprocess.PIPE` for
            a text stream in the attribute of this name.
        stdout: the same.
        stderr: the same but for PIPE; `subprocess.STDOUT` too.
        cwd: folder to run in; None means this process's.
        env: the whole environment; None means this process's.
        start_new_session: whether it leads a session, and so a process group, of its own.
        preload: modules that this and later processes need beside `PRELOADED`.

    Raises:
        ValueError: the command, or a variable of `env`, asks for what only a new interpreter gives.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        start_new_session: bool = False,
        preload: Sequence[str] = (),
    ) -> None:
        self.args = [str(word) for word in command]
        self.returncode: int | None = None
        place, environment = Path(cwd or Path.cwd()).absolute(), dict(os.environ if env is None else env)
        check_environment(environment)
        request = {
            **read_command(self.args, place),
            "cwd": str(place),
            "env": environment,
            "start_new_session": start_new_session,
            "preload": list(preload),
        }
        self.stdin: IO[str] | None = None
        self.stdout: IO[str] | None = None
        with ExitStack() as theirs:
            if stdin == subprocess.PIPE:
                stdin, self.stdin = open_pipe(theirs, "w")
            if stdout == subprocess.PIPE:
                stdout, self.stdout = open_pipe(theirs, "r")
            if stderr == subprocess.STDOUT:
                stderr = 1 if stdout is None else stdout
            nothing = theirs.enter_context(Path(os.devnull).open("r+b"))
            files = [file_of(own, given, nothing) for own, given in enumerate((stdin, stdout, stderr))]
            self._status = ask_for(request, files)
        self.pid = self._receive(START_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdin, self.stdout):
            if stream is not None:
                stream.close()
        self.wait()

    def poll(self) -> int | None:
        """Return how it ended, a status or minus a signal's number; None while it runs."""
        if self.returncode is None:
            try:
                self.returncode = self._receive(0)
            except BlockingIOError:
                return None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return how it ended.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self.returncode is None:
            try:
                self.returncode = self._receive(timeout)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _receive(self, timeout: float | None) -> int:
        self._status.settimeout(timeout)
        data = self._status.recv(NUMBER.size)
        if not data:
            raise RuntimeError(f"The fork server has ended:\n{server(os.getpid()).written()[-4000:]}")
        return int(NUMBER.unpack(data)[0])


def run(
    command: Sequence[str | Path],
    *,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    check: bool = False,
    preload: Sequence[str] = (),
    **as_captured_text: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and return its status and what it wrote, as `subprocess.run` does with `text=True`.

    Raises:
        subprocess.TimeoutExpired: it did not end in time; it is killed.
        subprocess.CalledProcessError: it failed, and `check` is set.
    """
    assert as_captured_text.keys() <= {"capture_output", "text", "errors"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = ForkedPython(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=cwd, env=env, preload=preload
        )
        try:
            status = process.wait(timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        out.seek(0)
        err.seek(0)
        texts = [stream.read().decode(errors=as_captured_text.get("errors") or "strict") for stream in (out, err)]
    done = subprocess.CompletedProcess(process.args, status, *texts)
    if check:
        done.check_returncode()
    return done


def read_command(command: Sequence[str], place: Path) -> dict[str, Any]:
    """Say what a command runs, and the folders that its search path begins with."""
    program, *words = command
    if program != sys.executable:
        raise ValueError(f"{program} is not this interpreter, {sys.executable}; use subprocess")
    is_safe_path = words[0] == "-P"
    words = words[is_safe_path:]
    if words[0] in ("-m", "-c"):
        kind, what, *words = words
        folder = str(place) if kind == "-m" else ""
    elif words[0].startswith("-"):
        raise ValueError(f"{words[0]} is an option that only a new interpreter takes; use subprocess")
    else:
        kind, what, *words = "script", *words
        folder = str((place / what).resolve().parent)
    return {"kind": kind, "what": what, "words": words, "first_folders": [] if is_safe_path else [folder]}


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuse variables that a forked process comes too late for."""
    for name in {*environment, *os.environ}:
        if name.startswith(READ_AT_START) and environment.get(name) != os.environ.get(name):
            raise ValueError(f"{name} is read when an interpreter starts; use subprocess")
    if environment.get("OMP_NUM_THREADS", "1") != "1":
        raise ValueError("OMP_NUM_THREADS is read when torch is imported, and the fork server's is 1; use subprocess")


def open_pipe(theirs: ExitStack, mode: str) -> tuple[int, IO[str]]:
    """Return the process's end of a new pipe, closed here with `theirs`, and ours as a text stream."""
    reader, writer = os.pipe()
    other, own = (reader, writer) if mode == "w" else (writer, reader)
    theirs.callback(os.close, other)
    return other, os.fdopen(own, mode)


def file_of(own: int, given: int | IO[Any] | None, nothing: IO[bytes]) -> int:
    """Return the file descriptor that a stream's argument means."""
    if given is None:
        return own
    if given == subprocess.DEVNULL:
        return nothing.fileno()
    return given if isinstance(given, int) else given.fileno()


def ask_for(request: dict[str, Any], streams: Sequence[int]) -> socket.socket:
    """Send a request; return the socket that tells the process's id and status."""
    own, others = socket.socketpair()
    with tempfile.TemporaryFile() as body, others:
        body.write(json.dumps(request).encode())
        body.flush()
        with ASKING:
            socket.send_fds(server(os.getpid()).control, [b"r"], [body.fileno(), *streams, others.fileno()])
    return own


@dataclass(frozen=True)
class Server:
    """This process's fork server."""

    control: socket.socket
    log: IO[bytes]

    def written(self) -> str:
        """Return what it wrote: nothing, unless it failed."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace")


@cache
def server(pid: int) -> Server:
    """Return the fork server of the process with this id, which is the calling one; start it at the first call."""
    own, others = socket.socketpair()
    log = tempfile.TemporaryFile()  # noqa: SIM115 - for as long as this process lives
    with others:
        process = subprocess.Popen(
            [sys.executable, str(SERVER), str(others.fileno()), *PRELOADED],
            pass_fds=[others.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env={**os.environ, **SERVER_SETTINGS},
        )
    atexit.register(end, process, pid)
    return Server(own, log)


def end(process: subprocess.Popen[bytes], pid: int) -> None:
    """End the server with the process that started it, and not with a fork of that process."""
    if os.getpid() == pid:
        process.kill()
        process.wait()
