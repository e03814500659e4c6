"""The memory that a plan tells is what a real step takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill.planner.memory_meter import GRADIENTS, MemoryMeter
from distill.step_meter import TARGETS, StepParts

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 0.15

MEASURE = """
import json, re, resource, sys
from pathlib import Path
import torch
import students, teachers
from distill.planner.estimate import OPTIMISER
from distill.planner.simulate import step_cost
from distill.planner.speed import fill_randomly
from distill.task import DistillationTask

checkpointing = sys.argv[1] == "checkpointing"
SIDE, BATCH, MICRO = 224, 24 if checkpointing else 8, 2
config = teachers.InternViTConfig(embed_dim=384, depth=6, num_heads=6, mlp_dim=1536, img_size=SIDE)
task = DistillationTask(
    {"t": teachers.InternViT("random", config, dtype="float32")},
    {"s": students.InternViT("random", SIDE, 14, 256, 8, 4, grad_checkpointing=checkpointing)},
    teacher_micro_batch=MICRO,
)
cost = step_cost(task, BATCH, img_size_px=SIDE, device="cpu", precision="32-true")
planned = max(held.total() for held in cost.memory.values())


def peak_bytes():
    # Not ru_maxrss, which a process inherits from whoever started it.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def step(side, batch):
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
    loss = task._step({"images": images, "row": torch.arange(batch)})["loss/total"]
    task.zero_grad(set_to_none=True)
    loss.backward()


# What a process has before: libraries, and what kernels take for themselves at their first call.
a = torch.randn(64, 64, requires_grad=True)
(a @ a).sum().backward()
torch.nn.Conv2d(3, 8, 14, 14)(torch.zeros(1, 3, 28, 28)).sum().backward()
with open("/proc/self/statm") as file:
    before = int(file.read().split()[1]) * resource.getpagesize()
fill_randomly(task, torch.device("cpu"))
for _ in range(2):
    step(SIDE, BATCH)
print(json.dumps({"planned": planned, "measured": peak_bytes() - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads this process's memory from /proc")
@pytest.mark.parametrize("mode", ["plain", "checkpointing"])
def test_planned_memory_is_within_15_percent_of_the_peak_of_a_real_process(mode: str) -> None:
    # Large blocks go back to the system at once, so that the tensors are measured and not the allocator's reserves.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, mode]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600, env=environment, cwd=ROOT)
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["measured"] > 100e6, "too little to tell tensors from the rest"
    assert figures["planned"] == pytest.approx(figures["measured"], rel=TOLERANCE)


def test_a_storage_counts_from_its_making_to_its_end() -> None:
    parts = StepParts()
    with MemoryMeter(parts) as meter:
        first = torch.ones(1000)
        assert meter.live[TARGETS] == 4000
        view = first[:10]
        del first
        assert meter.live[TARGETS] == 4000, "a view keeps its storage"
        del view
    assert meter.live[TARGETS] == 0
    assert meter.peaks["teacher"][TARGETS] == 4000


def test_the_highest_instant_of_each_phase_is_kept() -> None:
    parts = StepParts()
    with MemoryMeter(parts) as meter:
        kept = torch.ones(10)
        torch.ones(100)
        parts.part = "student s"
        torch.ones(50)
        assert kept.numel() == 10
    assert meter.peaks["teacher"].total() == 440
    assert meter.peaks["forward"].total() == 240


def test_gradients_are_told_from_other_memory_of_the_backward_pass() -> None:
    meter = MemoryMeter(StepParts())
    gradient = torch.ones(8)
    meter.enter(gradient, "anything")
    meter.rename(gradient, GRADIENTS)
    assert meter.live == {"anything": 0, GRADIENTS: 32}
