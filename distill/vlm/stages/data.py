"""What one stage is fed: samples in a fixed order, from the place where training stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from distill.data.loader import PlanLoader
from distill.data.samplers import PlanSampler
from distill.errors import ConfigError
from distill.trainer_view import TrainerView
from distill.vlm.batch import VLMSample, collate
from distill.vlm.recipe import StageConfig


class SampleSequence(Protocol):
    """Samples by place, endless: place i is the same for every process, and whenever it is asked for."""

    def __len__(self) -> int:
        """Return how many samples one pass over the sources has."""
        ...

    def __getitem__(self, position: int) -> VLMSample:
        """Return the sample at a place, counted from 0."""
        ...


class _Numbered:
    """Pairs each sample with its place, which the books of skipped steps name."""

    def __init__(self, samples: SampleSequence) -> None:
        self.samples = samples

    def __getitem__(self, position: int) -> tuple[int, VLMSample]:
        return position, self.samples[position]


class _Collate:
    """Makes a batch of numbered samples; a class, so that worker processes can be sent it."""

    def __init__(self, stage: StageConfig, pad_id: int) -> None:
        self.max_length, self.pack, self.pad_id = stage.max_length, stage.pack, pad_id

    def __call__(self, numbered: Sequence[tuple[int, VLMSample]]) -> dict[str, Any]:
        batch = collate([sample for _, sample in numbered], self.pad_id, self.max_length, self.pack)
        return {"batch": batch, "index": torch.tensor([position for position, _ in numbered])}


class StageData(LightningDataModule):
    """One pass of `steps` optimiser steps, which is one epoch to Lightning; it goes on where the trainer stands.

    Args:
        open_samples: opens the stage's sources; called once, when training begins.
        stage: batch sizes, and how long the stage is.
        pad_id: token id of the padding.
        num_workers: processes that read images.
    """

    def __init__(
        self, open_samples: Callable[[], SampleSequence], stage: StageConfig, *, pad_id: int, num_workers: int = 0
    ) -> None:
        super().__init__()
        self.samples = open_samples()
        self.stage = stage
        self.pad_id = pad_id
        self.num_workers = num_workers

    @property
    def steps(self) -> int:
        """Optimiser steps of the stage."""
        return stage_steps(self.stage, len(self.samples))

    @property
    def consumed(self) -> int:
        """Samples that the model has gone through in this stage, in this and earlier parts of the run."""
        view = TrainerView(self.trainer)
        return view.batches * (self.stage.global_batch_size // view.accumulated)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return this process's batches, from the place where training stands.

        Raises:
            ConfigError: the batch cannot be shared by the processes.
        """
        view = TrainerView(self.trainer)
        size = self.stage.global_batch_size // view.accumulated
        sampler = PlanSampler(
            self.steps * self.stage.global_batch_size, size, start=lambda: self.consumed, **view.place
        )
        return PlanLoader(
            _Numbered(self.samples),  # pyright: ignore[reportArgumentType]  (map-style by its `__getitem__`)
            batch_sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_Collate(self.stage, self.pad_id),
            pin_memory=False,
            # Its own: a loader draws a seed for its workers, and must not take it from the model's random numbers.
            generator=torch.Generator(),
        )


def stage_steps(stage: StageConfig, num_samples: int) -> int:
    """Return how many optimiser steps a stage has: its `steps`, or what its `epochs` need, at least one.

    Raises:
        ConfigError: there is no sample.
    """
    if num_samples < 1:
        raise ConfigError("The stage's data holds no sample; look at the paths under its key data.")
    if stage.steps is not None:
        return stage.steps
    return max(1, math.ceil(stage.epochs * num_samples / stage.global_batch_size))


def accumulated_batches(stage: StageConfig, world_size: int = 1) -> int:
    """Return how many batches make an optimiser step.

    Raises:
        ConfigError: the batch cannot be shared out.
    """
    share = (stage.micro_batch_size or math.ceil(stage.global_batch_size / world_size)) * world_size
    if stage.global_batch_size % share:
        raise ConfigError(
            f"A stage's global_batch_size {stage.global_batch_size} is no multiple of {share} (micro_batch_size times "
            f"{world_size} process(es))."
        )
    return stage.global_batch_size // share
