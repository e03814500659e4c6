"""A rung's figure as probe.json holds it: overall and for each domain, with n, seed and a 95 % interval.

Right-or-wrong answers get Wilson's interval, everything else a bootstrap over images, or over whole groups of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.probe.intervals import NUM_RESAMPLES, FloatArray, wilson
from distill.probe.paired_ratio import MIN_CLUSTERS, paired_figure, restrict
from distill.probe.rung import LOWER_IS_BETTER, PerImage, RungScore, figures_of_sums, ratio_of_sums

OVERALL = "overall"
_QUANTILES = (0.025, 0.975)
_BLOCK = 2_000_000

Ends = tuple[float | None, float | None]


def figure_interval(score: RungScore, *, seed: int, num_resamples: int = NUM_RESAMPLES) -> Ends:
    """Return the ends of the 95 % interval of a score's figure; (None, None) with fewer than five groups of images.

    Args:
        score: the figure; its `per_image` may be restricted to a domain, its `draws` likewise.
        seed: of the resampling.
        num_resamples: how many resamples the percentiles are read from.
    """
    parts = score.per_image
    is_plain = score.kind == "accuracy" and parts.numerator.shape[1] == 1 and score.draws is None
    if is_plain and bool((parts.denominator == 1).all()) and bool(np.isin(parts.numerator, (0, 1)).all()):
        interval = wilson(parts.numerator[:, 0] == 1, parts.groups)
        return interval.low, interval.high
    ids = np.unique(parts.groups, return_inverse=True)[1].reshape(-1)
    clusters = int(ids.max()) + 1
    if clusters < MIN_CLUSTERS:
        return None, None
    figures = _resampled(score, ids, clusters, np.random.default_rng(seed), num_resamples)
    low, high = np.nanquantile(figures, _QUANTILES)
    # A calibration error is a sum of absolute values, which resampling inflates: its interval may miss the value.
    value = ratio_of_sums(parts.numerator, parts.denominator, score.kind)
    return min(float(low), value), max(float(high), value)


def _resampled(
    score: RungScore, ids: NDArray[np.int64], clusters: int, generator: np.random.Generator, num_resamples: int
) -> FloatArray:
    """Figures `[R]` of images drawn anew by whole groups and, where there are draws, of draws drawn anew."""
    denominator = _sums(score.per_image.denominator, ids, clusters)
    values = score.per_image.numerator if score.draws is None else score.draws.T
    numerator = _sums(values, ids, clusters)
    found: list[FloatArray] = []
    block = max(1, _BLOCK // clusters)
    shares = np.full(clusters, 1 / clusters)
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        weights = generator.multinomial(clusters, shares, size=size).astype(np.float64)
        above = weights @ numerator
        if score.draws is not None:
            picked = generator.integers(above.shape[1], size=above.shape)
            above = np.take_along_axis(above, picked, axis=1).mean(1, keepdims=True)
        found.append(figures_of_sums(above, weights @ denominator, score.kind))
    return np.concatenate(found)


def _sums(values: FloatArray, ids: NDArray[np.int64], clusters: int) -> FloatArray:
    sums = np.zeros((clusters, values.shape[1]))
    np.add.at(sums, ids, values)
    return sums


def scopes_of(score: RungScore) -> list[tuple[str, RungScore]]:
    """Return a score overall and restricted to each domain that counts in it."""
    found = [(OVERALL, score)]
    domains = score.per_image.domains
    if domains is not None:
        for position, name in enumerate(score.domain_names):
            keep = domains == position
            if keep.any() and (score.per_image.denominator[keep] > 0).any():
                found.append((name, _restricted(score, keep)))
    return found


def _restricted(score: RungScore, keep: NDArray[np.bool_]) -> RungScore:
    draws = None if score.draws is None else score.draws[:, keep]
    return replace(score, per_image=restrict(score.per_image, keep), draws=draws)


def score_entries(score: RungScore, *, seed: int) -> list[dict[str, Any]]:
    """Return the entries of an encoder's "scores" in probe.json: one for each scope.

    Args:
        score: the figure.
        seed: of the resampling, recorded beside the figure.
    """
    entries: list[dict[str, Any]] = []
    for scope, part in scopes_of(score):
        low, high = figure_interval(part, seed=seed)
        entries.append(
            {
                "metric": score.metric,
                "scope": scope,
                "at": None if score.at is None else list(score.at),
                "value": ratio_of_sums(part.per_image.numerator, part.per_image.denominator, score.kind),
                "low": low,
                "high": high,
                "n": len(part.per_image.rows),
                "seed": seed,
                "settings": dict(score.settings),
            }
        )
    return entries


def paired_entries(a: RungScore, b: RungScore, names: tuple[str, str], *, seed: int) -> list[dict[str, Any]]:
    """Return the entries of "paired" in probe.json: the differences `a - b`, overall and for each domain.

    Args:
        a: figure of the encoder that is judged.
        b: the same figure of the encoder it is compared with; nothing is returned where the images differ.
        names: of the two encoders.
        seed: of the resampling.
    """
    if a.data != b.data or not np.array_equal(a.per_image.rows, b.per_image.rows):
        return []
    others = dict(scopes_of(b))
    found: list[dict[str, Any]] = []
    for scope, mine in scopes_of(a):
        if scope not in others:
            continue
        pair = paired_figure(mine.per_image, others[scope].per_image, a.kind, seed=seed)
        found.append(
            {
                "metric": a.metric,
                "scope": scope,
                "at": None if a.at is None else list(a.at),
                "a": names[0],
                "b": names[1],
                "difference": pair.difference,
                "low": pair.low,
                "high": pair.high,
                "n": pair.n,
                "verdict": pair.verdict(lower_is_better=a.kind in LOWER_IS_BETTER),
            }
        )
    return found


def one_value_each(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return numerator and denominator `[n, 1]` of a mean of one value an image `[n]`."""
    column = np.asarray(values, dtype=np.float64)[:, None]
    return column, np.ones_like(column)


def parts_of(
    values: FloatArray,
    rows: NDArray[np.int64],
    groups: NDArray[np.int64],
    domains: NDArray[np.int64] | None,
) -> PerImage:
    """Return the parts of a mean of one value an image `[n]`; values that are NaN leave their image out."""
    known = ~np.isnan(values)
    numerator, denominator = one_value_each(values[known])
    return PerImage(rows[known], numerator, denominator, groups[known], None if domains is None else domains[known])
