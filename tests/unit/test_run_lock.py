from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distill import run_lock
from distill.errors import ConfigError
from distill.run_lock import RunLock

HOLD = """
import os, sys
from pathlib import Path
from distill.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    child = os.fork() if len(sys.argv) > 2 else -1
    if child:
        print(child, flush=True)
    sys.stdin.readline()
"""


def holder(folder: Path, *words: str) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-c", HOLD, str(folder), *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, int(process.stdout.readline())


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_second_run_in_the_same_folder_is_refused_with_the_first_ones_name(tmp_path: Path) -> None:
    process, _ = holder(tmp_path)
    with pytest.raises(ConfigError, match=rf"process {process.pid} .*default_root_dir"), RunLock(tmp_path):
        pass
    end(process)


def test_what_a_killed_run_left_is_no_obstacle(tmp_path: Path) -> None:
    process, _ = holder(tmp_path)
    end(process)
    assert str(process.pid) in (tmp_path / run_lock.LOCK_NAME).read_text()
    with RunLock(tmp_path):
        pass


def test_the_lock_is_waited_for_while_only_orphans_of_a_killed_run_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, orphan = holder(tmp_path, "fork")
    process.kill()
    process.wait()
    waits = 0

    def end_the_orphan(seconds: float) -> None:
        nonlocal waits
        waits += 1
        if waits == 3:
            os.kill(orphan, signal.SIGKILL)

    monkeypatch.setattr(run_lock.time, "sleep", end_the_orphan)
    with RunLock(tmp_path):
        assert waits >= 3
    process.communicate()


def test_the_lock_is_free_again_after_the_block(tmp_path: Path) -> None:
    for _ in range(2):
        with RunLock(tmp_path):
            pass


def test_a_run_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"file/run cannot be written.*default_root_dir"),
        RunLock(tmp_path / "file/run"),
    ):
        pass
