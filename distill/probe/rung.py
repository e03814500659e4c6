"""What every rung of the evaluation ladder returns: a score whose interval and paired difference can be taken later.

Every figure here is a mean of ratios of sums over images: accuracy and cosine (one column, denominator 1), character
error rate (edits over characters), mean intersection over union (a column a class), share of variance left (squared
error over squared deviation). A calibration error adds up the columns' absolute sums instead (a column a bin). So one
bootstrap serves them all, and two encoders' figures can be paired image by image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from distill.probe.intervals import FloatArray
from distill.probe.protocol import IntArray

Kind = Literal["accuracy", "cosine", "error_rate", "iou", "r2", "calibration_error", "distance", "count"]
"""How a figure is written: accuracies, IoU and error rates in per cent, the others as they are."""

LOWER_IS_BETTER: tuple[Kind, ...] = ("error_rate", "calibration_error", "distance")


@dataclass(frozen=True)
class PerImage:
    """The parts of a figure that each image brings.

    Attributes:
        rows: `[n]`, which image of its data set each one is; unique.
        numerator: `[n, C]`, float64.
        denominator: `[n, C]`, float64, none negative.
        groups: `[n]`, images of one photograph or document share a number.
        domains: `[n]`, position in `RungScore.domain_names`; None where images have no domain.
    """

    rows: IntArray
    numerator: FloatArray
    denominator: FloatArray
    groups: IntArray
    domains: IntArray | None = None


@dataclass(frozen=True)
class RungScore:
    """One figure of one encoder.

    Attributes:
        metric: unique name, for example "linear_top1" or "ocr_cer".
        title: what a reader sees, for example "Linear probe, top-1".
        kind: see `Kind`.
        per_image: the parts of the figure. For `kind` "r2" the value is 1 minus the ratio.
        settings: what was chosen, and where: plain values for JSON.
        at: a point of a curve, for example ("font_px", 12.0) or ("resolution_px", 224.0); None for a single figure.
        domain_names: of the data set.
        data: fingerprint of the images, so that only equal ones are paired.
        draws: `[draws, n]`, each image's value for each draw of the training images; its mean over draws is the
            numerator, and intervals resample draws too. None where nothing was drawn.
        blind: what the best constant answer scores, learnt from the images that are trained on: the commonest class,
            for example. None where there is no such answer.
    """

    metric: str
    title: str
    kind: Kind
    per_image: PerImage
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    at: tuple[str, float] | None = None
    domain_names: tuple[str, ...] = ()
    data: str = ""
    draws: FloatArray | None = None
    blind: float | None = None


def ratio_of_sums(numerator: FloatArray, denominator: FloatArray, kind: Kind = "accuracy") -> float:
    """Return the figure of `numerator` and `denominator`, both `[n, C]`; columns without any denominator do not count.

    Raises:
        ValueError: no column has a denominator.
    """
    figure = float(figures_of_sums(numerator.sum(0)[None], denominator.sum(0)[None], kind)[0])
    if np.isnan(figure):
        raise ValueError("a figure over nothing has no value; leave the scope out")
    return figure


def figures_of_sums(numerator: FloatArray, denominator: FloatArray, kind: Kind) -> FloatArray:
    """Return the figures `[R]` of sums `[R, C]`; NaN where no column has a denominator."""
    counts = denominator > 0
    columns = counts.sum(1)
    if kind == "calibration_error":
        total = denominator.sum(1)
        figures = np.abs(np.where(counts, numerator, 0.0)).sum(1) / np.where(total > 0, total, 1.0)
    else:
        ratios = np.where(counts, numerator / np.where(counts, denominator, 1.0), 0.0)
        figures = ratios.sum(1) / np.maximum(columns, 1)
    figures = np.where(columns > 0, figures, np.nan)
    return 1.0 - figures if kind == "r2" else figures
