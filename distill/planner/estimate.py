"""The plan of a recipe: what it has, needs and costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from distill.accelerators import GIB
from distill.planner.recipe import Recipe
from distill.planner.simulate import DeviceType, StepCost, step_cost

STANDING_RESERVE = 0.05
"""Share of a GPU's memory kept free: CUDA's context, cuBLAS workspaces and the allocator's fragmentation."""

OPTIMISER = "optimiser"
AVERAGE = "moving average of the weights"
BUCKETS = "DDP buckets"


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one device by batch size.

    Attributes:
        batch_size: images that the recipe gives a device at a time.
        parts: bytes by purpose at the step's highest instant, at that batch size.
        phase: during which phase of the step that instant is.
        largest_batch: largest batch that fits `available_bytes`; 0 if not even one image does, None if unknown.
        available_bytes: memory of the device less a reserve; None if no memory was given.
    """

    batch_size: int
    parts: dict[str, int]
    phase: str
    largest_batch: int | None
    available_bytes: int | None

    @property
    def peak_bytes(self) -> int:
        """The highest instant."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class BatchLine:
    """Memory as a straight line over the batch size, for each phase: from the costs of two batch sizes.

    Attributes:
        small: the cost of the smaller batch.
        large: the cost of the larger one.
        standing: bytes that are there all the time beside the weights, by purpose.
    """

    small: StepCost
    large: StepCost
    standing: dict[str, int]

    def parts(self, phase: str, batch_size: int) -> Counter[str]:
        """Return bytes by purpose at a phase's highest instant; batch sizes outside the two are extrapolated."""
        one, two = self.small, self.large
        parts = Counter(self.standing)
        for purpose in one.memory[phase].keys() | two.memory[phase].keys():
            low, high = one.memory[phase][purpose], two.memory[phase][purpose]
            slope = (high - low) / (two.batch_size - one.batch_size)
            parts[purpose] += round(max(0.0, low + slope * (batch_size - one.batch_size)))
        return parts

    def peak(self, batch_size: int) -> tuple[str, Counter[str]]:
        """Return the phase with the highest instant, and what is held then."""
        phases = {phase: self.parts(phase, batch_size) for phase in self.small.memory}
        phase = max(phases, key=lambda name: phases[name].total())
        return phase, phases[phase]

    def largest(self, available_bytes: int, step: int) -> int:
        """Return the largest batch, a multiple of `step`, that fits; 0 if none does."""
        if self.peak(step)[1].total() > available_bytes:
            return 0
        count = 1
        while self.peak(2 * count * step)[1].total() <= available_bytes and count < 2**20:
            count *= 2
        low, high = count, 2 * count
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak(middle * step)[1].total() <= available_bytes else (low, middle)
        return low * step


def standing_bytes(recipe: Recipe) -> dict[str, int]:
    """Return what a device holds all the time beside weights and gradients, by purpose."""
    task = recipe.task
    students = (task.students, task.alignments)
    trainable = [p for module in students for p in module.parameters() if p.requires_grad]
    bytes_trained = sum(parameter.numel() * parameter.element_size() for parameter in trainable)
    weights = sum(p.numel() * p.element_size() for module in students for p in module.parameters())
    parts = {OPTIMISER: 2 * bytes_trained}
    if recipe.averages_weights:
        parts[AVERAGE] = weights
    if recipe.is_ddp:
        parts[BUCKETS] = bytes_trained
    return parts


def step_costs(recipe: Recipe, device: DeviceType, precision: str) -> tuple[StepCost, StepCost]:
    """Return the costs of two batch sizes, between and beyond which memory is a straight line.

    A teacher with a micro-batch sees whole ones only, the last filled up: its workspace stops growing there, and a
    batch that is no multiple costs as much as the next that is. torch lays out single images in ways of their own, so
    the sizes are above 1 where the recipe's is.
    """
    micro, wanted = recipe.task.teachers.micro_batch, recipe.batch_size_per_device
    first = wanted if micro and (micro >= wanted or wanted % micro) else max(2, micro or 2)
    settings: dict[str, Any] = {
        "img_size_px": recipe.data.img_size_px,
        "device": device,
        "precision": precision,
        "keeps_gradients": recipe.accumulated > 1,
    }
    small, large = (step_cost(recipe.task, size, **settings) for size in (first, 2 * first))
    return small, large


def plan_memory(recipe: Recipe, costs: tuple[StepCost, StepCost], memory_gib: float | None, device: str) -> MemoryPlan:
    """Return the memory of the recipe's batch, and the batch that fits.

    Args:
        recipe: the recipe.
        costs: of `step_costs`.
        memory_gib: of the device; None means unknown.
        device: "cuda" keeps a reserve.
    """
    line = BatchLine(*costs, standing=standing_bytes(recipe))
    wanted = recipe.batch_size_per_device
    phase, parts = line.peak(wanted)
    available = None
    if memory_gib is not None:
        available = int(memory_gib * GIB * (1 - STANDING_RESERVE if device == "cuda" else 1))
    step = 1 if costs[0].batch_size == 2 else costs[0].batch_size
    largest = None if available is None else line.largest(available, step)
    return MemoryPlan(wanted, dict(parts.most_common()), phase, largest, available)


def parameter_counts(recipe: Recipe) -> dict[str, int]:
    """Return how many parameters each part has, frozen ones included."""
    task = recipe.task
    counts = {f"teacher {name}": task.teachers[name] for name in task.teachers.names()}
    modules = {**counts, **{f"student {name}": module for name, module in task.students.items()}}
    modules["heads"] = task.alignments
    return {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}


def planned_images(recipe: Recipe, images: int | None, samples: int | None) -> int | None:
    """Return how many images training goes through in all, None if neither recipe nor data say.

    Args:
        recipe: `trainer.max_steps`, or `trainer.max_epochs` with `data.samples_per_epoch`.
        images: in the training shards, if known.
        samples: what the user says instead.
    """
    if samples is not None:
        return samples
    steps, epochs = recipe.trainer.get("max_steps") or -1, recipe.trainer.get("max_epochs")
    size = recipe.data.global_batch_size
    an_epoch = recipe.data.samples_per_epoch or images
    limits = [steps * size] if steps > 0 else []
    if epochs is not None and epochs > 0 and an_epoch:
        limits.append(epochs * (an_epoch // size) * size)
    return min(limits, default=None)
