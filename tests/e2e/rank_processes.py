"""The ranks of a run as real processes, started as torchrun starts them but from a process that has imported torch.

Most of the time of a short run goes into imports; a fork server does them once for all tests.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

HERE = Path(__file__).parent


class RankProcesses:
    """All ranks of one `distill` command.

    Args:
        words: the command's words after `distill`.
        world_size: the number of processes.
        log: file that all of them write to.
    """

    def __init__(self, words: list[str], world_size: int, log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["distill.training_cli", "teachers", "students"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = log
        self.processes: list[BaseProcess] = []
        for rank in range(world_size):
            process = context.Process(target=_run_rank, args=(words, rank, world_size, port, str(log)))
            process.start()
            self.processes.append(process)

    def finish(self, timeout_s: float = 240) -> list[int | None]:
        """Wait for all, and return how they ended: a status, or minus a signal's number.

        Raises:
            TimeoutError: with the end of the log, after killing what still runs.
        """
        until = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.1, until - time.monotonic()))
        if any(process.is_alive() for process in self.processes):
            for process in self.processes:
                process.kill()
            raise TimeoutError(f"still running after {timeout_s} s:\n{self.text()[-4000:]}")
        return [process.exitcode for process in self.processes]

    def text(self) -> str:
        """Return what the processes wrote."""
        return self.log.read_text() if self.log.is_file() else ""


def _run_rank(words: list[str], rank: int, world_size: int, port: int, log: str) -> None:
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
        }
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    sys.argv = ["distill", *words]
    import torch
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from distill.cli import main

    rank_zero_only.rank = rank  # Lightning read it from the environment when the fork server imported it

    torch.set_num_threads(1)
    main()
