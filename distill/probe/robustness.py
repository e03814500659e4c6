"""Robustness: a linear probe that was trained on clean images, on test images at other sizes, after JPEG, and cropped.

Two figures at each point: the accuracy of the fixed probe, and how far the pooled feature itself moved, as the cosine
with the clean image's feature after the mean of the fit images was taken from both (without that, features that hardly
depend on the image would look the most robust). Positions of transformers are resized by the encoder itself.

Legend: N images of the cohort, n test images, D the width of a pooled feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from distill.data.decode import decode_jpeg_rgb
from distill.data.transforms import square_view
from distill.errors import ConfigError, DataError
from distill.probe.blind import commonest_class_accuracy
from distill.probe.cohort import Cohort
from distill.probe.extraction import Extraction, pool_layer
from distill.probe.intervals import FloatArray
from distill.probe.linear import LinearResult, linear_probe, standardise
from distill.probe.logistic import LogisticModel
from distill.probe.probe_set import ProbeSet
from distill.probe.protocol import IntArray
from distill.probe.rung import Kind, PerImage, RungScore

ACCURACY_METRIC, COSINE_METRIC = "robust_top1", "robust_cosine"
RESOLUTION, JPEG, CROP = "resolution_px", "jpeg_quality", "crop_side"


@dataclass(frozen=True)
class Changes:
    """What is done to the test images.

    Attributes:
        resolutions_px: sides of the square view; None takes `RESOLUTIONS` times the clean view's side, 224 to 896 px
            for 448, as far as the encoder takes them.
        jpeg_qualities: from 1 to 95, of a view that is encoded and decoded again.
        crop_sides: side of a centred crop as part of the image's, in (0, 1); it is resized to the clean view's size.
        max_images: at most this many test images, taken evenly from the test part; None takes all.
    """

    resolutions_px: tuple[int, ...] | None = None
    jpeg_qualities: tuple[int, ...] = (75, 30, 10)
    crop_sides: tuple[float, ...] = (0.75, 0.5)
    max_images: int | None = 40

    def __post_init__(self) -> None:
        if self.resolutions_px is not None and min(self.resolutions_px, default=1) < 1:
            raise ConfigError(f"resolutions_px is {self.resolutions_px}; a side has one pixel at least.")
        if not all(1 <= quality <= 95 for quality in self.jpeg_qualities):
            raise ConfigError(f"jpeg_qualities is {self.jpeg_qualities}; they must lie from 1 to 95.")
        if not all(0 < side < 1 for side in self.crop_sides):
            raise ConfigError(f"crop_sides is {self.crop_sides}; they must lie between 0 and 1.")
        if self.max_images is not None and self.max_images < 1:
            raise ConfigError(f"max_images is {self.max_images}; use one image at least.")


RESOLUTIONS = (0.5, 1.0, 1.5, 2.0)
"""Parts of the clean view's side: patches of 14, 16 and 32 px divide each of them at 448 px."""


@dataclass(frozen=True)
class _Point:
    """One change: its place on a curve, and how an image is changed."""

    axis: str
    x: float
    change: Callable[[Tensor], Tensor]


def robustness_scores(
    encoder: nn.Module,
    how: Extraction,
    seed: int,
    console: Console,
    cohort: Cohort,
    data: ProbeSet,
    clean: Tensor | None = None,
    changes: Changes | None = None,
    linear: LinearResult | None = None,
) -> list[RungScore]:
    """Return accuracy and cosine with the clean feature at each change of the labelled test images.

    Args:
        encoder: offers `distill.encoder.Encoder`.
        how: features are taken.
        seed: recorded; nothing is drawn.
        console: for progress, and for what an encoder refuses.
        cohort: the images, with classes and split.
        data: where pixels are.
        clean: `[N, D]`, pooled features of the unchanged images, in the cohort's order; taken again when left out.
        changes: what is done to the test images.
        linear: the linear probe of the clean features; trained when left out.

    Raises:
        ConfigError: the encoder refuses a size that `changes` names.
        DataError: there are fewer than two classes, an image cannot be read, or a feature is not finite.
    """
    changes = changes or Changes()
    labelled = cohort.labelled
    test = _some(labelled.test, changes.max_images)
    if clean is None:
        seen = np.concatenate([labelled.fit, labelled.select, labelled.test])
        taken = _pooled(encoder, how, _views(data, cohort, seen, _resized(how.img_size_px)), console, "clean images")
        clean = taken.new_zeros(len(cohort.targets), taken.shape[1])
        clean[torch.from_numpy(seen)] = taken
    probe = _Probe.of(clean, cohort, linear)
    scores: list[RungScore] = []
    for point in _points(changes, encoder, how, console):
        if (point.axis, point.x) == (RESOLUTION, how.img_size_px):
            features = clean[torch.from_numpy(test)]
        else:
            views = _views(data, cohort, test, point.change)
            features = _pooled(encoder, how, views, console, f"{point.axis} {point.x:g}")
        scores += _scores(point, features, clean, probe, cohort, test)
    return scores


def _some(test: IntArray, most: int | None) -> IntArray:
    """Return at most that many positions, evenly from the ascending ones."""
    if most is None or len(test) <= most:
        return test
    return test[np.linspace(0, len(test) - 1, most).round().astype(np.int64)]


