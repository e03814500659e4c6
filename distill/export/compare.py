"""Comparing what a consumer computed with the golden features and pixels; every refusal names the number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.errors import ExportError
from distill.export.contract import TOLERANCE, Bound
from distill.export.golden import Golden, Preprocessing

FLOAT32_STEPS = 2.0**-20
"""Eight float32 steps, relative to a layer's largest feature. It exceeds `TOLERANCE` only where features pass 10.5:
the outlier channels of large encoders reach hundreds, where neighbouring float32 numbers are already 3e-5 apart."""

PIXEL_TOLERANCE = 1e-5
"""Largest difference of a normalised pixel of an image that needs no resize."""

RESIZE_MAX_LEVELS = 4.0
RESIZE_MEAN_LEVELS = 0.25
"""Largest and mean difference in grey levels (of 255) after a resize. Consumers resize by Pillow or by torchvision;
bicubic in the one is within 2 levels of bicubic in the other, and bilinear is further on average."""


@dataclass(frozen=True)
class Closeness:
    """How close a consumer's features are to the golden ones.

    Attributes:
        worst_difference: largest absolute difference of any feature.
        tolerance: what it was allowed to be; None where only the cosine is bounded.
        min_cosine: smallest cosine of any token with its golden one.
    """

    worst_difference: float
    tolerance: float | None
    min_cosine: float


def allowed_difference(absolute: float, largest: float) -> float:
    """Return the difference allowed in a layer whose largest feature is `largest`; see `Bound.absolute`."""
    return absolute * max(1.0, FLOAT32_STEPS * largest / TOLERANCE)


def compare_features(golden: Golden, tensors: Mapping[str, Tensor], variant: str, bound: Bound, who: str) -> Closeness:
    """Return how close one variant's features are.

    Args:
        golden: what they must be.
        tensors: the consumer's answer, by `<variant>.<position>.<prefix|patches>`.
        variant: the variant's name.
        bound: how close it must be.
        who: the consumer and its version, for messages.

    Raises:
        ExportError: a shape differs, or a feature is further than the bound allows (a NaN always is).
    """
    worst, allowed, cosine = 0.0, bound.absolute, 1.0
    for position, layer in enumerate(golden.layers):
        largest = max(float(tensor.abs().max()) for tensor in layer if tensor.numel())
        tolerance = None if bound.absolute is None else allowed_difference(bound.absolute, largest)
        allowed = None if tolerance is None else max(allowed or 0.0, tolerance)
        for name, expected in zip(("prefix", "patches"), layer, strict=True):
            place = f"layer {position - len(golden.layers)}, {name} tokens"
            got = tensors[f"{variant}.{position}.{name}"]
            _check_shape(got, expected, place, f"{who} ({variant})", golden.target)
            if expected.numel():
                difference = float((got - expected).abs().max())
                lowest = float(F.cosine_similarity(got.double(), expected.double(), dim=-1).min())
                _check_distance(difference, tolerance, lowest, bound.cosine, f"{who} ({variant})", place, golden.target)
                worst, cosine = max(worst, difference), min(cosine, lowest)
    return Closeness(worst, allowed, cosine)


def _check_shape(got: Tensor, expected: Tensor, place: str, who: str, target: str) -> None:
    if got.shape != expected.shape:
        raise ExportError(
            f"{who} gives {place} of shape {tuple(got.shape)}, the encoder {tuple(expected.shape)}; "
            f"the {target} export is not published."
        )


def _check_distance(
    difference: float,
    tolerance: float | None,
    cosine: float,
    min_cosine: float | None,
    who: str,
    place: str,
    target: str,
) -> None:
    # Both conditions are written so that a NaN fails as well.
    if tolerance is not None and not difference <= tolerance:
        raise ExportError(
            f"{who} gives other features than the encoder: {place} differ by {difference:.3g}, allowed is "
            f"{tolerance:.3g}; the {target} export is not published."
        )
    if min_cosine is not None and not cosine >= min_cosine:
        raise ExportError(
            f"{who} gives other features than the encoder: {place} have a cosine of {cosine:.6f} with the encoder's "
            f"at worst, at least {min_cosine:g} is asked for; the {target} export is not published."
        )


def compare_pixels(preprocessing: Preprocessing, image: Tensor, photo: Tensor, answer: Mapping[str, Tensor]) -> float:
    """Return the largest difference in grey levels after the consumer's own resize.

    Args:
        preprocessing: the encoder's.
        image: uint8 `[3, S, S]`, which needs no resize.
        photo: uint8 `[H, W, 3]` of another size.
        answer: what the consumer made of both, `image` and `photo`, each `[1, 3, S, S]`.

    Raises:
        ExportError: size, mean, std, filter or crop differ from the encoder's.
    """
    side = preprocessing.img_size
    for name in ("image", "photo"):
        shape = tuple(answer[name].shape)
        if shape != (1, 3, side, side):
            raise ExportError(
                f"The export's preprocessing gives {shape} pixels, the encoder needs {(1, 3, side, side)}: size, "
                "crop or tiling in its preprocessing config is wrong."
            )
    difference = float((answer["image"] - preprocessing.normalise(image)).abs().max())
    if not difference <= PIXEL_TOLERANCE:
        raise ExportError(
            f"The export's preprocessing normalises otherwise than the encoder: pixels differ by {difference:.3g}, "
            f"allowed is {PIXEL_TOLERANCE:g}. Its mean and std must be {preprocessing.image_mean} and "
            f"{preprocessing.image_std}."
        )
    return _compare_resized(preprocessing, photo, answer["photo"])


def _compare_resized(preprocessing: Preprocessing, photo: Tensor, got: Tensor) -> float:
    from PIL import Image

    levels_per_unit = 255 * torch.tensor(preprocessing.image_std).view(3, 1, 1)
    levels = (got - preprocessing.prepare(Image.fromarray(photo.numpy()))).abs() * levels_per_unit
    worst, mean = float(levels.max()), float(levels.mean())
    if not (worst <= RESIZE_MAX_LEVELS and mean <= RESIZE_MEAN_LEVELS):
        raise ExportError(
            f"The export's preprocessing resizes otherwise than the encoder: {worst:.1f} grey levels at worst and "
            f"{mean:.2f} on average, allowed are {RESIZE_MAX_LEVELS:g} and {RESIZE_MEAN_LEVELS:g}. It must squash by "
            "bicubic resampling, without a crop."
        )
    return worst
