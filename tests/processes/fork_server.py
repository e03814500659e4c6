"""Starts Python programs by forking: from a process that has imported what takes a new interpreter seconds.

Run by forked_python.py as `python fork_server.py CONTROL_FD MODULE...`. A request is one byte on the control socket
with five file descriptors: what to run, as JSON in a file; its stdin, stdout and stderr; and a socket that is told its
process id and, at its end, its status. A child leaves through the end of this script, so that its exceptions, exit
handlers and exit status are those of any Python program.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

REQUEST_FDS = 5
NUMBER = struct.Struct("q")


class ForkServer:
    """Answers requests until its control socket closes.

    Args:
        control: socket that requests come by.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._woken, self._waker = socket.socketpair()
        self._running: dict[int, socket.socket] = {}
        for end in (self._woken, self._waker):
            end.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests; their end is this server's

    def serve(self) -> dict[str, Any] | None:
        """Return, in a child, what it is to run; in the server None, at its end."""
        with selectors.DefaultSelector() as selector:
            for one in (self._control, self._woken):
                selector.register(one, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._woken in ready:
                    self._report_ends()
                if self._control in ready:
                    files = self._receive()
                    if files is None:
                        return None
                    request = self._fork(files)
                    if request is not None:
                        return request

    def _receive(self) -> list[int] | None:
        space = socket.CMSG_SPACE(REQUEST_FDS * array.array("i").itemsize)
        data, ancillary, _, _ = self._control.recvmsg(1, space)
        received = array.array("i")
        for _, _, content in ancillary:
            received.frombytes(content)
        return list(received) if data else None

    def _fork(self, files: list[int]) -> dict[str, Any] | None:
        with os.fdopen(files[0], "rb") as stream:
            stream.seek(0)
            request = json.loads(stream.read())
        status = socket.socket(fileno=files[4])
        import_all(request["preload"])
        num_threads = len(list(Path("/proc/self/task").iterdir()))
        if num_threads != 1:
            raise RuntimeError(f"{num_threads} threads run in the fork server; a child would miss all but one")
        pid = os.fork()
        if pid == 0:
            for one in (self._control, self._woken, self._waker, status, *self._running.values()):
                one.close()
            become(request, files[1:4])
            return request
        for file in files[1:4]:
            os.close(file)
        self._running[pid] = status
        tell(status, pid)
        return None

    def _report_ends(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)
        for pid in list(self._running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                client = self._running.pop(pid)
                tell(client, os.waitstatus_to_exitcode(status))
                client.close()


def import_all(modules: list[str]) -> None:
    """Import modules for all children to come; one that cannot be imported fails in the child that needs it."""
    for name in modules:
        if name not in sys.modules:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    gc.freeze()  # a collection in a child would touch, and so copy, all pages of what was imported


def tell(client: socket.socket, number: int) -> None:
    """Send a number to whoever asked for a process; he may have gone."""
    with contextlib.suppress(OSError):
        client.sendall(NUMBER.pack(number))


def become(request: dict[str, Any], streams: list[int]) -> None:
    """Make this child what a new interpreter would be: streams, signals, session, folder, environment, search path."""
    for target, file in enumerate(streams):
        os.dup2(file, target)
        os.close(file)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["start_new_session"]:
        os.setsid()
    os.chdir(request["cwd"])
    of_server = search_path()
    os.environ.clear()
    os.environ.update(request["env"])
    installed = [place for place in sys.path[1:] if place not in of_server]
    sys.path[:] = [*request["first_folders"], *search_path(), *installed]
    forget_the_servers_start()


def search_path() -> list[str]:
    """Return the folders that the environment puts first."""
    return [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]


def forget_the_servers_start() -> None:
    """Redo what libraries did at their import and would do otherwise in a new interpreter."""
    numpy, rank_zero = sys.modules.get("numpy"), sys.modules.get("lightning.fabric.utilities.rank_zero")
    if numpy is not None:
        numpy.random.seed()
    if rank_zero is not None:
        rank_zero.rank_zero_only.rank = rank_zero._get_rank() or 0


def run(kind: str, what: str, words: list[str]) -> None:
    """Run a module (-m), a text (-c) or a script as `__main__`."""
    sys.argv = [what if kind == "script" else kind, *words]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        module = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), module.__dict__)
    else:
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    import_all(sys.argv[2:])
    child = ForkServer(socket.socket(fileno=int(sys.argv[1]))).serve()
    if child is not None:
        run(child["kind"], child["what"], child["words"])
