"""Patch features as colours, teacher and students in one basis, so that equal colours mean equal features.

The basis is the teacher's: its first three principal axes over the images of all domains, as red, green and blue.
An encoder of another width cannot be projected on them directly, so its patch tokens are first mapped to the teacher's
by a ridge regression fitted on other images than those shown. What a map shows of an encoder is therefore what can be
read from it linearly about the teacher's features; where nothing can, the map turns to one even tone, the mean token's.

Legend: N images, h x w and H x W the patch grids of an encoder and the teacher, D and E their widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.hidden_states import match_grids
from distill.probe.fidelity import RIDGE_STRENGTHS, RidgePath

NUM_AXES = 3
RANGE = (0.02, 0.98)
"""Quantiles of the teacher's projections that become the darkest and the brightest of each colour."""

_SELECT_EVERY = 4  # every fourth of the images for fitting chooses the ridge strength instead


@dataclass(frozen=True)
class SharedBasis:
    """The teacher's principal axes and the range of colours on them.

    Attributes:
        mean: `[E]`, float64.
        axes: `[E, 3]`, float64; columns of zeros where the teacher has fewer than three channels.
        low: `[3]`, projection that becomes 0.
        high: `[3]`, projection that becomes 1.
    """

    mean: Tensor
    axes: Tensor
    low: Tensor
    high: Tensor

    def colours(self, tokens: Tensor) -> Tensor:
        """Return tokens `[..., E]` as red, green and blue `[..., 3]`, float32 in [0, 1]."""
        projected = (tokens.double() - self.mean) @ self.axes
        span = self.high - self.low
        scaled = (projected - self.low) / torch.where(span > 0, span, torch.ones_like(span))
        return torch.where(span > 0, scaled, torch.full_like(scaled, 0.5)).clamp(0, 1).float()


def fit_basis(teacher: Tensor) -> SharedBasis:
    """Return the first three principal axes of the teacher's patch tokens, over all images together.

    Each axis points where its largest entry is positive, so the colours do not depend on the solver.

    Args:
        teacher: `[N, H, W, E]`.
    """
    tokens = teacher.flatten(0, 2)
    mean = tokens.double().mean(0)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for chunk in tokens.split(16_384):
        centred = chunk.double() - mean
        covariance += centred.T @ centred
    vectors = torch.linalg.eigh(covariance)[1].flip(1)[:, :NUM_AXES]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    axes = F.pad(vectors, (0, NUM_AXES - vectors.shape[1]))
    projected = torch.cat([(chunk.double() - mean) @ axes for chunk in tokens.split(16_384)])
    at = (torch.tensor(RANGE, dtype=torch.float64) * (len(projected) - 1)).round().long()
    low, high = projected.sort(0).values[at]
    return SharedBasis(mean, axes, low, high)


