"""Who takes part in a recipe: encoders by name, and the alignments that name them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, cast

from torch import nn

from distill.alignment import Alignment, AlignmentConfig
from distill.encoder import Encoder
from distill.errors import ConfigError, WeightsError


def as_modules(key: str, encoders: Mapping[str, Encoder]) -> dict[str, nn.Module]:
    """Return encoders as modules.

    Raises:
        ConfigError: there is none, or one is no `torch.nn.Module`.
    """
    if not encoders:
        raise ConfigError(f"model.{key} is empty; name at least one encoder by class_path.")
    for name, encoder in encoders.items():
        if not isinstance(encoder, nn.Module):
            raise ConfigError(f"model.{key}.{name} is a {type(encoder).__name__}, not a torch.nn.Module.")
        if "." in name or "/" in name:
            raise ConfigError(f"model.{key}: the name {name!r} must not contain a dot or a slash.")
    return cast(dict[str, nn.Module], dict(encoders))


def check_names(
    configs: list[AlignmentConfig], teachers: Mapping[str, Encoder], students: Mapping[str, Encoder]
) -> None:
    """Refuse alignments that name nobody, and students and teachers that no alignment names.

    Raises:
        ConfigError: naming the key and the valid names.
    """
    for config in configs:
        for role, name, known in (("student", config.student, students), ("teacher", config.teacher, teachers)):
            if name not in known:
                raise ConfigError(f"model.alignments names the {role} {name!r}; the recipe has {', '.join(known)}.")
    pairs = [(config.student, config.teacher) for config in configs]
    if len(set(pairs)) != len(pairs):
        raise ConfigError("model.alignments names the same student and teacher twice; give each pair once.")
    idle = sorted((students.keys() | teachers.keys()) - {name for pair in pairs for name in pair})
    if idle:
        raise ConfigError(f"No entry of model.alignments names {', '.join(idle)}; add one or remove the encoder.")


def layers_needed(configs: Iterable[AlignmentConfig], role: Literal["teacher", "student"]) -> dict[str, int]:
    """Return how many last hidden states of each teacher or student the alignments need together."""
    layers: dict[str, int] = {}
    for config in configs:
        name = config.teacher if role == "teacher" else config.student
        layers[name] = max(config.num_layers, layers.get(name, 0))
    return layers


def refuse_other_weights(own: Mapping[str, str], saved: Mapping[str, str]) -> None:
    """Refuse teachers whose weights are not those that a checkpoint was trained with.

    Args:
        own: fingerprints by the teachers' names.
        saved: the checkpoint's.

    Raises:
        WeightsError: naming the teacher.
    """
    for name in own.keys() & saved.keys():
        if own[name] != saved[name]:
            raise WeightsError(
                f"The teacher {name!r} has not the weights that the checkpoint was trained with (fingerprint "
                f"{own[name][:12]}, then {saved[name][:12]}). Restore the file that model.teachers.{name} names, "
                "or begin a new run."
            )


def refuse_uncalibrated(alignment: Alignment) -> None:
    """Refuse to validate an alignment that has no statistics yet.

    Raises:
        ConfigError: naming it.
    """
    if alignment.needs_calibration:
        config = alignment.config
        raise ConfigError(
            f"The alignment {config.student} <- {config.teacher} standardises by {config.standardise}, whose "
            "statistics come from training: validate a checkpoint of a run, by --ckpt_path."
        )
