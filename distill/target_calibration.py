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

States = Mapping[str, list[Layer]]
"""The last hidden states of a batch by encoder."""


def calibrate_alignments(
    trainer: Trainer,
    device: torch.device,
    alignments: Iterable[nn.Module],
    num_batches: int,
    targets_of: Callable[[dict[str, Any], Mapping[str, int]], States],
    own_of: Callable[[dict[str, Any]], States],
) -> None:
    """Take the statistics over the first training batches; does nothing when none are wanted.

    Args:
        trainer: of the run.
        device: where sums over ranks are made.
        alignments: of the task.
        num_batches: of training.
        targets_of: the teachers' hidden states of a batch, as many of each teacher as are asked for, or more.
        own_of: the untrained students'.
    """
    everyone = [cast(Alignment, module) for module in alignments]
    wanting = [alignment for alignment in everyone if alignment.needs_calibration]
    if not wanting:
        return
    statistics = [alignment.new_statistics() for alignment in wanting]
    reads_student = any(alignment.reads_student for alignment in wanting)
    needed: dict[str, int] = {}
    for alignment in wanting:
        teacher, count = alignment.config.teacher, alignment.config.num_layers
        needed[teacher] = max(count, needed.get(teacher, 0))
    for batch in cast(Any, trainer).datamodule.calibration_batches(num_batches):
        all_targets, all_own = targets_of(batch, needed), own_of(batch) if reads_student else {}
        for alignment, layers in zip(wanting, statistics, strict=True):
            count = alignment.config.num_layers
            targets = all_targets[alignment.config.teacher][-count:]
            keep = finite_samples(targets)  # one NaN would stay in the statistics for ever
            keep &= alignment.counts(batch["domain"].to(keep.device))
            own = None
            if alignment.reads_student:
                own = all_own[alignment.config.student][-count:]
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
