"""Multinomial logistic regression on a fixed set of features, for one strength of regularisation after another.

The objective is scikit-learn's, `|W|^2 / 2 + C * sum of cross-entropies`, with a bias that is not penalised; inside it
is divided by `C * N`. What makes it quick on many features:

- Gradients are written by hand: two matrix products an evaluation, over blocks of rows that stay in the cache.
- Weights are kept along the principal directions of the features. There the Hessian is near a diagonal that is known
  beforehand (variance times mean p (1 - p), plus the penalty; Böhning 1992, "Multinomial logistic regression
  algorithm", bounds it the same way), and L-BFGS starts from that diagonal. The features themselves are not rotated.
- A solution for one C starts the next, and so do L-BFGS's pairs, corrected for the changed penalty.
- With fewer images than channels the weights live in the span of the images, which is exact.

Products run in the features' own precision; weights, sums and the solver's vectors are float64.

Legend: N images, D channels, K classes, R directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.probe.lbfgs import Memory, Point, largest_entry, minimise

_BLOCK_BYTES = 8 << 20  # rows at a time: features of a block are read twice, the second time from the cache
_BASIS_ROWS = 16  # a basis is found on at most this many rows a channel: it only has to be close
_CURVATURE_ROWS = 4096

SMALL_LOSS = 0.1
"""In nats an image: below it a tolerance on the gradient is relative. On features that separate the classes, weak
regularisation lets loss and gradient fall towards zero together, and a fixed tolerance would end all such fits at the
first of them."""


@dataclass(frozen=True)
class LogisticModel:
    """A fitted classifier.

    Attributes:
        weight: `[K, D]`.
        bias: `[K]`.
        c: inverse regularisation strength, in scikit-learn's convention.
        objective: `|W|^2 / 2 + C * sum of cross-entropies` at the solution.
        gradient_norm: largest entry of the objective's gradient divided by `C * N`, what scikit-learn calls `tol`.
    """

    weight: Tensor
    bias: Tensor
    c: float
    objective: float
    gradient_norm: float = math.nan

    def logits(self, features: Tensor) -> Tensor:
        """Scores `[N, K]` of features `[N, D]`."""
        return F.linear(features.to(self.weight), self.weight, self.bias)


@dataclass(frozen=True)
class Basis:
    """Orthonormal directions that the weights are written in.

    Attributes:
        directions: `[D, R]`.
        variances: `[R]`, variance of the features along each.
        is_complete: whether `R` is `D`, so that the basis serves other images as well.
    """

    directions: Tensor
    variances: Tensor
    is_complete: bool


def principal_basis(features: Tensor) -> Basis:
    """Return the principal directions of features `[N, D]`; with `N <= D` only those that the images span."""
    n, dim = features.shape
    if n > dim:
        rows = _some_rows(features, _BASIS_ROWS * dim)
        centred = rows - rows.mean(0)
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
        return Basis(directions, variances.clamp_min(0), is_complete=True)
    centred = (features - features.mean(0)).double()
    squares, left = torch.linalg.eigh(centred @ centred.T)
    kept = squares > squares[-1].clamp_min(1e-30) * 1e-12
    directions = torch.linalg.qr(centred.T @ (left[:, kept] / squares[kept].sqrt())).Q
    return Basis(directions.to(features), (squares[kept] / n).to(features), is_complete=False)


def _some_rows(features: Tensor, count: int) -> Tensor:
    """Return at most `count` rows, the same ones each time; drawn, because a stride may meet one class only."""
    if len(features) <= count:
        return features
    drawn = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:count]
    return features[drawn.sort().values.to(features.device)]


class LogisticProblem:
    """The regression of targets on features, solved for any C.

    Args:
        features: `[N, D]`, float32 or float64, best standardised.
        targets: `[N]`, int64, in [0, num_classes).
        num_classes: number of classes, K.
        basis: directions found on features of the same kind; None finds them.

    Raises:
        ValueError: a target is out of range, or there is none.
    """

    def __init__(self, features: Tensor, targets: Tensor, num_classes: int, basis: Basis | None = None) -> None:
        if len(targets) == 0 or int(targets.min()) < 0 or int(targets.max()) >= num_classes:
            raise ValueError(f"targets must be non-empty and lie in [0, {num_classes})")
        self._features, self._targets, self._num_classes = features.detach(), targets, num_classes
        self.basis = basis if basis is not None and basis.is_complete else principal_basis(self._features)
        self._mean = self._features.mean(0, dtype=torch.float64)
        self._memory = Memory()
        self._memory_penalty = 0.0

    def solve(self, c: float, start: LogisticModel | None, *, tolerance: float, max_iter: int) -> LogisticModel:
        """Return the solution for one C.

        Args:
            c: inverse regularisation strength, above 0.
            start: a solution to start from; None starts from zero.
            tolerance: stops when no entry of the gradient of the objective divided by `C * N` is larger; in proportion
                to the objective where that is below `SMALL_LOSS`.
            max_iter: limit on the steps.

        Raises:
            ValueError: `c` is not above 0.
        """
        if c <= 0:
            raise ValueError(f"c {c} is not above 0; small values regularise strongly")
        n = len(self._targets)
        penalty = 1.0 / (c * n)
        parameters = self._parameters(start)
        inverse_curvature = 1.0 / self._curvature(parameters, penalty)
        extra = torch.full_like(parameters, penalty - self._memory_penalty)
        extra[:, -1] = 0
        self._memory.shift(extra)
        self._memory_penalty = penalty
        point = minimise(
            lambda at: self._evaluate(at, penalty),
            parameters,
            inverse_curvature,
            self._memory,
            tolerance=tolerance,
            max_iter=max_iter,
            rounding=torch.finfo(self._features.dtype).eps,
            small_value=SMALL_LOSS,
        )
        weight, bias = self._weights(point.parameters)
        return LogisticModel(weight, bias.to(weight), c, point.value * c * n, point.largest)

    def _parameters(self, start: LogisticModel | None) -> Tensor:
        """Coordinates `[K, R + 1]`, float64; the last column is the bias at the mean of the features."""
        directions = self.basis.directions
        if start is None:
            return directions.new_zeros(self._num_classes, directions.shape[1] + 1, dtype=torch.float64)
        bias = start.bias.double() + start.weight.double() @ self._mean
        return torch.cat([(start.weight.to(directions) @ directions).double(), bias[:, None]], dim=1)

    def _weights(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Weight `[K, D]` in the features' precision and bias `[K]`, float64."""
        directions = self.basis.directions
        weight = parameters[:, :-1].to(directions) @ directions.T
        return weight, parameters[:, -1] - weight.double() @ self._mean

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = max(256, _BLOCK_BYTES // (self._features.shape[1] * self._features.element_size()))
        yield from zip(self._features.split(rows), self._targets.split(rows), strict=True)

    def _evaluate(self, parameters: Tensor, penalty: float) -> Point:
        weight, bias = self._weights(parameters)
        bias = bias.to(weight)
        loss = parameters.new_zeros(())
        residuals = torch.zeros_like(parameters[:, -1])
        products = torch.zeros_like(weight, dtype=torch.float64)
        for x, y in self._blocks():
            log_probabilities = F.linear(x, weight, bias).log_softmax(1)
            loss -= log_probabilities.gather(1, y[:, None]).sum(dtype=torch.float64)
            residual = log_probabilities.exp_()
            residual.scatter_add_(1, y[:, None], residual.new_full((len(y), 1), -1.0))
            residuals += residual.sum(0, dtype=torch.float64)
            products += residual.T @ x
        n = len(self._targets)
        slope = products / n + penalty * weight
        centred = (products - residuals[:, None] * self._mean) / n
        coordinates = (centred.to(weight) @ self.basis.directions).double() + penalty * parameters[:, :-1]
        gradient = torch.cat([coordinates, residuals[:, None] / n], dim=1)
        value = float(loss) / n + penalty / 2 * float(parameters[:, :-1].square().sum())
        return Point(parameters, value, gradient, largest_entry(slope, residuals / n))

    def _curvature(self, parameters: Tensor, penalty: float) -> Tensor:
        """Diagonal `[K, R + 1]` of the objective's Hessian, as if p (1 - p) did not depend on the image."""
        weight, bias = self._weights(parameters)
        rows = _some_rows(self._features, _CURVATURE_ROWS)
        probabilities = F.linear(rows, weight, bias.to(weight)).softmax(1)
        spread = (probabilities * (1 - probabilities)).mean(0).double().clamp_min(1e-6)
        along = spread[:, None] * self.basis.variances.double() + penalty
        return torch.cat([along, spread[:, None]], dim=1)
