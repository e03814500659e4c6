"""What scripts/bench/gpu.py measures: the pair of models, the parts of its step, and how they are checked and timed."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.alignment import AlignmentConfig
from distill.compilation import compile_blocks
from distill.encoder import Encoder, Layer
from distill.optim import OptimConfig, build_optimizer, parameter_groups
from distill.planner.simulate import StepCost, step_cost
from distill.planner.speed import fill_randomly
from distill.task import DistillationTask
from students import InternViT as Student
from teachers import InternViT as Teacher
from teachers import InternViTConfig

Part = Literal["teacher", "student", "step"]


@dataclass(frozen=True)
class Sizes:
    """Shapes of the pair.

    Args:
        teacher: None is the release InternViT-6B-448px-V1-5.
        student: `init_args` of `students.InternViT`, as pairs.
        img_size: pixels a side.
        num_layers: last hidden states compared.
    """

    teacher: InternViTConfig | None
    student: tuple[tuple[str, int], ...]
    img_size: int
    num_layers: int = 1


FULL = Sizes(None, (("img_size", 448),), 448)
SMALL = Sizes(
    InternViTConfig(embed_dim=64, depth=3, num_heads=2, mlp_dim=128, img_size=56),
    (("img_size", 56), ("embed_dim", 32), ("depth", 2), ("num_heads", 2)),
    56,
)


@dataclass(frozen=True)
class Variant:
    """How a part is run.

    Args:
        name: in the table.
        part: what is timed.
        batch: images.
        compiles: blocks through torch.compile.
        float8: the teacher's linear layers in 8 bits.
        checkpoints: recompute the student's blocks in the backward pass.
        students: how many learn at once.
        cached: hidden states come from host memory instead of a teacher.
    """

    name: str
    part: Part
    batch: int
    compiles: bool = False
    float8: bool = False
    checkpoints: bool = False
    students: int = 1
    cached: bool = False


def variants(batches: list[int], *, compiles: bool, float8: bool) -> list[Variant]:
    """Return everything that is measured, for each batch size."""
    found: list[Variant] = []
    for batch in batches:
        found += [
            Variant("teacher forward", "teacher", batch),
            Variant("student step", "student", batch),
            Variant("whole step", "step", batch),
            Variant("whole step, activation checkpointing", "step", batch, checkpoints=True),
            Variant("whole step, two students", "step", batch, students=2),
            Variant("step from cached states", "student", batch, cached=True),
        ]
        if compiles:
            found += [
                Variant("teacher forward, compiled", "teacher", batch, compiles=True),
                Variant("whole step, compiled", "step", batch, compiles=True),
                Variant("step from cached states, compiled", "student", batch, compiles=True, cached=True),
            ]
        if float8:
            found += [
                Variant("teacher forward, FP8", "teacher", batch, float8=True, compiles=compiles),
                Variant("whole step, FP8 teacher", "step", batch, float8=True, compiles=compiles),
            ]
    return found


def build_task(sizes: Sizes, dtype: torch.dtype, *, students: int = 1, checkpoints: bool = False) -> DistillationTask:
    """Return the pair without weights."""
    name: Any = "bfloat16" if dtype == torch.bfloat16 else "float32"
    release: Any = sizes.teacher or "InternViT-6B-448px-V1-5"
    teacher = Teacher("random", release, dtype=name)
    pupils = {
        f"student{number}": Student(
            "random", **cast(Any, dict(sizes.student)), seed=number, grad_checkpointing=checkpoints
        )
        for number in range(students)
    }
    alignments = [AlignmentConfig(pupil, "teacher", num_layers=sizes.num_layers, prefix_weight=0.0) for pupil in pupils]
    return DistillationTask({"teacher": teacher}, cast(dict[str, Encoder], pupils), alignments)


def ready(task: DistillationTask, device: torch.device, *, seed: int = 0) -> DistillationTask:
    """Return the task with random weights on the device."""
    torch.manual_seed(seed)
    fill_randomly(task, device)
    for module in (*(task.teachers[name] for name in task.teachers.names()), *task.students.values()):
        if isinstance(vars(module).get("is_loaded"), bool):  # students look at their parameters
            cast(Any, module).is_loaded = True
    return task


def flops_per_image(sizes: Sizes, variant: Variant, device: torch.device) -> float:
    """Return operations an image of what a variant times, by the planner's count; a second forward is not counted."""
    cost = _step_cost(sizes, variant.students, device.type)
    wanted = {
        "teacher": lambda part: part.startswith("teacher"),
        "student": lambda part: not part.startswith("teacher"),
        "step": lambda part: True,
    }[variant.part]
    return sum(count for (part, _), count in cost.flops.items() if wanted(part)) / cost.batch_size


