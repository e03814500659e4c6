"""Differences of two arms over the same test images, with 95 % intervals over images and seeds.

A resample draws groups of test images anew within each data set, the same for both arms; figures are averaged over
seeds and data sets. To an arm of several seeds each resample adds what their mean may be off by: a draw from Student's
t distribution, scaled by the seeds' own standard error. With one seed the interval says nothing of seeds.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from collect import Arm, Floats, Key, Parts

NUM_RESAMPLES = 2000
QUANTILES = (0.025, 0.975)


@dataclass(frozen=True)
class Interval:
    """A figure with the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def text(self, *, signed: bool = True) -> str:
        """Return it in percent: `+3.1 [+1.0, +5.2]`."""
        form = "{:+.1f}" if signed else "{:.0f}"
        value, low, high = (form.format(100 * number) for number in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def resampled(arm: Arm, keys: Sequence[Key]) -> Floats:
    """Return an arm's mean figure in each resample, `[R]`; groups are drawn alike for every arm.

    Raises:
        ValueError: the arm's seeds were not judged on the same images.
    """
    found = np.mean([_over_images(arm.parts(key), key) for key in keys], axis=0)
    by_seed = np.mean([arm.values(key) for key in keys], axis=0)
    count = len(by_seed)
    if count > 1:
        drawn = np.random.default_rng(zlib.crc32(arm.name.encode()))
        found = found + by_seed.std(ddof=1) / count**0.5 * drawn.standard_t(count - 1, NUM_RESAMPLES)
    return found


def _over_images(runs: Sequence[Parts], key: Key) -> Floats:
    ids = np.unique(runs[0].groups, return_inverse=True)[1].reshape(-1)
    count = int(ids.max()) + 1
    drawn = np.random.default_rng(zlib.crc32(key[0].encode()))
    weights = drawn.multinomial(count, np.full(count, 1 / count), size=NUM_RESAMPLES).astype(np.float64)
    sums = [_sums(run, ids, count) for run in runs]
    return np.mean([weights @ numerators / (weights @ denominators) for numerators, denominators in sums], axis=0)


def _sums(run: Parts, ids: np.ndarray, count: int) -> tuple[Floats, Floats]:
    return (
        np.bincount(ids, weights=run.numerator, minlength=count),
        np.bincount(ids, weights=run.denominator, minlength=count),
    )


def _check_same_images(arms: Sequence[Arm], keys: Sequence[Key]) -> None:
    for key in keys:
        for arm in arms[1:]:
            if not arm.parts(key)[0].is_of(arms[0].parts(key)[0]):
                raise ValueError(f"{arm.name} and {arms[0].name} were judged on other images of {key[0]}")


def difference(arm: Arm, baseline: Arm, keys: Sequence[Key]) -> Interval:
    """Return `arm - baseline`, averaged over some figures.

    Raises:
        ValueError: the two were not judged on the same images.
    """
    _check_same_images([arm, baseline], keys)
    value = np.mean([arm.values(key).mean() - baseline.values(key).mean() for key in keys])
    spread = resampled(arm, keys) - resampled(baseline, keys)
    return Interval(float(value), *(float(end) for end in np.quantile(spread, QUANTILES)))


def gap_closed(arm: Arm, initial: Arm, teacher: Arm, keys: Sequence[Key]) -> Interval:
    """Return the share of the way from the initialisation to the teacher that an arm has gone; 1 is the teacher.

    Raises:
        ValueError: the three were not judged on the same images.
    """
    _check_same_images([arm, initial, teacher], keys)

    def mean(side: Arm) -> float:
        return float(np.mean([side.values(key).mean() for key in keys]))

    value = (mean(arm) - mean(initial)) / (mean(teacher) - mean(initial))
    start = resampled(initial, keys)
    shares = (resampled(arm, keys) - start) / (resampled(teacher, keys) - start)
    return Interval(value, *(float(end) for end in np.quantile(shares, QUANTILES)))
