"""The difference of two encoders' figures on the same images, with a bootstrap interval over images or groups.

A figure is a mean of ratios of sums over images (`distill.probe.rung`), so a resample draws images, or whole groups of
them, once for both encoders, adds up each side's parts, and takes the difference of the two figures: Miller 2024,
"Adding error bars to evals" (arXiv 2411.00640), section 4, for means; the percentile bootstrap for ratios.

Legend: n images, G clusters, R resamples, C columns of a figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from distill.probe.intervals import NUM_RESAMPLES, FloatArray
from distill.probe.rung import Kind, PerImage, figures_of_sums, ratio_of_sums

MIN_CLUSTERS = 5
"""Fewer independent images or groups than this give an interval that is far too narrow, so none is given."""

Verdict = Literal["better", "worse", "not distinguishable"]
_QUANTILES = (0.025, 0.975)
_BLOCK = 2_000_000


@dataclass(frozen=True)
class PairedFigure:
    """Two figures over the same images and their difference `value - baseline`.

    Attributes:
        value: of the encoder that is judged.
        baseline: of the encoder it is compared with.
        difference: `value - baseline`.
        low: lower end of the 95 % interval of the difference; None with fewer than `MIN_CLUSTERS` clusters.
        high: its upper end.
        n: images.
        num_clusters: images or groups that were resampled.
    """

    value: float
    baseline: float
    difference: float
    low: float | None
    high: float | None
    n: int
    num_clusters: int

    def verdict(self, *, lower_is_better: bool) -> Verdict:
        """Return "better" or "worse" only where the interval leaves out zero."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "not distinguishable"
        return "better" if (self.low > 0) != lower_is_better else "worse"


def restrict(parts: PerImage, keep: NDArray[np.bool_]) -> PerImage:
    """Return the parts of the images that `keep` `[n]` marks."""
    domains = None if parts.domains is None else parts.domains[keep]
    return PerImage(parts.rows[keep], parts.numerator[keep], parts.denominator[keep], parts.groups[keep], domains)


def paired_figure(
    a: PerImage,
    b: PerImage,
    kind: Kind,
    *,
    clustered: bool = True,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> PairedFigure:
    """Compare two encoders on the same images.

    Args:
        a: parts of the encoder that is judged.
        b: parts of the encoder it is compared with, of the same images in the same order.
        kind: of the figure.
        clustered: whether whole groups are resampled, instead of single images.
        seed: of the resampling.
        num_resamples: how many resamples the percentiles are read from.

    Raises:
        ValueError: the images differ, or nothing has a denominator.
    """
    if not np.array_equal(a.rows, b.rows):
        raise ValueError("a paired difference needs the same images in the same order")
    value, baseline = (ratio_of_sums(side.numerator, side.denominator, kind) for side in (a, b))
    ids = a.groups if clustered else np.arange(len(a.rows))
    ids = np.unique(ids, return_inverse=True)[1].reshape(-1)
    clusters = int(ids.max()) + 1
    low = high = None
    if clusters >= MIN_CLUSTERS:
        sums = [_cluster_sums(part, ids, clusters) for side in (a, b) for part in (side.numerator, side.denominator)]
        low, high = _interval(sums, kind, seed, num_resamples)
    return PairedFigure(value, baseline, value - baseline, low, high, len(a.rows), clusters)


def _cluster_sums(values: FloatArray, ids: NDArray[np.int64], clusters: int) -> FloatArray:
    """Sums `[G, C]` of values `[n, C]`."""
    sums = np.zeros((clusters, values.shape[1]))
    np.add.at(sums, ids, values)
    return sums


def _interval(sums: list[FloatArray], kind: Kind, seed: int, num_resamples: int) -> tuple[float, float]:
    """Ends of the interval, from the cluster sums of numerator and denominator of either encoder."""
    clusters = len(sums[0])
    generator = np.random.default_rng(seed)
    differences: list[FloatArray] = []
    block = max(1, _BLOCK // clusters)
    shares = np.full(clusters, 1 / clusters)
    for start in range(0, num_resamples, block):
        weights = generator.multinomial(clusters, shares, size=min(block, num_resamples - start)).astype(np.float64)
        drawn = [weights @ part for part in sums]
        differences.append(figures_of_sums(drawn[0], drawn[1], kind) - figures_of_sums(drawn[2], drawn[3], kind))
    # A resample in which nothing has a denominator has no figure; it is as rare as it is empty.
    low, high = np.nanquantile(np.concatenate(differences), _QUANTILES)
    return float(low), float(high)
