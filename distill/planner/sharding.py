"""What a device holds of teachers that are spread over all devices (`model.engine.teacher_sharding: blocks`).

FSDP2 leaves each device its rows of every tensor. While a teacher runs, what stands outside its blocks is there whole,
and blocks twice: the buffer that one was gathered into is kept until the next one's is full, beside it or beside the
parameters that were copied out of it (`wait_for_unshard` in torch's fully_shard). gloo, which gathers on CPUs, goes
through a buffer of its own besides: measured, a third time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from distill.compilation import repeated_blocks
from distill.planner.recipe import Recipe
from distill.planner.simulate import DeviceType, StepCost, teacher_weights
from distill.teacher_sharding import check_shardable

COPIES_OF_A_BLOCK: dict[DeviceType, int] = {"cuda": 2, "cpu": 3}
TEACHER_PHASE = "teacher"


@dataclass(frozen=True)
class TeacherShare:
    """Bytes of one device.

    Attributes:
        own: its rows of all tensors, there all the time.
        gathered: what is there besides while the teacher runs.
    """

    own: int
    gathered: int


def share_of(teacher: nn.Module, world_size: int, device: DeviceType) -> TeacherShare:
    """Return what each of `world_size` devices holds of a teacher.

    Args:
        teacher: on any device; its parameters' dtypes count.
        world_size: devices.
        device: their kind.
    """
    parameters = {id(parameter): parameter for parameter in teacher.parameters()}
    blocks = [list(block.parameters()) for block in repeated_blocks(teacher)]
    inside = {id(parameter) for block in blocks for parameter in block}
    outside = [parameter for key, parameter in parameters.items() if key not in inside]
    widest = max((_gathered(block, world_size) for block in blocks), default=0)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in teacher.buffers())
    own = sum(_rows(parameter, world_size) for parameter in parameters.values()) + buffers
    return TeacherShare(own, _gathered(outside, world_size) + COPIES_OF_A_BLOCK[device] * widest)


def _rows(tensor: Tensor, world_size: int) -> int:
    """Return the bytes of a device's rows; with fewer rows than devices some are padding."""
    rows = math.ceil(tensor.shape[0] / world_size)
    return rows * math.prod(tensor.shape[1:]) * tensor.element_size()


def _gathered(tensors: Iterable[Tensor], world_size: int) -> int:
    return sum(world_size * _rows(tensor, world_size) for tensor in tensors)


def spread_teachers(recipe: Recipe, costs: tuple[StepCost, StepCost], device: DeviceType) -> tuple[StepCost, StepCost]:
    """Return the costs of a device with its share of the teachers, where the recipe shards them over several devices.

    Args:
        recipe: the recipe.
        costs: of `step_costs`, with whole teachers.
        device: kind of the devices.

    Raises:
        ConfigError: a teacher cannot be sharded.
    """
    teachers = recipe.task.teachers
    modules = {name: teachers[name] for name in teachers.names()}
    if recipe.task.engine.config.teacher_sharding == "none":
        return costs
    check_shardable(modules)
    if recipe.world_size == 1:
        return costs
    shares = {name: share_of(module, recipe.world_size, device) for name, module in modules.items()}
    return _spread(costs[0], shares), _spread(costs[1], shares)


def _spread(cost: StepCost, shares: dict[str, TeacherShare]) -> StepCost:
    memory = {phase: _with_shares(held, shares) for phase, held in cost.memory.items()}
    # Teachers run one after the other; a purpose a teacher, as a reader wants to know whose block is large.
    name = max(shares, key=lambda teacher: shares[teacher].gathered)
    memory[TEACHER_PHASE][f"gathered of teacher {name}, a block at a time"] = shares[name].gathered
    return replace(cost, memory=memory, before_backward=_with_shares(cost.before_backward, shares))


def _with_shares(held: Counter[str], shares: dict[str, TeacherShare]) -> Counter[str]:
    changed = held.copy()
    for name, share in shares.items():
        whole = teacher_weights(name)
        changed[f"{whole}, this device's rows"] = share.own
        del changed[whole]
    return changed
