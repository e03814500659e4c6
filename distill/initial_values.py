"""The validation values before the first step: what a run is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning import Trainer
from torch import Tensor


def kept_initial_values(
    trainer: Trainer, known: dict[str, float], values: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Return the initial values, having logged them where they are new or their log is elsewhere.

    Lightning logs nothing during its sanity check. Where that check covers the whole validation set and the run is
    new, its values are the initial ones.

    Args:
        trainer: of the run.
        known: of an earlier part of the run; empty if there are none.
        values: of the sanity check; None when training starts, where a resumed run writes what it knows again if its
            folder has no log of the run before.
    """
    if values is None:
        has_log = any(Path(trainer.default_root_dir).glob("metrics-*.csv"))
        if trainer.global_step == 0 or not known or has_log:
            return known
    else:
        is_whole = list(trainer.num_sanity_val_batches) == list(trainer.num_val_batches)
        if known or trainer.global_step > 0 or not is_whole:
            return known
        known = {key: float(value) for key, value in values.items()}
    for logger in trainer.loggers:
        logger.log_metrics(known, step=0)
    return known
