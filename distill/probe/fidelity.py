"""Fidelity: how much of the teacher's features can be read from an encoder's, by a linear map, on unseen images.

Figures that need no labels:

* `cosine_centred`: patch tokens of the encoder are mapped to the teacher's by closed-form ridge regression (fitted on
  the fit split, strength chosen on the select split) and compared on the test split. Patch tokens, because they are
  what a VLM's connector consumes. Both sides are centred by their domain's mean over the fit split, so the trivial
  prediction, the mean teacher feature, scores 0 by construction, and merely knowing the domain earns nothing. 1 means
  that the teacher's tokens are a linear function of the encoder's.
* `cosine_raw` and `relative_l2` of the same mapped tokens: the cosine with the means left in, which flatters whoever
  predicts the mean, and the norm of what the map leaves unexplained over the norm of the centred teacher tokens.
* `debiased_cka`: linear CKA of the pooled features, in the debiased form. The plain form tends to 1 whenever there are
  fewer images than channels, whatever the features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from distill.probe.hsic import (
    MIN_IMAGES,
    NO_IMAGE,
    Estimate,
    centred_gram,
    jackknife_blocks,
    jackknife_half_width,
    leave_out_hsic,
)
from distill.probe.intervals import FloatArray
from distill.probe.protocol import IntArray, Split

RIDGE_STRENGTHS = tuple(10.0**power for power in range(-7, 3))
"""Relative to the mean eigenvalue of the features' second-moment matrix."""

_CHUNK_TOKENS = 16_384  # rows held in float64 at a time


@dataclass(frozen=True)
class CosineResult:
    """Fidelity on the test split.

    Attributes:
        per_image: `[n_test]`, float64, mean centred cosine over the image's tokens, in the order of the test part;
            NaN for images of a domain that the fit split lacks.
        strength: the chosen ridge strength, relative as in `RIDGE_STRENGTHS`; None where no map was fitted.
        raw: `[n_test]`, likewise, mean cosine with the teacher's mean token put back on both sides.
        relative_l2: `[n_test]`, likewise, norm of the difference over the norm of the centred teacher tokens.
    """

    per_image: FloatArray
    strength: float | None
    raw: FloatArray
    relative_l2: FloatArray


class RidgePath:
    """Ridge regressions of `targets` on `features` for every strength, from one eigendecomposition.

    Args:
        features: `[n, D]`, centred.
        targets: `[n, E]`, centred.
    """

    def __init__(self, features: Tensor, targets: Tensor) -> None:
        gram = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
        cross = torch.zeros(features.shape[1], targets.shape[1], dtype=torch.float64)
        for x, y in zip(features.split(_CHUNK_TOKENS), targets.split(_CHUNK_TOKENS), strict=True):
            x64 = x.to(torch.float64)
            gram += x64.T @ x64
            cross += x64.T @ y.to(torch.float64)
        self._eigenvalues, self._basis = torch.linalg.eigh(gram)
        self._eigenvalues = self._eigenvalues.clamp_min(0)
        self._cross = self._basis.T @ cross

    def weight(self, strength: float) -> Tensor:
        """Return the map `[D, E]`, float64, that minimises `|XW - Y|^2 + strength * mean eigenvalue * |W|^2`."""
        scale = self._eigenvalues.mean().clamp_min(torch.finfo(torch.float64).tiny)
        return self._basis @ (self._cross / (self._eigenvalues + strength * scale)[:, None])


