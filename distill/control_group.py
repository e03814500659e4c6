"""A small collective on the CPU, beside the one that reduces gradients: the ranks agree on what to do next."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist


class ControlGroup:
    """Agreement of all ranks, on a gloo group of its own.

    It is apart from the training's group, so that it serves runs on GPUs without waiting for their work, and so that
    no order of hooks can mix its messages with gradients.

    Args:
        timeout_s: how long one rank waits for the others; None stands for a single process.
    """

    def __init__(self, timeout_s: float | None) -> None:
        distributed = cast(Any, dist)
        self.group: Any = None
        if timeout_s is not None:
            self.group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def highest(self, value: int) -> int:
        """Return the largest of all ranks' values; all ranks have to call this."""
        if self.group is None:
            return value
        values = torch.tensor([value], dtype=torch.int64)
        cast(Any, dist).all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return int(values.item())

    def share(self, value: Any) -> Any:
        """Return rank 0's value; all ranks have to call this."""
        if self.group is None:
            return value
        values = [value]
        cast(Any, dist).broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def meet(self, timeout_s: float) -> None:
        """Wait for all ranks.

        Raises:
            RuntimeError: naming the ranks that did not come in time.
        """
        if self.group is not None:
            cast(Any, dist).monitored_barrier(group=self.group, timeout=timedelta(seconds=timeout_s))


def control_group(timeout_s: float = 600.0) -> ControlGroup:
    """Return this run's control group, making it at the first call, which all ranks have to do together.

    Args:
        timeout_s: how long one rank waits for the others; the first call decides.
    """
    global _made
    distributed = cast(Any, dist)
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return ControlGroup(None)
    if _made is None or _made[0] is not distributed.group.WORLD:
        _made = (distributed.group.WORLD, ControlGroup(timeout_s))
    return _made[1]


_made: tuple[Any, ControlGroup] | None = None
