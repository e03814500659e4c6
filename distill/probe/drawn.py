"""What all drawn probe data have in common: images of a known content, made here from a seed, without any download.

Image i is a function of (seed, task, i) alone, so a larger set begins with the smaller one's images. Drawn images are
independent of each other, so their split is by position.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from distill.errors import ConfigError
from distill.probe.protocol import IntArray, Split

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from distill.probe.extraction import Extraction

Task = Literal["shapes", "charts", "text"]
_TASKS: tuple[Task, ...] = ("shapes", "charts", "text")
_VERSION = 1
"""Raised when a drawing changes, so that figures on different drawings are never paired."""

_PARTS = (0, 2, 0, 1, 0, 2, 0, 1, 0, 2)
"""Fit, select and test (0, 1, 2) of ten images in a row: the shares of `distill.probe.protocol.FRACTIONS`."""

MIN_SIZE_PX = 32


def drawing_rng(seed: int, task: Task, number: int) -> np.random.Generator:
    """Return the generator of one drawn image."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, _TASKS.index(task), number])))


def fingerprint(task: Task, settings: DataclassInstance) -> str:
    """Return a short name of a drawn data set: equal only for equal tasks, settings and drawing code."""
    content = json.dumps({"task": task, "version": _VERSION, **asdict(settings)}, sort_keys=True)
    return f"drawn-{task}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def drawn_split(num_units: int, unit_of: IntArray | None = None) -> Split:
    """Split drawn units (images, pages) by position: five of ten to fit, two to select, three to test.

    Args:
        num_units: number of units.
        unit_of: `[N]`, the unit of each item, where a unit holds several; items of a unit stay together.

    Returns:
        Positions of items.
    """
    part_of_unit = np.resize(np.asarray(_PARTS, dtype=np.int64), num_units)
    parts = part_of_unit if unit_of is None else part_of_unit[unit_of]
    return Split(*(np.flatnonzero(parts == part).astype(np.int64) for part in range(3)))


def require_drawable(name: str, count: int, least: int, img_size_px: int) -> None:
    """Refuse settings that leave a part of the split empty, or images too small to hold anything.

    Raises:
        ConfigError: naming the setting.
    """
    if count < least:
        raise ConfigError(f"{name} is {count}; fit, select and test need {least} at least. Draw more.")
    if img_size_px < MIN_SIZE_PX:
        raise ConfigError(f"img_size_px is {img_size_px}; drawn images need {MIN_SIZE_PX} px a side at least.")


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as `[3, H, W]` uint8."""
    return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.uint8)).permute(2, 0, 1).contiguous()


def map_batches(
    encoder: nn.Module, how: Extraction, images: Tensor, console: Console, title: str
) -> Iterator[tuple[slice, Tensor]]:
    """Yield patch tokens of images `[N, 3, H, W]`, one forward pass after another, under a progress bar.

    Yields:
        The rows of the images and their maps `[B, h, w, D]`, float32, on the CPU.

    Raises:
        ConfigError: the encoder refuses images of that size.
        DataError: a feature is not finite.
    """
    step = how.images_per_pass(int(images.shape[-2]), int(images.shape[-1]))
    starts = range(0, len(images), step)
    for start in track(starts, description=title, console=console, transient=True):
        rows = slice(start, min(start + step, len(images)))
        yield rows, how.patch_maps(encoder, images[rows])


def all_maps(encoder: nn.Module, how: Extraction, images: Tensor, console: Console, title: str) -> Tensor:
    """Return the patch tokens `[N, h, w, D]`, float32, of images `[N, 3, H, W]`; see `map_batches`."""
    return torch.cat([maps for _, maps in map_batches(encoder, how, images, console, title)])


def unit_scale(fit: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation `[D]` of tokens `[..., D]`; a constant channel gets deviation 1."""
    variance, mean = torch.var_mean(fit.reshape(-1, fit.shape[-1]), dim=0, correction=0)
    std = variance.sqrt()
    return mean, torch.where(std > 1e-6 * (1 + mean.abs()), std, torch.ones_like(std))
