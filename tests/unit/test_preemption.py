"""Signals become a flag with a deadline, whatever the main thread is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lightning import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment

from distill.callbacks.preemption import requeue_slurm_job
from distill.errors import INTERRUPTED, OVERDUE, PREEMPTED

TIMEOUT_S = 60
HEAD = """
import hashlib, os, signal, sys, time
from pathlib import Path
from distill.stop_signals import stop_signals
signals = stop_signals()

def block():
    # Native code that neither a signal nor Python can interrupt, as a collective operation does.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)

def wait_for_stop():
    while not signals.exit_code:
        time.sleep(0.01)
"""


def run_script(body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script that listens for signals."""
    command = [sys.executable, "-c", HEAD + body, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_before_training_ends_the_process_at_once_and_asks_for_another_start(name: str) -> None:
    done = run_script(f"os.kill(os.getpid(), signal.{name}); block()")
    assert done.returncode == PREEMPTED
    assert name in done.stderr
    assert "nothing was lost" in done.stderr


def test_a_process_that_reaches_no_step_boundary_is_ended_at_its_deadline_and_says_what_it_did(tmp_path: Path) -> None:
    stack = tmp_path / "failures" / "rank-0-stack.txt"
    done = run_script(
        "signals.begin(0.3, Path(sys.argv[1])); os.kill(os.getpid(), signal.SIGTERM); block()", str(stack)
    )
    assert done.returncode == OVERDUE
    assert "in block" in done.stderr
    assert "in block" in stack.read_text()
    assert "SIGTERM came 0.3 s ago" in stack.read_text()


def test_later_signals_change_nothing(tmp_path: Path) -> None:
    done = run_script(
        "signals.begin(60, None); os.kill(os.getpid(), signal.SIGTERM); wait_for_stop()\n"
        "for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT): os.kill(os.getpid(), number)\n"
        "time.sleep(0.5); print(signals.exit_code, signals.signal_name)"
    )
    assert done.returncode == 0
    assert done.stdout.split() == [str(PREEMPTED), "SIGTERM"]


def test_the_second_ctrl_c_ends_the_process() -> None:
    done = run_script(
        "signals.begin(60, None); os.kill(os.getpid(), signal.SIGINT); wait_for_stop(); print(signals.exit_code, "
        "flush=True)\nos.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    )
    assert done.stdout.split() == [str(INTERRUPTED)]
    assert done.returncode == INTERRUPTED


def test_a_forked_worker_ignores_what_is_sent_to_the_whole_group_and_tells_its_parent_nothing() -> None:
    done = run_script(
        "signals.begin(60, None)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os.kill(os.getpid(), signal.SIGUSR1); os.kill(os.getpid(), signal.SIGINT); os._exit(7)\n"
        "_, status = os.waitpid(child, 0)\n"
        "time.sleep(0.5); print(os.waitstatus_to_exitcode(status), signals.exit_code)"
    )
    assert done.stdout.split() == ["7", "0"], done.stderr


def test_signals_go_back_to_whoever_had_them() -> None:
    done = run_script(
        "from distill.stop_signals import close_stop_signals\n"
        "close_stop_signals(); print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, signal.set_wakeup_fd(-1))\n"
        "again = stop_signals(); again.begin(60, None); os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(0.5); print(again.exit_code)"
    )
    assert done.stdout.split() == ["True", "-1", str(PREEMPTED)], done.stderr


@pytest.mark.parametrize(("name", "asked"), [("SIGUSR1", True), ("SIGTERM", False)])
def test_slurm_is_asked_to_run_the_job_again_for_its_own_signal_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, asked: bool
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.cluster_environment = SLURMEnvironment(requeue_signal=signal.SIGUSR1)  # type: ignore[attr-defined]
    requeue_slurm_job(trainer, name)
    assert (tmp_path / "asked").exists() == asked
    if asked:
        assert (tmp_path / "asked").read_text() == "requeue 123\n"
