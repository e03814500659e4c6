"""Several processes over one data set: each takes a share of the images, and the first gets all results, none twice.

Processes are those of `torchrun`; alone, everything here does nothing. Results travel as tensors over gloo.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from distill.errors import DataError

TIMEOUT = timedelta(hours=12)
"""The first process scores an encoder while the others wait with the features of the next."""

Key = TypeVar("Key")


@contextmanager
def process_group() -> Generator[None]:
    """Join the processes that torchrun started, and leave them at the end; nothing without torchrun."""
    is_mine = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if is_mine:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        if is_mine:
            dist.destroy_process_group()


_is_alone = ContextVar("_is_alone", default=False)


@contextmanager
def alone() -> Generator[None]:
    """Have this process work as if there were no others: what only the first one does."""
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


def rank_and_size() -> tuple[int, int]:
    """Return this process's number and how many there are; (0, 1) alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and not _is_alone.get() else (0, 1)


def is_first() -> bool:
    """Return whether this process is the one that scores, prints and writes."""
    return rank_and_size()[0] == 0


def share_of(size: int) -> range:
    """Return the positions this process takes: neighbours, so that the shares in their order are the whole."""
    rank, ranks = rank_and_size()
    return range(size * rank // ranks, size * (rank + 1) // ranks)


def agree(error: str | None) -> None:
    """Have every process stop when one cannot go on, instead of waiting for it.

    Raises:
        DataError: another process had an error.
    """
    failed = sum_over_ranks(int(error is not None))
    if failed and error is None:
        raise DataError(f"{failed} other process(es) of this probe could not go on; their own messages say why.")


def sum_over_ranks(value: int) -> int:
    """Return the sum of a number over all processes."""
    if rank_and_size()[1] == 1:
        return value
    total = torch.tensor([value])
    dist.all_reduce(total)
    return int(total)


def from_first(value: int) -> int:
    """Return the first process's number in all of them."""
    if rank_and_size()[1] == 1:
        return value
    shared = torch.tensor([value])
    dist.broadcast(shared, src=0)
    return int(shared)


def mask_from_first(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the first process's mask `[n]` in all of them."""
    if rank_and_size()[1] == 1:
        return mask
    shared = torch.from_numpy(mask.astype(np.uint8))
    dist.broadcast(shared, src=0)
    return shared.numpy().astype(np.bool_)


def gather(tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """Return the rows of all processes, in the order of the processes, in the first; the others keep their own.

    Args:
        tensors: the same names in every process, `[n, ...]` each, n differing between processes only.
    """
    rank, ranks = rank_and_size()
    if ranks == 1:
        return dict(tensors)
    count = len(next(iter(tensors.values())))
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
    dist.all_gather(counts, torch.tensor([count]))
    sizes = [int(size) for size in counts]
    gathered: dict[Key, Tensor] = {}
    for key, value in tensors.items():
        padded = torch.cat([value, value.new_zeros(max(sizes) - count, *value.shape[1:])])
        parts = [torch.empty_like(padded) for _ in range(ranks)] if rank == 0 else None
        dist.gather(padded, parts, dst=0)
        gathered[key] = (
            value if parts is None else torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        )
    return gathered
