"""Each optimisation leaves a run's first losses where they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill.alignment import AlignmentConfig
from distill.compilation import compile_blocks
from distill.optim import OptimConfig, build_optimizer, parameter_groups
from distill.task import DistillationTask
from students import InternViT as Student
from teachers import InternViT as Teacher
from teachers import InternViTConfig

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
# Both sides compute the same in another order: float32 losses may differ in their last digits, which grow over steps.
LOSS_TOLERANCE = 1e-5


def small_teacher(attention: str = "auto") -> Teacher:
    config = InternViTConfig(embed_dim=32, depth=2, num_heads=2, mlp_dim=64, img_size=56)
    teacher = Teacher("random", config, dtype="float32", attention=attention)
    teacher.load_weights()
    return teacher


def small_student(attention: str = "auto", seed: int = 0) -> Student:
    return Student("random", img_size=56, embed_dim=24, depth=2, num_heads=2, attention=attention, seed=seed)


IMAGES = {
    "float32": lambda images: images / 255,
    "uint8": lambda images: images,
    "channels last": lambda images: images.contiguous(memory_format=torch.channels_last) / 255,
}


def losses(change=lambda task: None, images="float32", **settings) -> list[float]:
    """Return the first losses of a small run; `change` alters the task before."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = {"chunk_tokens": settings.pop("chunk_tokens", 0)}
    student, teacher = small_student(settings.pop("student", "sdpa")), small_teacher(settings.pop("teacher", "sdpa"))
    task = DistillationTask(
        {"big": teacher}, {"small": student}, [AlignmentConfig("small", "big", num_layers=2, **config)], **settings
    )
    student.load_weights()
    change(task)
    groups = parameter_groups(task.students, task.alignments, OptimConfig(lr_student=1e-3, lr_heads=1e-3))
    optimizer = getattr(task, "own_optimizer", build_optimizer)(groups, OptimConfig())
    generator = torch.Generator().manual_seed(1)
    values = []
    for _ in range(STEPS):
        drawn = torch.randint(0, 256, (4, 3, 56, 56), dtype=torch.uint8, generator=generator)
        loss = task._step({"images": IMAGES[images](drawn), "row": torch.zeros(4)})["loss/total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


@pytest.fixture(scope="module")
def plain_losses() -> list[float]:
    """With no optimisation at all."""
    return losses(lambda task: setattr(task, "own_optimizer", plain_adamw))


def plain_adamw(groups, config):
    return torch.optim.AdamW(groups, betas=config.betas, foreach=False, fused=False)


def compiled(task) -> None:
    compile_blocks(task.students["small"], "aot_eager")
    compile_blocks(task.teachers["big"], "aot_eager")


@pytest.mark.parametrize(
    "optimisation",
    [
        {},
        {"chunk_tokens": 5},
        {"student": "explicit", "teacher": "explicit"},
        {"teacher_micro_batch": 1},
        {"images": "uint8"},
        {"images": "channels last"},
        pytest.param({"change": compiled}, marks=pytest.mark.slow),
    ],
    ids=[
        "fused AdamW",
        "projection in chunks",
        "explicit attention",
        "teacher micro-batch",
        "uint8 batches",
        "channels last",
        "compiled blocks",
    ],
)
def test_the_first_losses_agree_before_and_after_each_optimisation(plain_losses, optimisation) -> None:
    assert len(set(plain_losses)) == STEPS
    assert plain_losses[-1] < plain_losses[0] - 0.05
    assert losses(**optimisation) == pytest.approx(plain_losses, abs=LOSS_TOLERANCE)


KEEPING = """
import importlib.util, json, sys
from distill.heap import keep_freed_memory
assert keep_freed_memory() or sys.platform != "linux"
spec = importlib.util.spec_from_file_location("losses_of", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps(module.losses()))
"""


@pytest.mark.slow
def test_the_first_losses_agree_with_and_without_keeping_freed_memory(plain_losses) -> None:
    # In a process of its own, whose allocator stays that way.
    allocator = ("MALLOC_", "GLIBC_TUNABLES")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(allocator)}
    command = [sys.executable, "-W", "ignore", "-c", KEEPING, __file__]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(plain_losses, abs=LOSS_TOLERANCE)
