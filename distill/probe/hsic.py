"""The unbiased HSIC of features, of all images and with blocks of images left out, and the jackknife's interval.

HSIC is the squared Frobenius norm of the covariance of two sides' features; of one side with itself, the sum of the
squared eigenvalues of its covariance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.probe.intervals import Z95, FloatArray
from distill.probe.protocol import IntArray

MIN_IMAGES = 4
"""The unbiased estimator divides by n(n - 3)."""

MAX_BLOCKS = 50
MIN_BLOCKS = 5

NO_IMAGE: IntArray = np.empty(0, dtype=np.int64)
"""The block that leaves out nothing."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval, which is None where too few groups were seen."""

    value: float
    low: float | None
    high: float | None


def jackknife_blocks(n: int, groups: IntArray | None) -> list[IntArray]:
    """Return up to 50 blocks of positions that together are all `n` images; images of a group share a block.

    Args:
        n: images.
        groups: `[n]`, the group of each image; None means that images are independent.
    """
    ids = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1)
    count = min(int(ids.max()) + 1, MAX_BLOCKS)
    return [np.flatnonzero(ids % count == block) for block in range(count)]


def jackknife_half_width(left_out: FloatArray) -> float | None:
    """Return half the 95 % interval of a figure.

    Args:
        left_out: `[B]`, the figure with each block left out.

    Returns:
        None with fewer than five blocks, or where one has no figure.
    """
    if len(left_out) < MIN_BLOCKS or np.isnan(left_out).any():
        return None
    return Z95 * float(np.std(left_out) * np.sqrt(len(left_out) - 1))


def unit_features(features: Tensor) -> Tensor:
    """Return features `[n, D]` as float64, less their mean, all together of norm 1: it keeps the sums small."""
    x = features.to(torch.float64)
    x = x - x.mean(0)
    return x / x.norm().clamp_min(torch.finfo(torch.float64).tiny)


def centred_gram(features: Tensor) -> FloatArray:
    """Return the Gram matrix `[n, n]` of `unit_features`, with a zero diagonal."""
    x = unit_features(features)
    return (x @ x.T).fill_diagonal_(0).numpy()


def leave_out_hsic(k: FloatArray, m: FloatArray, blocks: Sequence[IntArray]) -> FloatArray:
    """Return the unbiased HSIC `[len(blocks)]` of all images but each block's, in O(n^2) for all blocks together.

    Source: Song et al. 2012 (JMLR 13:1393, equation 5). Centring the features changes nothing.

    Args:
        k: `[n, n]`, Gram matrix of one side with a zero diagonal.
        m: `[n, n]`, likewise of the other.
        blocks: positions.

    Returns:
        NaN where fewer than four images are left.
    """
    product = k * m
    total, k_rows, m_rows = product.sum(), k.sum(0), m.sum(0)
    values = np.full(len(blocks), np.nan)
    for at, block in enumerate(blocks):
        n = len(k) - len(block)
        if n < MIN_IMAGES:
            continue
        trace = total - 2 * product[block].sum() + product[np.ix_(block, block)].sum()
        left_k, left_m = np.delete(k_rows - k[block].sum(0), block), np.delete(m_rows - m[block].sum(0), block)
        sums = left_k.sum() * left_m.sum() / ((n - 1) * (n - 2))
        values[at] = (trace + sums - 2.0 / (n - 2) * (left_k @ left_m)) / (n * (n - 3))
    return values
