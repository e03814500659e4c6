"""A forked program is what the same command is in a new interpreter; the programs here import nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forked_python import ForkedPython, run

PYTHON = sys.executable
TELL = """
import atexit, os, sys
import __main__
atexit.register(print, "the end", flush=True)
print(__name__, __main__ is sys.modules["__main__"], sys.argv[1:], os.getcwd(), os.environ["MINE"], os.isatty(1))
print(sys.path[:2], sorted(os.environ), os.getpgrp() == os.getpid(), sys.stdin.read())
print("to the other", file=sys.stderr)
assert __main__.TOLD == 3
sys.exit(int(sys.argv[1]))
"""


def both(command: list[str], **options: Any) -> list[subprocess.CompletedProcess[str]]:
    """Return what became of a command in a new interpreter, and of the same, forked."""
    real = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, **options)
    return [real, run(command, **options)]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may go between the opening and the reading
        return False


def test_a_module_a_script_and_a_text_run_as_in_a_new_interpreter(tmp_path: Path) -> None:
    file = tmp_path / "place" / "program.py"
    file.parent.mkdir()
    file.write_text("TOLD = 3\n" + TELL)
    environment = {**os.environ, "MINE": "yes", "PYTHONPATH": str(tmp_path)}
    environment.pop("PYTEST_CURRENT_TEST", None)
    for words in (["-m", "place.program", "0"], [str(file), "3"], ["-P", "-m", "place.program", "1"]):
        real, forked = both([PYTHON, *words], cwd=tmp_path, env=environment)
        assert (forked.returncode, forked.stdout, forked.stderr) == (int(words[-1]), real.stdout, real.stderr)
        assert "the end" in forked.stdout
    real, forked = both([PYTHON, "-c", file.read_text(), "2"], cwd=tmp_path, env=environment)
    assert (forked.returncode, forked.stdout, forked.stderr) == (2, real.stdout, real.stderr)


def test_an_exception_is_printed_last_and_the_status_is_1() -> None:
    done = run([PYTHON, "-c", "raise ValueError('the cause')"])
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "ValueError: the cause")


def test_signals_end_it_as_they_end_any_process() -> None:
    wait = [PYTHON, "-c", "import time; print('there', flush=True); time.sleep(600)"]
    for number, status in ((signal.SIGTERM, -15), (signal.SIGKILL, -9), (signal.SIGINT, -2)):
        with ForkedPython(wait, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout
            assert process.stdout.readline() == "there\n"
            assert process.poll() is None
            process.send_signal(number)
            assert process.wait(60) == process.poll() == process.returncode == status


def test_one_that_takes_too_long_is_killed_and_a_session_of_its_own_can_be_ended_whole(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run([PYTHON, "-c", "import time; time.sleep(600)"], timeout=0.2)
    code = "import os, time; os.write(1, b'%d\\n' % os.fork()); time.sleep(600)"  # one write each
    process = ForkedPython([PYTHON, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout
    child = max(int(process.stdout.readline()), int(process.stdout.readline()))
    assert os.getpgid(child) == os.getpgid(process.pid) == process.pid != os.getpgrp()
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(60) == -9
    deadline = time.monotonic() + 60
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_written_to_it_is_read_and_it_has_the_libraries_already() -> None:
    code = "import sys; print(sorted({'torch', 'lightning', 'teachers'} & set(sys.modules)), input())"
    with ForkedPython([PYTHON, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write("a line\n")
        process.stdin.flush()
        assert process.stdout.read() == "['lightning', 'teachers', 'torch'] a line\n"
    assert process.returncode == 0


def test_programs_draw_other_numbers_and_know_their_rank() -> None:
    code = (
        "import numpy, random; from lightning.pytorch.utilities.rank_zero import rank_zero_only;"
        "print(numpy.random.rand(), random.random()); print(rank_zero_only.rank)"
    )
    first, second = (run([PYTHON, "-c", code], env={**os.environ, "RANK": rank}, check=True).stdout for rank in "03")
    assert not set(first.split()[:2]) & set(second.split()[:2])
    assert (first.split()[2], second.split()[2]) == ("0", "3")


def test_what_only_a_new_interpreter_gives_is_refused() -> None:
    with pytest.raises(ValueError, match="is not this interpreter"):
        run(["bash", "-c", "true"])
    with pytest.raises(ValueError, match="-X is an option that only a new interpreter takes"):
        run([PYTHON, "-X", "importtime", "-c", ""])
    for name, value in (("PYTHONHASHSEED", "1"), ("MALLOC_ARENA_MAX", "1"), ("OMP_NUM_THREADS", "2")):
        with pytest.raises(ValueError, match=f"{name} is read when"):
            run([PYTHON, "-c", ""], env={**os.environ, name: value})
