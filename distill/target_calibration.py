"""Statistics of the hidden states, taken before the first step for alignments that standardise their targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

from distill.alignment import Alignment
from distill.encoder import Layer
from distill.finite import finite_samples
from distill.standardise import FeatureStatistics

States = Callable[[dict[str, Any], Mapping[str, int]], Mapping[str, list[Layer]]]
"""Gives the last hidden states of a batch, as many of each encoder as are asked for, or more."""


def calibrate_alignments(
    trainer: Trainer,
    device: torch.device,
    alignments: Iterable[nn.Module],
    num_batches: int,
    targets_of: States,
    own_of: States,
) -> None:
    """Take the statistics over the first training batches; does nothing when none are wanted.

    Args:
        trainer: of the run.
        device: where sums over ranks are made.
        alignments: of the task.
        num_batches: of training.
        targets_of: the teachers' hidden states.
        own_of: the untrained students'.
    """
    everyone = [cast(Alignment, module) for module in alignments]
    wanting = [alignment for alignment in everyone if alignment.needs_calibration]
    if not wanting:
        return
    statistics = [alignment.new_statistics() for alignment in wanting]
    for batch in cast(Any, trainer).datamodule.calibration_batches(num_batches):
        for alignment, layers in zip(wanting, statistics, strict=True):
            name, count = alignment.config.teacher, alignment.config.num_layers
            targets = targets_of(batch, {name: count})[name][-count:]
            keep = finite_samples(targets)  # one NaN would stay in the statistics for ever
            keep &= alignment.counts(batch["domain"].to(keep.device))
            student, own = alignment.config.student, None
            if alignment.reads_student:
                own = own_of(batch, {student: count})[student][-count:]
                keep &= finite_samples(own)
            alignment.observe(layers, own, targets, keep)
    for alignment, layers in zip(wanting, statistics, strict=True):
        alignment.calibrate([sum_over_ranks(trainer, device, layer) for layer in layers])
    _give_averages_the_statistics(trainer, everyone)


def sum_over_ranks(trainer: Trainer, device: torch.device, statistics: FeatureStatistics) -> FeatureStatistics:
    """Return statistics over all ranks; all of them have to call this."""
    if trainer.world_size == 1:
        return statistics
    count, total, outer = statistics.sums()
    merged = FeatureStatistics(total.shape[0])
    summed = [
        cast(Tensor, trainer.strategy.reduce(value.to(device), reduce_op="sum")).cpu()
        for value in (torch.tensor(count), total, outer)
    ]
    merged.merge(int(summed[0]), summed[1], summed[2])
    return merged


def _give_averages_the_statistics(trainer: Trainer, alignments: list[Alignment]) -> None:
    # Lightning's callback copies the module before training, thus before the statistics are there.
    for callback in cast(Any, trainer).callbacks:
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:  # pyright: ignore[reportPrivateUsage]
            average = cast(Any, callback._average_model.module)  # pyright: ignore[reportPrivateUsage]
            for own, other in zip(alignments, average.alignments, strict=True):
                other.load_state_dict(own.state_dict())
