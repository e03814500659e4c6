"""Freed memory is taken again instead of being asked for anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import resource, sys
import torch
from distill.heap import keep_freed_memory

taken = keep_freed_memory() if sys.argv[1] == "keep" else False
for _ in range(20):
    torch.ones(64 << 18)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(64 << 18)
print(taken, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 20 * (64 << 20) // 4096


def faults(mode: str, **settings: str) -> tuple[bool, int]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | settings
    command = [sys.executable, "-c", PROGRAM, mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    taken, count = done.stdout.split()
    return taken == "True", int(count)


@pytest.mark.slow
def test_blocks_of_64_mb_are_cleared_by_the_system_once_and_not_each_time() -> None:
    taken, kept = faults("keep")
    if not taken:
        pytest.skip("this platform's allocator takes no settings")
    assert kept < PAGES // 10
    assert faults("leave")[1] > 3 * kept + 100, "the system gives large pages here: nothing to tell apart"


@pytest.mark.slow
def test_settings_of_the_environment_win() -> None:
    taken, _ = faults("keep", MALLOC_TRIM_THRESHOLD_="1000000")
    assert not taken