@dataclass(frozen=True)
class LinearMap:
    """An affine map from an encoder's tokens to the teacher's.

    Attributes:
        weight: `[D, E]`, float64.
        source_mean: `[D]`.
        target_mean: `[E]`.
        strength: the ridge strength that was chosen, as in `distill.probe.fidelity.RIDGE_STRENGTHS`.
    """

    weight: Tensor
    source_mean: Tensor
    target_mean: Tensor
    strength: float

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return tokens `[..., D]` mapped to `[..., E]`, float64."""
        return (tokens.double() - self.source_mean) @ self.weight + self.target_mean


def fit_map(source: Tensor, teacher: Tensor) -> LinearMap:
    """Fit the ridge regression from an encoder's patch tokens to the teacher's.

    Where grids differ, both are averaged to the coarser one for the fit; the map itself holds for single tokens. The
    strength is the one with the least squared error on every fourth image, which the fit does not see; with fewer
    than four images all are used for both.

    Args:
        source: `[N, h, w, D]`.
        teacher: `[N, H, W, E]`, of the same images.

    Raises:
        ValueError: the numbers of images differ, or there is none.
    """
    if len(source) != len(teacher) or not len(source):
        raise ValueError(
            f"{len(source)} and {len(teacher)} images: the map needs features of the same images, one or more"
        )
    x, y = (grid.flatten(1, 2) for grid in match_grids(source, teacher))
    chosen = torch.arange(len(x)) % _SELECT_EVERY == _SELECT_EVERY - 1
    fit, select = (~chosen, chosen) if chosen.any() else (~chosen, ~chosen)
    inputs, targets = x[fit].flatten(0, 1).double(), y[fit].flatten(0, 1).double()
    x_mean, y_mean = inputs.mean(0), targets.mean(0)
    path = RidgePath(inputs - x_mean, targets - y_mean)
    seen, wanted = x[select].flatten(0, 1).double() - x_mean, y[select].flatten(0, 1).double() - y_mean
    errors = {strength: float((seen @ path.weight(strength) - wanted).square().sum()) for strength in RIDGE_STRENGTHS}
    best = min(RIDGE_STRENGTHS, key=errors.__getitem__)
    return LinearMap(path.weight(best), x_mean, y_mean, best)


@dataclass(frozen=True)
class FeatureMaps:
    """One encoder's maps of the shown images.

    Attributes:
        colours: `[n, h, w, 3]`, float32 in [0, 1], on the encoder's own grid.
        agreement: for each shown image, the mean over patches of the cosine between mapped token and teacher token,
            both after the teacher's mean token was subtracted; 1 for the teacher itself.
    """

    colours: Tensor
    agreement: tuple[float, ...]


def shared_maps(teacher: Tensor, others: Sequence[Tensor], shown: Sequence[int]) -> list[FeatureMaps]:
    """Return the teacher's maps and then each other encoder's, all in the teacher's basis.

    Args:
        teacher: `[N, H, W, E]`, of the shown images and of those the linear maps are fitted on.
        others: `[N, h, w, D]` each, of the same images.
        shown: positions of the images to show. The fit uses the others; where there are none, it uses these.

    Raises:
        ValueError: an encoder's number of images differs from the teacher's.
    """
    basis = fit_basis(teacher)
    maps = [own_map(basis, teacher, shown)]
    return maps + [mapped_map(basis, source, teacher, shown) for source in others]


def own_map(basis: SharedBasis, teacher: Tensor, shown: Sequence[int]) -> FeatureMaps:
    """Return the teacher's maps in its own basis."""
    at = torch.tensor(list(shown), dtype=torch.long)
    return FeatureMaps(basis.colours(teacher[at]), (1.0,) * len(at))


def mapped_map(basis: SharedBasis, source: Tensor, teacher: Tensor, shown: Sequence[int]) -> FeatureMaps:
    """Return an encoder's maps in the teacher's basis, after a linear map that was fitted on the images not shown.

    Args:
        basis: from the teacher's tokens.
        source: `[N, h, w, D]`.
        teacher: `[N, H, W, E]`, of the same images.
        shown: positions of the images to show. The fit uses the others; where there are none, it uses these.

    Raises:
        ValueError: the numbers of images differ.
    """
    if len(source) != len(teacher):
        raise ValueError(f"{len(source)} and {len(teacher)} images: maps compare features of the same images")
    at = torch.tensor(list(shown), dtype=torch.long)
    rest = torch.ones(len(teacher), dtype=torch.bool)
    rest[at] = False
    if not rest.any():
        rest[at] = True
    mapped = fit_map(source[rest], teacher[rest])(source[at])
    return FeatureMaps(basis.colours(mapped), _agreement(mapped, teacher[at], basis.mean))


def _agreement(mapped: Tensor, teacher: Tensor, mean: Tensor) -> tuple[float, ...]:
    own, target = match_grids(mapped, teacher.double())
    cosine = F.cosine_similarity(own - mean, target - mean, dim=-1, eps=1e-12)
    return tuple(cosine.flatten(1).mean(1).tolist())
