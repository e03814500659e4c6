"""Effective rank: over how many directions the pooled features of images spread. Needs neither labels nor a teacher.

A student first learns its teacher's few largest directions. Its features then differ along few axes, which costs
nearest neighbours more than it costs a linear probe; this figure shows it without either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distill.probe.hsic import (
    MIN_IMAGES,
    NO_IMAGE,
    Estimate,
    centred_gram,
    jackknife_blocks,
    jackknife_half_width,
    leave_out_hsic,
    unit_features,
)
from distill.probe.intervals import FloatArray
from distill.probe.protocol import IntArray


def effective_rank(features: Tensor, groups: IntArray | None = None) -> Estimate | None:
    """Return the participation ratio of features' covariance: `(sum of eigenvalues)^2 / sum of squared eigenvalues`.

    It is D for D directions of equal variance, and 1 where all features lie on a line; unchanged by rotation,
    translation and uniform scaling. The sum of squares is the unbiased one of `leave_out_hsic`: the plain form cannot
    exceed the number of images, and is too small while they are few. RankMe (arXiv 2210.02885) asks the same of
    features as they are, whose mean is one direction more, and has no such correction.

    The interval is a jackknife that leaves out whole groups, up to 50 blocks of them.

    Args:
        features: `[n, D]`, pooled features.
        groups: `[n]`, the group of each image; None means that images are independent.

    Returns:
        None with fewer than four images, or where the features do not vary by more than chance.
    """
    if len(features) < MIN_IMAGES:
        return None
    blocks = [NO_IMAGE, *jackknife_blocks(len(features), groups)]
    gram = centred_gram(features)
    squares = leave_out_hsic(gram, gram, blocks)
    values = _leave_out_variance(features, blocks) ** 2 / np.where(squares > 0, squares, np.nan)
    value, half = float(values[0]), jackknife_half_width(values[1:])
    if np.isnan(value):
        return None
    if half is None:
        return Estimate(value, None, None)
    return Estimate(value, max(1.0, value - half), value + half)


def _leave_out_variance(features: Tensor, blocks: Sequence[IntArray]) -> FloatArray:
    """Total variance `[len(blocks)]`, the sum of the covariance's eigenvalues, of all images but each block's."""
    x = unit_features(features)
    norms, total = x.square().sum(1), x.sum(0)
    values = np.empty(len(blocks))
    for at, block in enumerate(blocks):
        out = torch.from_numpy(block)
        n, left = len(x) - len(block), total - x[out].sum(0)
        values[at] = float(norms.sum() - norms[out].sum() - left @ left / n) / (n - 1) if n > 1 else np.nan
    return values