def cosine_centred(student: Tensor, teacher: Tensor, domains: IntArray, split: Split) -> CosineResult:
    """Map the encoder's tokens to the teacher's by ridge regression and compare them on the test split.

    Args:
        student: `[N, T, D]`, tokens of the encoder that is judged.
        teacher: `[N, T, E]`, the teacher's tokens at the same places of the same images.
        domains: `[N]`, domain number of each image.
        split: positions of fit, select and test images.

    Raises:
        ValueError: the images or tokens of the two do not match.
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(f"tokens {tuple(student.shape[:2])} and {tuple(teacher.shape[:2])} must be of the same images")
    (x, _), (y, means) = _centre(student, domains, split.fit), _centre(teacher, domains, split.fit)
    std = x[torch.from_numpy(split.fit)].flatten(0, 1).std(0, correction=0)
    x = x / torch.where(std > torch.finfo(torch.float32).eps, std, torch.ones_like(std))
    known = np.isin(domains, domains[split.fit])
    fit, test = torch.from_numpy(split.fit), torch.from_numpy(split.test)
    path = RidgePath(x[fit].flatten(0, 1), y[fit].flatten(0, 1))
    seen = torch.from_numpy(split.select[known[split.select]])
    scores = {
        strength: float(_token_cosine(x[seen], y[seen], path.weight(strength)).mean()) for strength in RIDGE_STRENGTHS
    }
    # max() keeps the first of equals; reversed, a tie goes to the stronger regularisation.
    best = max(reversed(RIDGE_STRENGTHS), key=scores.__getitem__) if len(seen) else RIDGE_STRENGTHS[-1]
    weight = path.weight(best)
    return _on_test(
        lambda tokens: tokens.to(torch.float64) @ weight, x[test], y[test], means[test], ~known[split.test], best
    )


def cosine_to_itself(augmented: Tensor, teacher: Tensor, domains: IntArray, split: Split) -> CosineResult:
    """Compare a teacher's tokens of augmented test images with those of the images as they are: fidelity's ceiling.

    No map is fitted, since both are in one basis; both are centred by the unaugmented domain means over the fit split.

    Args:
        augmented: `[n_test, T, E]`, tokens of the augmented test images.
        teacher: `[N, T, E]`, tokens of all images.
        domains: `[N]`, domain number of each image.
        split: positions of fit, select and test images.
    """
    y, means = _centre(teacher, domains, split.fit)
    test = torch.from_numpy(split.test)
    unknown = ~np.isin(domains, domains[split.fit])[split.test]
    return _on_test(
        lambda tokens: tokens.to(torch.float64), augmented - means[test], y[test], means[test], unknown, None
    )


def _on_test(
    predict: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    means: Tensor,
    unknown: NDArray[np.bool_],
    strength: float | None,
) -> CosineResult:
    """Compare predictions of centred tokens x `[n, T, D]` with the centred teacher tokens y `[n, T, E]`."""
    centred, raw, distance = (torch.empty(len(x), dtype=torch.float64) for _ in range(3))
    per_chunk = max(1, _CHUNK_TOKENS // max(1, x.shape[1]))
    for at in torch.arange(len(x)).split(per_chunk):
        guess, truth, mean = predict(x[at]), y[at].to(torch.float64), means[at].to(torch.float64)
        centred[at] = F.cosine_similarity(guess, truth, dim=-1, eps=1e-12).mean(1)
        raw[at] = F.cosine_similarity(guess + mean, truth + mean, dim=-1, eps=1e-12).mean(1)
        norm = truth.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        distance[at] = (guess - truth).flatten(1).norm(dim=1) / norm
    found = [values.numpy().copy() for values in (centred, raw, distance)]
    for values in found:
        values[unknown] = np.nan
    return CosineResult(found[0], strength, found[1], found[2])


def _centre(tokens: Tensor, domains: IntArray, fit: IntArray) -> tuple[Tensor, Tensor]:
    """Tokens less their domain's mean token over the fit split, and those means `[N, 1, D]`."""
    centred = tokens.clone()
    means = torch.zeros(len(tokens), 1, tokens.shape[2], dtype=tokens.dtype)
    for domain in np.unique(domains).tolist():
        members = fit[domains[fit] == domain]
        if len(members):
            at = torch.from_numpy(np.flatnonzero(domains == domain))
            mean = tokens[torch.from_numpy(members)].to(torch.float64).mean((0, 1))
            centred[at] -= mean.to(tokens.dtype)
            means[at] = mean.to(tokens.dtype)
    return centred, means


def _token_cosine(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Mean cosine over tokens of each image `[n]`, float64; a zero vector has cosine 0."""
    per_chunk = max(1, _CHUNK_TOKENS // max(1, x.shape[1]))
    means = [
        F.cosine_similarity(a.to(torch.float64) @ weight, b.to(torch.float64), dim=-1, eps=1e-12).mean(1)
        for a, b in zip(x.split(per_chunk), y.split(per_chunk), strict=True)
    ]
    return torch.cat(means)


def debiased_cka(a: Tensor, b: Tensor, groups: IntArray | None = None) -> Estimate | None:
    """Linear CKA `[-1, 1]` with the unbiased HSIC estimator; 0 in expectation for independent features.

    Sources: Kornblith et al. 2019 (arXiv 1905.00414) for CKA, Song et al. 2012 (JMLR 13:1393, equation 5) for the
    estimator, Nguyen et al. 2020 (arXiv 2010.15327) for the two together. Computed in float64. Unchanged by rotation,
    translation and uniform scaling of either side; not by a general linear map.

    The interval is a jackknife that leaves out whole groups, up to 50 blocks of them. A bootstrap would not do: an
    image that is drawn twice is similar to itself, which is what the debiased form leaves out.

    Args:
        a: `[n, D]`, pooled features.
        b: `[n, E]`, pooled features of the same images.
        groups: `[n]`, the group of each image; None means that images are independent.

    Returns:
        The value, or None when there are fewer than four images or a side does not vary.

    Raises:
        ValueError: the numbers of images differ.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} images: CKA compares features of the same images")
    if len(a) < MIN_IMAGES:
        return None
    blocks = jackknife_blocks(len(a), groups)
    values = _leave_out_cka(centred_gram(a), centred_gram(b), [NO_IMAGE, *blocks])
    value, half = float(values[0]), jackknife_half_width(values[1:])
    if np.isnan(value):
        return None
    if half is None:
        return Estimate(value, None, None)
    return Estimate(value, max(-1.0, value - half), min(1.0, value + half))


def _leave_out_cka(gram_a: FloatArray, gram_b: FloatArray, blocks: Sequence[IntArray]) -> FloatArray:
    """CKA `[len(blocks)]` of all images but each block's; NaN where too few are left or a side does not vary."""
    own_a, own_b = leave_out_hsic(gram_a, gram_a, blocks), leave_out_hsic(gram_b, gram_b, blocks)
    varies = (own_a > 0) & (own_b > 0)
    scale = np.sqrt(np.where(varies, own_a * own_b, np.nan))
    return np.clip(leave_out_hsic(gram_a, gram_b, blocks) / scale, -1.0, 1.0)