@cache
def _step_cost(sizes: Sizes, students: int, device: str) -> StepCost:
    task = build_task(sizes, torch.bfloat16 if device == "cuda" else torch.float32, students=students)
    return step_cost(task, 2, device=cast(Any, device), img_size_px=sizes.img_size, precision="32-true")


class Runner:
    """Runs one variant's part once a call.

    Args:
        task: with weights on the device.
        variant: what is run.
        sizes: of the pair.
        device: where.
    """

    def __init__(self, task: DistillationTask, variant: Variant, sizes: Sizes, device: torch.device) -> None:
        self.task, self.variant, self.device = task, variant, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else None
        shape = (variant.batch, 3, sizes.img_size, sizes.img_size)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        self.layers = task.layers_of("teacher")
        groups = parameter_groups(task.students, task.alignments, task.optimizer_config or OptimConfig())
        self.optimizer = build_optimizer(groups, task.optimizer_config)
        self.states = self._stored() if variant.part == "student" else None

    def _stored(self) -> dict[str, list[Layer]]:
        teacher = self.task.teachers["teacher"]
        width, patch = int(cast(Any, teacher).embed_dim), int(cast(Any, teacher).patch_size)
        side = self.images.shape[-1] // patch
        dtype = next(teacher.parameters()).dtype
        count = self.layers["teacher"]
        layers: list[Layer] = []
        for _ in range(count):
            parts = [
                torch.randn(size, dtype=dtype, device="cpu" if self.variant.cached else self.device)
                for size in ((self.variant.batch, 1, width), (self.variant.batch, side, side, width))
            ]
            if self.variant.cached and self.device.type == "cuda":
                parts = [part.pin_memory() for part in parts]
            layers.append((parts[0], parts[1]))
        return {"teacher": layers}

    def __call__(self) -> None:
        """Run the part once."""
        if self.variant.part == "teacher":
            self.task.teachers.forward_hidden_states(self.images, self.layers)
            return
        loss = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def loss(self) -> Tensor:
        """Return the loss of a batch."""
        task = self.task
        if self.states is None:
            targets = task.teachers.forward_hidden_states(self.images, self.layers)
        else:
            moved = [
                tuple(part.to(self.device, non_blocking=True) for part in layer) for layer in self.states["teacher"]
            ]
            targets = {"teacher": cast(list[Layer], moved)}
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            losses = [
                cast(Any, alignment)(
                    cast(Any, task.students[alignment.config.student]).forward_hidden_states(
                        self.images, alignment.config.num_layers
                    ),
                    targets["teacher"],
                )["loss"]
                for alignment in cast(Any, task.alignments)
            ]
        return torch.stack(losses).sum()


def seconds(run: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """Return the median time of a call, after two that warm up."""

    def timed() -> float:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    for _ in range(2):
        timed()
    return statistics.median(timed() for _ in range(repeats))


def free_memory() -> None:
    """Let go of what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def mean_cosine(own: list[Layer], other: list[Layer]) -> float:
    """Return the mean cosine of patch tokens of two lists of hidden states, in float32."""
    values = [F.cosine_similarity(a[1].float(), b[1].float(), dim=-1).mean() for a, b in zip(own, other, strict=True)]
    return float(torch.stack(values).mean())


def compile_task(task: DistillationTask) -> None:
    """Compile the blocks of teacher and students."""
    for module in (task.teachers["teacher"], *task.students.values()):
        compile_blocks(cast(nn.Module, module), "inductor")
