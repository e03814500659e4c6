"""Which tensors a stage trains, and which a checkpoint after it holds: told by names, without training anything."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from distill.errors import ConfigError
from distill.vlm.recipe import StageConfig, Trained

ALWAYS_KEPT = ("connector", "noise")
"""What no file holds: in every checkpoint, trained or not."""

NORMS_PART = "language"
"""The part whose norms a stage can train alone."""

WAYS_OUT = {
    "vision": "Set vision.tune to full.",
    "language": "Set language.tune to full or lora.",
    "norms": "Set language.train_norms to true.",
}


def part_of(key: str) -> str:
    """Return which part of the VLM a tensor belongs to, by its name."""
    return key.split(".", 1)[0]


def choose_trained(model: nn.Module, stage: StageConfig, name: str, tunable: frozenset[str]) -> None:
    """Freeze what a stage does not train, and nothing else.

    What a part's own `tune` has frozen stays frozen, such as everything but the adapters of a model with LoRA.

    Raises:
        ConfigError: a part that the stage names has nothing to train.
    """
    trained: set[str] = set()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in tunable and rate_key(key, stage) is not None)
        if parameter.requires_grad:
            trained.add(key)
    for part in stage.rates:
        if not any(rate_key(key, stage) == part for key in trained):
            raise ConfigError(
                f"stages.{name}.lr names {part}, of which nothing can be trained. {WAYS_OUT.get(part, '')} Or leave "
                f"{part} out of the stage."
            )


def rate_key(key: str, stage: StageConfig) -> Trained | None:
    """Return the key of a stage's `lr` that a parameter falls under, by its name; None where it is frozen."""
    part = part_of(key)
    if part == NORMS_PART and "norms" in stage.rates and "norm" in key.split(".")[-2]:
        return "norms"
    return next((named for named in stage.rates if named == part), None)


def kept_names(model: nn.Module, stages: Iterable[StageConfig], tunable: frozenset[str]) -> frozenset[str]:
    """Return the names of the tensors that the checkpoint holds after some stages.

    Args:
        model: the VLM.
        stages: those that were run.
        tunable: names of the parameters that the parts' own `tune` leaves to be trained.
    """
    always = {key for key in model.state_dict() if part_of(key) in ALWAYS_KEPT}
    return frozenset(always | {key for stage in stages for key in tunable if rate_key(key, stage) is not None})
