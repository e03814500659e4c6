"""How sure a score is: 95 % intervals for accuracies, means and paired differences, clustered by group.

Images of one photograph or document are not independent; where groups are given, the groups are resampled (or the
number of images is discounted), as in Miller 2024, "Adding error bars to evals" (arXiv 2411.00640).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from distill.probe.protocol import IntArray

FloatArray = NDArray[np.float64]
Verdict = Literal["better", "worse", "not distinguishable"]

Z95 = 1.959963984540054
"""The 97.5 % point of the standard normal distribution."""

NUM_RESAMPLES = 2000
_QUANTILES = (0.025, 0.975)


@dataclass(frozen=True)
class Interval:
    """A mean over `n` images with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int


def wilson(correct: NDArray[np.bool_], groups: IntArray | None = None) -> Interval:
    """Accuracy with Wilson's score interval, which keeps its coverage for few images and near 0 and 1.

    With groups the number of images is divided by the design effect, the ratio of the cluster-robust variance of the
    mean to the binomial one (Korn and Graubard 1998); when every answer is right, or every one wrong, that ratio is
    unknown and each group counts as one image, which is the cautious end.

    Args:
        correct: `[n]`, whether each answer is right.
        groups: `[n]`, the group of each image; None means that images are independent.

    Raises:
        ValueError: `correct` is empty.
    """
    n = len(correct)
    if n == 0:
        raise ValueError("an accuracy over no image has no value; leave the domain out")
    mean = float(correct.mean())
    effective = float(n) if groups is None else _effective_size(correct.astype(np.float64), groups)
    z2 = Z95**2 / effective
    centre = (mean + z2 / 2) / (1 + z2)
    half = Z95 / (1 + z2) * math.sqrt(mean * (1 - mean) / effective + z2 / (4 * effective))
    # Rounding may carry the ends past the mean when every answer is right or wrong.
    return Interval(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)), n)


def _effective_size(values: FloatArray, groups: IntArray) -> float:
    sums, sizes = _group_totals(values, groups)
    n, num_groups, mean = len(values), len(sizes), values.mean()
    binomial = mean * (1 - mean) / n
    if num_groups == n or num_groups < 2 or binomial == 0:
        return float(num_groups)
    clustered = num_groups / (num_groups - 1) * float(((sums - mean * sizes) ** 2).sum()) / n**2
    return n / max(1.0, clustered / binomial)


def _group_totals(values: FloatArray, groups: IntArray | None) -> tuple[FloatArray, FloatArray]:
    """Sum and number of the values of each group, `[G]` and `[G]`."""
    if groups is None:
        return values, np.ones_like(values)
    ids = np.unique(groups, return_inverse=True)[1].reshape(-1)
    return np.bincount(ids, weights=values).astype(np.float64), np.bincount(ids).astype(np.float64)


def bootstrap_mean(
    values: FloatArray, groups: IntArray | None = None, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Interval:
    """Mean with its percentile bootstrap interval; whole groups are resampled where they are given.

    Args:
        values: `[n]`, one value an image.
        groups: `[n]`, the group of each image; None means that images are independent.
        seed: of the resampling.
        num_resamples: how many resamples the percentiles are read from.

    Raises:
        ValueError: `values` is empty.
    """
    if len(values) == 0:
        raise ValueError("a mean over no image has no value; leave the domain out")
    sums, sizes = _group_totals(np.asarray(values, dtype=np.float64), groups)
    generator = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    # Blocks bound the [resamples, groups] array of draws to about 16 MB whatever the number of groups.
    block = max(1, 2_000_000 // len(sums))
    for start in range(0, num_resamples, block):
        draws = generator.integers(len(sums), size=(min(block, num_resamples - start), len(sums)))
        means[start : start + len(draws)] = sums[draws].sum(1) / sizes[draws].sum(1)
    low, high = np.quantile(means, _QUANTILES)
    return Interval(float(np.mean(values)), float(low), float(high), len(values))


def paired_difference(
    a: FloatArray, b: FloatArray, groups: IntArray | None = None, *, seed: int = 0
) -> tuple[Interval, Verdict]:
    """Mean of `a - b` over the same images, its interval, and whether that interval leaves out zero.

    Args:
        a: `[n]`, values of the encoder that is judged; a higher value is better.
        b: `[n]`, values of the encoder it is compared with, on the same images.
        groups: `[n]`, the group of each image.
        seed: of the resampling.

    Returns:
        The interval, and "better" or "worse" for `a` only when the interval leaves out zero.
    """
    interval = bootstrap_mean(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), groups, seed=seed)
    if interval.low > 0:
        return interval, "better"
    if interval.high < 0:
        return interval, "worse"
    return interval, "not distinguishable"
