"""Differences of two arms over the same test images, with 95 % intervals over images and seeds.

A resample draws groups of test images anew within each data set, the same for both arms, and each arm's seeds anew;
figures are averaged over the data sets. The interval thus says what other test images and other seeds could have given;
with one seed it says nothing of seeds.
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


def resampled(arm: Arm, key: Key) -> Floats:
    """Return an arm's figure in each resample, `[R]`; groups are drawn alike for every arm.

    Raises:
        KeyError: the arm was not judged so.
    """
    runs = [parts for _, parts in sorted(arm.figures[key].items())]
    ids = np.unique(runs[0].groups, return_inverse=True)[1].reshape(-1)
    count = int(ids.max()) + 1
    drawn = np.random.default_rng(zlib.crc32(key[0].encode()))
    weights = drawn.multinomial(count, np.full(count, 1 / count), size=NUM_RESAMPLES).astype(np.float64)
    sums = [_sums(run, ids, count) for run in runs]
    by_seed = np.stack([weights @ numerators / (weights @ denominators) for numerators, denominators in sums])
    if len(runs) == 1:
        return by_seed[0]
    seeds = np.random.default_rng(zlib.crc32(arm.name.encode())).integers(0, len(runs), (len(runs), NUM_RESAMPLES))
    return np.take_along_axis(by_seed, seeds, axis=0).mean(0)


def _sums(run: Parts, ids: np.ndarray, count: int) -> tuple[Floats, Floats]:
    return (
        np.bincount(ids, weights=run.numerator, minlength=count),
        np.bincount(ids, weights=run.denominator, minlength=count),
    )


def difference(arm: Arm, baseline: Arm, keys: Sequence[Key]) -> Interval:
    """Return `arm - baseline`, averaged over some figures.

    Raises:
        ValueError: the two were not judged on the same images.
    """
    for key in keys:
        if not np.array_equal(arm.rows(key), baseline.rows(key)):
            raise ValueError(f"{arm.name} and {baseline.name} were judged on other images of {key[0]}")
    value = np.mean([arm.values(key).mean() - baseline.values(key).mean() for key in keys])
    spread = np.mean([resampled(arm, key) - resampled(baseline, key) for key in keys], axis=0)
    return Interval(float(value), *(float(end) for end in np.quantile(spread, QUANTILES)))


def gap_closed(arm: Arm, initial: Arm, teacher: Arm, keys: Sequence[Key]) -> Interval:
    """Return the share of the way from the initialisation to the teacher that an arm has gone; 1 is the teacher."""

    def mean(side: Arm) -> float:
        return float(np.mean([side.values(key).mean() for key in keys]))

    def spread(side: Arm) -> Floats:
        return np.mean([resampled(side, key) for key in keys], axis=0)

    value = (mean(arm) - mean(initial)) / (mean(teacher) - mean(initial))
    shares = (spread(arm) - spread(initial)) / (spread(teacher) - spread(initial))
    return Interval(value, *(float(end) for end in np.quantile(shares, QUANTILES)))
