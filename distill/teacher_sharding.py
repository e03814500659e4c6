"""Teachers spread over the ranks of a run, and how ranks with different numbers of batches keep each other company."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch.distributed as dist
from torch import nn

from distill.control_group import control_group
from distill.errors import ConfigError

TeacherSharding = Literal["none", "blocks"]


def world_size() -> int:
    """Return the number of processes of this run."""
    distributed = cast(Any, dist)
    return int(distributed.get_world_size()) if distributed.is_available() and distributed.is_initialized() else 1


def check_shardable(teachers: Mapping[str, nn.Module]) -> None:
    """Refuse teachers that cannot be spread over ranks.

    Raises:
        ConfigError: naming the teacher.
    """
    for name, teacher in teachers.items():
        if not callable(getattr(teacher, "shard", None)):
            raise ConfigError(
                f"model.engine.teacher_sharding is blocks, but {type(teacher).__name__}, the teacher {name!r}, has no "
                "method `shard`; set it to none, or use teachers.InternViT."
            )


def shard_teachers(teachers: Mapping[str, nn.Module]) -> bool:
    """Spread every teacher's parameters over all ranks, before its weights are read; all ranks have to call this.

    Args:
        teachers: by name; each needs a method `shard(mesh)`, as `teachers.InternViT` has.

    Returns:
        Whether they are sharded: a single process keeps them whole.

    Raises:
        ConfigError: a teacher cannot be sharded.
    """
    check_shardable(teachers)
    if world_size() == 1:
        return False
    from torch.distributed.device_mesh import init_device_mesh

    device = "cuda" if "nccl" in str(cast(Any, dist).get_backend()) else "cpu"
    mesh = init_device_mesh(device, (world_size(),))
    for teacher in teachers.values():
        cast(Any, teacher).shard(mesh)
    return True


class Company:
    """Lets every rank take part in each forward pass of a sharded teacher, also one that has no images left.

    Ranks have equally many validation batches, but one may have an image, and so a micro-batch, more than another. A
    sharded teacher's parameters are gathered from all ranks, so that a rank alone would wait for ever. While company
    is kept, each rank says before a forward pass which teacher it wants; the highest number wins, and who wants
    another one, or none, runs that teacher too, on an image of no account.

    Args:
        run: runs the teacher of this number, for the others' sake.
    """

    def __init__(self, run: Callable[[int], object]) -> None:
        self._run = run
        self._group = control_group()

    def join(self, wanted: int) -> None:
        """Return when all ranks that run anything next run teacher `wanted`, counted from 1."""
        while (number := self._group.highest(wanted)) != wanted:
            self._run(number)

    def leave(self) -> None:
        """Say that this rank has no images left, and return when no rank has."""
        self.join(0)
