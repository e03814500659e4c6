"""What a run, its cache and its shards need on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from distill.data.index import DatasetIndex
from distill.errors import DistillError
from distill.planner.recipe import Recipe

PCA_DIMS = (512, 256)
_SCALE_BYTES = 4


@dataclass(frozen=True)
class ShardDisk:
    """The shards of a recipe, as far as they can be seen from here.

    Attributes:
        images: training images; None if the shards are not here.
        num_bytes: of training and validation shards.
        note: why they were not counted.
    """

    images: int | None
    num_bytes: int | None
    note: str = ""


def shard_disk(recipe: Recipe) -> ShardDisk:
    """Return how many images and bytes the recipe's shards have; nothing is fetched from a store."""
    data = recipe.data
    if "://" in f"{data.train} {data.val}":
        return ShardDisk(None, None, "behind URLs: not counted; name --samples")
    try:
        data.setup("validate")
    except DistillError as error:
        return ShardDisk(None, None, f"not counted: {str(error).splitlines()[0]}")
    train: DatasetIndex = data.train_index
    num_bytes = sum(shard.num_bytes for shard in train.shards)
    validation: DatasetIndex | None = getattr(data, "_val_index", None)
    return ShardDisk(
        len(train), num_bytes + sum(shard.num_bytes for shard in (validation.shards if validation else ()))
    )


def checkpoint_bytes(weight_bytes: int, trainable_bytes: int, *, averages_weights: bool) -> int:
    """Return the size of one checkpoint: student and head weights, AdamW's two moments, and an average if kept."""
    return weight_bytes * (2 if averages_weights else 1) + 2 * trainable_bytes


def run_checkpoint_bytes(recipe: Recipe) -> int:
    """Return the size of one checkpoint of a recipe."""
    students = (recipe.task.students, recipe.task.alignments)
    tensors = [tensor for module in students for tensor in (*module.parameters(), *module.buffers())]
    trained = [parameter for module in students for parameter in module.parameters() if parameter.requires_grad]
    sizes = [sum(tensor.numel() * tensor.element_size() for tensor in part) for part in (tensors, trained)]
    return checkpoint_bytes(sizes[0], sizes[1], averages_weights=recipe.averages_weights)


def run_bytes(recipe: Recipe) -> int:
    """Return the bytes of the checkpoints that a run keeps at most, or of one where a callback keeps all."""
    return run_checkpoint_bytes(recipe) * (recipe.kept_checkpoints or 1)


def cache_bytes_per_image(
    target_bytes: Mapping[str, int], dtypes: Mapping[str, torch.dtype], widths: Mapping[str, int]
) -> dict[str, int]:
    """Return bytes an image of all teachers' cached hidden states, by format.

    Args:
        target_bytes: of one image's hidden states as computed, by teacher.
        dtypes: they are computed in.
        widths: of the last hidden state, D.

    Returns:
        "none" as computed, "fp16", "int8" at full width, and "int8 PCA-r" with r of D dimensions; the int8 formats
        have a float32 scale a token, as `distill cache` writes them.
    """
    numbers = {name: size // dtypes[name].itemsize for name, size in target_bytes.items()}
    tokens = {name: count // widths[name] for name, count in numbers.items()}
    formats = {
        "none": sum(target_bytes.values()),
        "fp16": 2 * sum(numbers.values()),
        "int8": sum(numbers.values()) + _SCALE_BYTES * sum(tokens.values()),
    }
    for dims in PCA_DIMS:
        sizes = [tokens[name] * (min(dims, widths[name]) + _SCALE_BYTES) for name in tokens]
        formats[f"int8 PCA-{dims}"] = sum(sizes)
    return formats
