"""One process a run directory: a second run in the same folder is refused."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from distill.checkpoint_files import is_alive
from distill.errors import ConfigError

LOCK_NAME = ".lock"
ORPHANS_GRACE_S = 30.0
"""Loader processes of a killed run hold its lock until they notice, which takes PyTorch's up to 5 s."""


class RunLock:
    """Holds a run directory from `with` to the end of the block, or of the process, however that comes.

    The operating system holds the lock (`flock`), so what a dead process left in the file is no obstacle.

    Args:
        run_dir: the folder; made where it is missing.

    Raises:
        ConfigError: another process holds it, or it cannot be written.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / LOCK_NAME
        self._descriptor = -1

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(
                f"The run directory {self.path.parent} cannot be written ({error.strerror}); set "
                "trainer.default_root_dir to a folder that can."
            ) from error
        self._acquire()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)

    def _acquire(self) -> None:
        deadline = time.monotonic() + ORPHANS_GRACE_S
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                holder = self._holder()
                is_dead = holder.get("host") == socket.gethostname() and not is_alive(int(holder.get("pid", 0)))
                if not is_dead or time.monotonic() > deadline:
                    os.close(self._descriptor)
                    raise ConfigError(
                        f"Another run writes to {self.path.parent}: process {holder.get('pid', 'unknown')} on "
                        f"{holder.get('host', 'an unknown machine')} holds {self.path}. Wait for it, stop it, or set "
                        "trainer.default_root_dir to another folder."
                    ) from error
                time.sleep(0.1)

    def _holder(self) -> dict[str, str | int]:
        try:
            return json.loads(os.pread(self._descriptor, 4096, 0))
        except ValueError:
            return {}
