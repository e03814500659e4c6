"""Two thousand steps of the demo recipe with worker processes: memory, file handles and shared memory stay flat."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.long]

STEPS = 2000
MAX_GROWTH_BYTES = 24 << 20
"""Between the middle and the last fifth of the run. A leak of one 64 px batch (98 kB) a step would be 80 MB."""


@dataclass(frozen=True)
class Sample:
    """What a run and its workers hold at one moment."""

    rss_bytes: int
    num_fds: int
    num_processes: int


def take_sample(process: psutil.Process) -> Sample | None:
    """Return the sums over a process and its children; None when one of them has just ended."""
    try:
        family = [process, *process.children(recursive=True)]
        sizes = [one.memory_info().rss for one in family]
        return Sample(sum(sizes), sum(one.num_fds() for one in family), len(family))
    except psutil.Error:
        return None


def shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def test_a_long_run_holds_no_more_at_its_end_than_in_its_middle(demo_recipe: Any, tmp_path: Path) -> None:
    before = shared_memory()
    overrides = [
        f"--trainer.max_steps={STEPS}",
        "--trainer.max_epochs=-1",
        "--trainer.check_val_every_n_epoch=20",
        "--data.num_workers=2",
    ]
    with (tmp_path / "output.txt").open("w") as output:
        child = subprocess.Popen(
            demo_recipe.command(tmp_path / "run", *overrides),
            env=demo_recipe.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            samples = watch(child)
        finally:
            child.kill()
    printed = (tmp_path / "output.txt").read_text()
    assert child.returncode == 0, printed[-3000:]
    assert f"{STEPS * 8:,} samples planned" in printed or f"{STEPS * 8:,} planned" in printed, printed[-2000:]
    fifth = len(samples) // 5
    assert fifth >= 5, "the run was too short to judge"
    middle, last = samples[2 * fifth : 3 * fifth], samples[-fifth - 1 : -1]
    growth = median(sample.rss_bytes for sample in last) - median(sample.rss_bytes for sample in middle)
    assert growth < MAX_GROWTH_BYTES
    assert median(sample.num_fds for sample in last) <= median(sample.num_fds for sample in middle)
    assert median(sample.num_processes for sample in last) == median(sample.num_processes for sample in middle)
    assert shared_memory() <= before


def watch(child: subprocess.Popen[Any]) -> list[Sample]:
    """Take a sample twice a second until the run ends."""
    process, samples = psutil.Process(child.pid), list[Sample]()
    while child.poll() is None:
        sample = take_sample(process)
        if sample is not None:
            samples.append(sample)
        time.sleep(0.5)
    return samples
