"""What stored states depend on. Whatever differs is named, and the cache is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import cast

from torch import nn

from distill.data.index import DatasetIndex
from distill.data.transforms import NO_AUGMENTATION, Augmentation
from distill.encoder import Encoder
from distill.errors import ConfigError

Fields = dict[str, str]
"""Recipe keys, and what the cache was filled with."""


def data_fields(
    train: DatasetIndex,
    val: DatasetIndex | None,
    *,
    img_size_px: int,
    scaled_decoding: bool,
    augmentation: Augmentation,
    seed: int,
) -> Fields:
    """Return the part of the key that data and preprocessing make."""
    is_fixed = augmentation == NO_AUGMENTATION
    return {
        "data.train": f"fingerprint {train.fingerprint}",
        "data.val": f"fingerprint {val.fingerprint}" if val else "null",
        "data.img_size_px": str(img_size_px),
        "data.scaled_decoding": str(scaled_decoding).lower(),
        "data.augment": str(asdict(augmentation)),
        "data.seed": "any" if is_fixed else str(seed),
    }


def encoder_field(teacher: nn.Module) -> str:
    """Return what can be said of a teacher without its weights."""
    encoder = cast(Encoder, teacher)
    numbers = (encoder.layer_dims, encoder.patch_size, encoder.num_prefix_tokens)
    normalisation = [
        tuple(round(float(value), 6) for value in part) for part in (encoder.image_mean, encoder.image_std)
    ]
    widths, patch, prefix = numbers
    return (
        f"{type(teacher).__name__}, layers {_short(widths)}, patch {patch}, prefix {prefix}, "
        f"mean {normalisation[0]}, std {normalisation[1]}"
    )


def _short(widths: tuple[int, ...]) -> str:
    if len(set(widths)) == 1:
        return f"{len(widths)} x {widths[0]}"
    return str(list(widths))


def teacher_fields(teachers: Mapping[str, nn.Module]) -> Fields:
    """Return the part of the key that the teachers' architectures make; their weights have fields of their own."""
    return {f"model.teachers.{name}": encoder_field(module) for name, module in teachers.items()}


def weights_field(name: str) -> str:
    """Return the key's field that holds a teacher's weights."""
    return f"weights of model.teachers.{name}"


def refuse_differences(stored: Mapping[str, str], wanted: Mapping[str, str], folder: object, advice: str) -> None:
    """Refuse a cache that differs in any of the wanted fields.

    Args:
        stored: the cache's key.
        wanted: fields that have to be equal.
        folder: the cache, for the message.
        advice: the way out.

    Raises:
        ConfigError: naming each field that differs, with both values.
    """
    different = [name for name in wanted if stored.get(name) != wanted[name]]
    if different:
        lines = "".join(f"\n  - {name}: {stored.get(name, 'nothing')} there, {wanted[name]} here" for name in different)
        raise ConfigError(f"The teacher states in {folder} are of something else:{lines}\n{advice}")
