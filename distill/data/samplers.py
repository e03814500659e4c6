"""Which places of the plan, or rows of the index, each rank takes; rank and world size are always given."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

from distill.errors import ConfigError


class PlanSampler(Sampler[list[int]]):
    """Batches of plan positions for one rank.

    Global batch t holds the positions `start + t * G` to `start + (t + 1) * G - 1`, and rank r of W takes every W-th of
    them from the r-th on: the global batches do not depend on W.

    Args:
        num_samples: positions in one pass over all ranks; an incomplete last batch is left out.
        global_batch_size: G, images over all ranks.
        rank: this process, from 0.
        world_size: W, the number of processes.
        start: first position of a pass, or a function that tells it at the start of each pass.

    Raises:
        ConfigError: G is no multiple of W, or `num_samples` is less than one batch.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        start: int | Callable[[], int] = 0,
    ) -> None:
        check_rank(rank, world_size)
        if global_batch_size < 1 or global_batch_size % world_size:
            raise ConfigError(
                f"The global batch of {global_batch_size} images cannot be shared by {world_size} process(es); "
                f"data.global_batch_size must be a multiple of {world_size}."
            )
        if num_samples < global_batch_size:
            raise ConfigError(
                f"An epoch of {num_samples} samples is less than one global batch of {global_batch_size}; lower "
                "data.global_batch_size or raise data.samples_per_epoch."
            )
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.rank = rank
        self.world_size = world_size
        self.start = start

    def __len__(self) -> int:
        return self.num_samples // self.global_batch_size

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start() if callable(self.start) else self.start
        for batch in range(len(self)):
            begin = first + batch * self.global_batch_size
            yield list(range(begin + self.rank, begin + self.global_batch_size, self.world_size))


def epoch_and_batch(
    global_batch_size: int, num_rows: int, samples_per_epoch: int | None, world_size: int, accumulated: int
) -> tuple[int, int]:
    """Return how many samples an epoch has, and how many images a batch has over all ranks.

    Args:
        global_batch_size: images an optimiser step.
        num_rows: samples of the training data.
        samples_per_epoch: as many as are wanted; None means all. An incomplete last global batch is left out.
        world_size: the number of processes.
        accumulated: batches an optimiser step.

    Raises:
        ConfigError: the global batch cannot be shared out, or an epoch is shorter than one.
    """
    if global_batch_size % (accumulated * world_size):
        raise ConfigError(
            f"data.global_batch_size {global_batch_size} is no multiple of {world_size} device(s) x "
            f"{accumulated} accumulated batch(es) (trainer.accumulate_grad_batches) = {accumulated * world_size}."
        )
    if samples_per_epoch is not None and samples_per_epoch < global_batch_size:
        raise ConfigError(
            f"data.samples_per_epoch {samples_per_epoch} is below data.global_batch_size {global_batch_size}; raise it."
        )
    # A set smaller than a batch is repeated within it.
    samples = max(global_batch_size, samples_per_epoch or num_rows)
    return samples // global_batch_size * global_batch_size, global_batch_size // accumulated


class EvenSampler(Sampler[list[int]]):
    """Every row once, in order, over all ranks: none twice and none left out.

    All ranks get equally many batches, whose sizes differ by one at most. Padding with repeated rows would count some
    images twice in a metric, and unequal numbers of batches hang a collective operation.

    Args:
        num_rows: rows over all ranks.
        batch_size: rows in a batch of one rank, at most (one more where a rank has a row more than another and batches
            hold one row only).
        rank: this process, from 0.
        world_size: the number of processes.

    Raises:
        ConfigError: there are fewer rows than processes, or the batch size is below 1.
    """

    def __init__(self, num_rows: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        check_rank(rank, world_size)
        if batch_size < 1:
            raise ConfigError(f"data.val_batch_size_per_device is {batch_size}; it must be at least 1.")
        if num_rows < world_size:
            raise ConfigError(f"{num_rows} validation image(s) cannot be shared by {world_size} processes.")
        self.rows = np.arange(rank, num_rows, world_size)
        most = -(-num_rows // world_size)
        self.num_batches = min(-(-most // batch_size), num_rows // world_size)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in np.array_split(self.rows, self.num_batches):
            yield batch.tolist()


def check_rank(rank: int, world_size: int) -> None:
    """Refuse a rank that is none of the world's.

    Raises:
        ConfigError: the rank is not from 0 to world size - 1.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not one of {world_size} process(es); ranks run from 0 to {world_size - 1}.")