@dataclass(frozen=True)
class _Probe:
    """A classifier of clean features, and what they are centred by."""

    model: LogisticModel
    fit: Tensor
    mean: Tensor

    @classmethod
    def of(cls, clean: Tensor, cohort: Cohort, linear: LinearResult | None) -> _Probe:
        """Take the linear probe of the clean features, or train it."""
        targets, split = torch.from_numpy(cohort.targets), cohort.labelled
        linear = linear or linear_probe(clean, targets, split, num_classes=len(cohort.class_names))
        fit = clean[torch.from_numpy(split.fit)]
        return cls(linear.model, fit, fit.mean(0))

    def classify(self, features: Tensor) -> Tensor:
        """Return classes `[n]`."""
        return self.model.logits(standardise(features, self.fit)).argmax(1)


def _points(changes: Changes, encoder: nn.Module, how: Extraction, console: Console) -> Iterator[_Point]:
    asked = changes.resolutions_px
    for size in [round(part * how.img_size_px) for part in RESOLUTIONS] if asked is None else asked:
        if asked is None and not _takes(encoder, how, size):
            console.print(f"Robustness: the encoder refuses images of {size} px; the point is left out.")
            continue
        yield _Point(RESOLUTION, float(size), _resized(size))
    clean = _resized(how.img_size_px)
    for quality in changes.jpeg_qualities:
        yield _Point(JPEG, float(quality), lambda image, quality=quality: reencoded(clean(image), quality))
    for side in changes.crop_sides:
        yield _Point(CROP, side, lambda image, side=side: clean(centre_crop(image, side)))


def _takes(encoder: nn.Module, how: Extraction, size: int) -> bool:
    """Whether an encoder takes images of a size; found by showing it one."""
    how.ready(encoder)
    try:
        how.hidden_states(encoder, torch.zeros(1, 3, size, size, dtype=torch.uint8))
    except ValueError:
        return False
    return True


def _resized(size: int) -> Callable[[Tensor], Tensor]:
    return lambda image: square_view(image, size)


def reencoded(image: Tensor, quality: int) -> Tensor:
    """Return an image `[3, H, W]` uint8 after JPEG of a quality, chroma at half resolution as most writers have it."""
    buffer = BytesIO()
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return decode_jpeg_rgb(buffer.getbuffer())


def centre_crop(image: Tensor, side: float) -> Tensor:
    """Return the middle of an image `[3, H, W]`, `side` of its height and width."""
    height, width = image.shape[-2:]
    rows, columns = max(1, round(side * height)), max(1, round(side * width))
    top, left = (height - rows) // 2, (width - columns) // 2
    return image[:, top : top + rows, left : left + columns]


@dataclass(frozen=True)
class _Views:
    """Changed images, made when they are needed: a resolution of 896 px takes 2.4 MB an image."""

    rows: list[int]
    data: ProbeSet
    change: Callable[[Tensor], Tensor]

    def batch(self, start: int, stop: int) -> Tensor:
        return torch.stack([self.change(self.data.images.pixels(row)) for row in self.rows[start:stop]])


def _views(data: ProbeSet, cohort: Cohort, positions: IntArray, change: Callable[[Tensor], Tensor]) -> _Views:
    return _Views(cohort.rows[positions].tolist(), data, change)


def _pooled(encoder: nn.Module, how: Extraction, views: _Views, console: Console, title: str) -> Tensor:
    """Return pooled features `[n, D]`, float32, on the CPU.

    Raises:
        ConfigError: the encoder refuses the size.
        DataError: a feature is not finite.
    """
    how.ready(encoder)
    size = int(views.batch(0, 1).shape[-1])
    step = how.images_per_pass(size)
    found: list[Tensor] = []
    for start in track(range(0, len(views.rows), step), f"Robustness: {title}", console=console, transient=True):
        try:
            layer = how.hidden_states(encoder, views.batch(start, start + step))[-1]
        except ValueError as error:
            raise ConfigError(f"Robustness: the encoder refuses images of {size} px: {error}") from error
        found.append(pool_layer(layer, how.pool).cpu())
    pooled = torch.cat(found)
    if not pooled.isfinite().all():
        raise DataError(f"Robustness, {title}: features are not finite; check the weights, or use --precision float32.")
    return pooled


def _scores(
    point: _Point, features: Tensor, clean: Tensor, probe: _Probe, cohort: Cohort, test: IntArray
) -> list[RungScore]:
    at = torch.from_numpy(test)
    correct = (probe.classify(features) == torch.from_numpy(cohort.targets)[at]).double().numpy()
    cosine = F.cosine_similarity(features - probe.mean, clean[at] - probe.mean, dim=1).double().numpy()
    settings: dict[str, Any] = {"C": probe.model.c, "images": len(test)}

    def score(metric: str, title: str, kind: Kind, values: FloatArray) -> RungScore:
        parts = PerImage(
            cohort.rows[test], values[:, None], np.ones((len(test), 1)), cohort.groups[test], cohort.domains[test]
        )
        place = (point.axis, point.x)
        blind = commonest_class_accuracy(cohort.targets, cohort.labelled.fit, test) if kind == "accuracy" else None
        return RungScore(metric, title, kind, parts, settings, place, cohort.domain_names, cohort.data, blind=blind)

    return [
        score(ACCURACY_METRIC, "Linear probe on changed images, top-1", "accuracy", correct),
        score(COSINE_METRIC, "Changed feature with the clean one, centred cosine", "cosine", cosine),
    ]
