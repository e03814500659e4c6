"""Linear probe: multinomial logistic regression by L-BFGS on frozen features, regularisation chosen on held-out images.

The objective is scikit-learn's, `|W|^2 / 2 + C * sum of cross-entropies`, with a bias that is not penalised, so a C
means the same here and there. The path runs from strong to weak regularisation and each fit starts from the last:
half the work of cold starts. C is searched as for CLIP (Radford et al. 2021, arXiv 2103.00020, appendix A.3): coarse
first, then finer around the best.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.probe.protocol import Split

COARSE_CS = tuple(10.0**power for power in range(-6, 5))
"""A decade apart, strong to weak. The end is below DINOv2's 1e5: on standardised features that is unregularised."""

FINE_FACTORS = (10.0**-0.75, 10.0**-0.5, 10.0**-0.25, 10.0**0.25, 10.0**0.5, 10.0**0.75)
"""Quarter decades on both sides of the best coarse C."""

PATH_TOLERANCE = 1e-4
"""For the fits that only choose C: scikit-learn's default. The last fit is held to a hundredth of it."""


@dataclass(frozen=True)
class LogisticModel:
    """A fitted classifier.

    Attributes:
        weight: `[K, D]`.
        bias: `[K]`.
        c: inverse regularisation strength, in scikit-learn's convention.
        objective: `|W|^2 / 2 + C * sum of cross-entropies` at the solution.
    """

    weight: Tensor
    bias: Tensor
    c: float
    objective: float

    def logits(self, features: Tensor) -> Tensor:
        """Scores `[N, K]` of features `[N, D]`."""
        return F.linear(features.to(self.weight), self.weight, self.bias)


@dataclass(frozen=True)
class LinearResult:
    """What the linear probe found.

    Attributes:
        c: the chosen C.
        predictions: `[n_test]`, int64, in the order of the split's test part.
        path: every C that was tried, with its accuracy on the selection split.
    """

    c: float
    predictions: Tensor
    path: tuple[tuple[float, float], ...]


def fit_logistic(
    features: Tensor,
    targets: Tensor,
    *,
    num_classes: int,
    c: float,
    start: LogisticModel | None = None,
    max_iter: int = 1000,
    tolerance: float = 1e-6,
) -> LogisticModel:
    """Fit multinomial logistic regression by full-batch L-BFGS with a strong-Wolfe line search, in float64.

    Args:
        features: `[N, D]`, best standardised.
        targets: `[N]`, int64, in [0, num_classes).
        num_classes: number of classes, K.
        c: inverse regularisation strength, above 0.
        start: a solution to start from; None starts from zero.
        max_iter: limit on the iterations.
        tolerance: stops when no entry of the gradient of the objective divided by `C * N` is larger.

    Raises:
        ValueError: `c` is not above 0, or a target is out of range.
    """
    if c <= 0:
        raise ValueError(f"c {c} is not above 0; small values regularise strongly")
    if len(targets) == 0 or int(targets.min()) < 0 or int(targets.max()) >= num_classes:
        raise ValueError(f"targets must be non-empty and lie in [0, {num_classes})")
    # float64: in float32 the line search stalls before the tolerance on weakly regularised, separable data.
    x = features.detach().to(torch.float64)
    penalty = 1.0 / (2.0 * c * len(x))
    weight = x.new_zeros(num_classes, x.shape[1]) if start is None else start.weight.clone()
    bias = x.new_zeros(num_classes) if start is None else start.bias.clone()
    weight.requires_grad_()
    bias.requires_grad_()
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        max_eval=max_iter * 5 // 4,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), targets) + penalty * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
        objective = float(closure().detach()) * c * len(x)
    return LogisticModel(weight.detach(), bias.detach(), c, objective)


def standardise(features: Tensor, fit: Tensor) -> Tensor:
    """Return the features `[N, D]` less the mean of `fit` `[n, D]`, divided by its standard deviation, in float64.

    A channel that is constant over `fit` is only centred.
    """
    reference = fit.to(torch.float64)
    std = reference.std(0, correction=0)
    std = torch.where(std > torch.finfo(torch.float32).eps, std, torch.ones_like(std))
    return (features.to(torch.float64) - reference.mean(0)) / std


def linear_probe(features: Tensor, targets: Tensor, split: Split, *, num_classes: int) -> LinearResult:
    """Choose C on the selection split, refit on fit and select, and predict the test split once.

    Features are standardised by the fit split. The highest accuracy wins; a tie goes to the lower cross-entropy.

    Args:
        features: `[N, D]`, frozen features.
        targets: `[N]`, int64 classes, all labelled.
        split: positions of fit, select and test images.
        num_classes: number of classes; each has to appear in the fit split.
    """
    fit, select, test = (torch.from_numpy(part) for part in (split.fit, split.select, split.test))
    x = standardise(features, features[fit])
    x_fit, y_fit, x_select, y_select = x[fit], targets[fit], x[select], targets[select]
    models: dict[float, LogisticModel] = {}
    scores: dict[float, tuple[float, float]] = {}

    def try_path(cs: tuple[float, ...], start: LogisticModel | None) -> float:
        for c in cs:
            start = models[c] = fit_logistic(
                x_fit, y_fit, num_classes=num_classes, c=c, start=start, tolerance=PATH_TOLERANCE
            )
            logits = start.logits(x_select)
            accuracy = float((logits.argmax(1) == y_select).double().mean())
            scores[c] = (accuracy, -float(F.cross_entropy(logits, y_select)))
        return max(scores, key=scores.__getitem__)

    coarse = try_path(COARSE_CS, None)
    best = try_path(tuple(coarse * factor for factor in FINE_FACTORS), models.get(coarse / 10, models[coarse]))
    both = torch.cat([fit, select])
    final = fit_logistic(x[both], targets[both], num_classes=num_classes, c=best, start=models[best])
    path = tuple((c, scores[c][0]) for c in sorted(scores))
    return LinearResult(best, final.logits(x[test]).argmax(1), path)
