"""The ranks of a run as real processes, started as torchrun starts them but forked from one that has imported torch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from forked_python import ForkedPython

HERE = Path(__file__).parent


class RankProcesses:
    """All ranks of one `distill` command; classes of this folder can be named in its words.

    Args:
        words: the command's words after `distill`.
        world_size: the number of processes.
        log: file that all of them write to.
    """

    def __init__(self, words: list[str], world_size: int, log: Path) -> None:
        self.log = log
        with log.open("ab") as stream:
            self.processes = [
                ForkedPython(
                    [sys.executable, "-m", "distill", *words],
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    env=environment,
                )
                for environment in environments(world_size)
            ]

    def finish(self, timeout_s: float = 240) -> list[int | None]:
        """Wait for all, and return how they ended: a status, or minus a signal's number.

        Raises:
            TimeoutError: with the end of the log, after killing what still runs.
        """
        until = time.monotonic() + timeout_s
        try:
            return [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            for process in self.processes:
                process.kill()
            raise TimeoutError(f"still running after {timeout_s} s:\n{self.text()[-4000:]}") from None

    def text(self) -> str:
        """Return what the processes wrote."""
        return self.log.read_text() if self.log.is_file() else ""


def environments(world_size: int) -> list[dict[str, str]]:
    """Return each rank's environment, as torchrun sets it."""
    search_path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    shared = {**os.environ, "PYTHONPATH": search_path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    if world_size == 1:
        return [shared]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    of_all = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    return [{**shared, **of_all, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
