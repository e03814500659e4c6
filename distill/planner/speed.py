"""Images a second: from a named accelerator's data sheet, or from steps taken on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor, nn

from distill.accelerators import Accelerator, measured_tflops
from distill.cache.memory import HiddenStateMemory
from distill.planner.simulate import DeviceType, StepCost
from distill.precision import AUTOCAST_DTYPES
from distill.task import DistillationTask

TEACHER_FRACTION = 0.64
"""Share of the data sheet's peak that a teacher's forward pass is taken to reach: 80 % of a matrix product's 80 %."""

STUDENT_FRACTION = 0.44
"""Share that the student's forward and backward are taken to reach: 55 % of a matrix product's 80 %."""

PROBE_S = 20.0
"""Longest that the steps of a measurement may take; a recipe whose single step would take longer is not run."""

_INIT_STD = 0.02


@dataclass(frozen=True)
class Speed:
    """How fast one device is taken to train.

    Attributes:
        images_per_s: of one device.
        source: where the figure comes from, in words.
        is_measured: whether it was measured here rather than computed from assumptions.
    """

    images_per_s: float
    source: str
    is_measured: bool


def sheet_speed(
    cost: StepCost, accelerator: Accelerator, teacher_fraction: float, student_fraction: float, *, is_float32: bool
) -> Speed:
    """Return what an accelerator is expected to do, from its peak and the shares of it that are assumed.

    Args:
        cost: of a micro-batch.
        accelerator: the device.
        teacher_fraction: share of the peak that the teachers' forward reaches.
        student_fraction: share that everything else reaches.
        is_float32: training in float32, which the table's peak does not hold for: half of it is taken (TF32).
    """
    peak = accelerator.peak_tflops * 1e12 / (2 if is_float32 else 1)
    teacher = sum(count for (part, _), count in cost.flops.items() if part.startswith("teacher"))
    other = cost.flops.total() - teacher
    seconds = (teacher / teacher_fraction + other / student_fraction) / peak / cost.batch_size
    source = (
        f"assumed: {teacher_fraction:.0%} (teachers) and {student_fraction:.0%} (the rest) of {peak / 1e12:g} TFLOP/s, "
        f"{accelerator.source}"
    )
    return Speed(1 / seconds, source, is_measured=False)


def measured_speed(
    task: DistillationTask,
    cost: StepCost,
    *,
    batch_size: int,
    img_size_px: int,
    device: DeviceType,
    precision: str,
    free_bytes: int,
) -> Speed:
    """Return what this machine does: whole steps with random weights, or matrix products where a step is too much.

    Args:
        task: its weights are replaced by random ones.
        cost: of a micro-batch, by `step_cost`.
        batch_size: images a step, as the recipe has them; fewer are taken where they would take too long or too much.
        img_size_px: side of the images.
        device: of this machine.
        precision: Lightning's name.
        free_bytes: memory that may be used.
    """
    dtype = AUTOCAST_DTYPES[precision]
    ceiling = measured_tflops(torch.device(device), dtype or torch.float32)
    needed = max(purposes.total() for purposes in cost.memory.values())
    if needed > free_bytes or cost.flops.total() / (ceiling * 1e12) > PROBE_S / 2:
        seconds = cost.flops.total() / cost.batch_size / (STUDENT_FRACTION / 0.8 * ceiling * 1e12)
        source = f"from matrix products here ({ceiling:.3g} TFLOP/s), of which 55 % assumed: a step is too much"
        return Speed(1 / seconds, source, is_measured=False)
    times = batch_size / cost.batch_size
    is_much = needed * times > free_bytes or times * cost.flops.total() / (ceiling * 1e12) > PROBE_S / 8
    count = min(batch_size, cost.batch_size) if is_much else batch_size
    fill_randomly(task, torch.device(device))
    seconds = _step_seconds(task, count, img_size_px, device, dtype)
    return Speed(count / seconds, f"measured here, {count} images a step", is_measured=True)


def _step_seconds(
    task: DistillationTask, batch_size: int, img_size_px: int, device: DeviceType, dtype: torch.dtype | None
) -> float:
    images = torch.randint(0, 256, (batch_size, 3, img_size_px, img_size_px), dtype=torch.uint8, device=device)
    batch = {"images": images.contiguous(memory_format=torch.channels_last)}
    batch |= {name: torch.zeros(batch_size, dtype=torch.int64, device=device) for name in ("row", "domain", "index")}
    parameters = [p for module in (task.students, task.alignments) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)

    def step() -> float:
        began = time.perf_counter()
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            loss = task._step(batch)["loss/total"]  # pyright: ignore[reportPrivateUsage]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    first = step()  # makes the optimiser's state, and warms up
    count = max(2, min(10, int(PROBE_S / 2 / first)))
    times = sorted(step() for _ in track(range(count), description="measuring steps", transient=True))
    return times[len(times) // 2]


def fill_randomly(task: DistillationTask, device: torch.device) -> None:
    """Put random weights into every encoder and head, whatever was there: speed does not depend on the values.

    Values are kept in the range of trained weights, as tiny ones would slow a CPU down.
    """
    task.memory = HiddenStateMemory(0)
    teachers = [task.teachers[name] for name in task.teachers.names()]
    for module in (*teachers, *task.students.values(), task.alignments):
        for owner in module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                value = _random(name, parameter, device)
                owner.register_parameter(name, nn.Parameter(value, requires_grad=parameter.requires_grad))
            for name, buffer in list(owner.named_buffers(recurse=False)):
                owner.register_buffer(name, _random_buffer(name, buffer, device))
    task.train()


def _random(name: str, like: Tensor, device: torch.device) -> Tensor:
    value = torch.empty(like.shape, dtype=like.dtype, device=device)
    if like.ndim > 1:
        return value.normal_(std=_INIT_STD)
    return value.fill_(0.0 if name == "bias" else 1.0)


def _random_buffer(name: str, like: Tensor, device: torch.device) -> Tensor:
    fill = 0.0 if "mean" in name else 1.0
    return torch.full(like.shape, fill, dtype=like.dtype, device=device)
