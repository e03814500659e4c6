"""Linear probe: multinomial logistic regression by L-BFGS on frozen features, regularisation chosen on held-out images.

The objective is scikit-learn's, so a C means the same here and there (`distill/probe/logistic.py` has the solver). C is
searched as for CLIP (Radford et al. 2021, arXiv 2103.00020, appendix A.3): coarse first, then finer around the best;
the path runs from strong to weak regularisation and each fit starts from the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.probe.classification import Classified, accuracy, best_setting, positions_of, require_classifiable
from distill.probe.logistic import LogisticModel, LogisticProblem
from distill.probe.protocol import Split

COARSE_CS = tuple(10.0**power for power in range(-6, 5))
"""A decade apart, strong to weak. The end is below DINOv2's 1e5: on standardised features that is unregularised."""

FINE_FACTORS = (10.0**-0.75, 10.0**-0.5, 10.0**-0.25, 10.0**0.25, 10.0**0.5, 10.0**0.75)
"""Quarter decades on both sides of the best coarse C."""

PATH_TOLERANCE = 5e-5
"""For the fits that only choose C: half of scikit-learn's default, in the same unit, because a warm start may stop just
inside a tolerance that a cold one jumps over. Relative for small losses, see `logistic.SMALL_LOSS`."""

FINAL_TOLERANCE = 1e-5
"""For the fit that is scored: a tenth of scikit-learn's default. Single precision itself ends between 1e-8 and 2e-6."""

MAX_ITER = 1000
"""CLIP's and DINOv2's limit."""


@dataclass(frozen=True)
class LinearResult(Classified):
    """What the linear probe found.

    Attributes:
        c: the chosen C.
        path: every C that was tried, with its accuracy on the selection split.
        objective: `|W|^2 / 2 + C * sum of cross-entropies` of the scored classifier.
        gradient_norm: largest entry of that objective's gradient divided by `C * N`.
        select_logits: `[n_select, K]`, of the classifier of this C that was fitted on the fit split alone: what a
            temperature may be fitted on.
        test_logits: `[n_test, K]`, of the scored classifier.
        model: the scored classifier, for features standardised by the fit split.
    """

    c: float
    path: tuple[tuple[float, float], ...]
    objective: float
    gradient_norm: float
    select_logits: Tensor
    test_logits: Tensor
    model: LogisticModel

    @property
    def settings(self) -> dict[str, Any]:
        """The chosen C and how well the scored fit converged."""
        return {"C": self.c, "objective": self.objective, "gradient_norm": self.gradient_norm}


def fit_path(
    problem: LogisticProblem,
    cs: Sequence[float],
    *,
    start: LogisticModel | None = None,
    tolerance: float = PATH_TOLERANCE,
    max_iter: int = MAX_ITER,
) -> Iterator[LogisticModel]:
    """Yield the solution for each C in turn, each started from the one before; ascending Cs are quickest.

    Args:
        problem: the features and targets.
        cs: inverse regularisation strengths, above 0.
        start: a solution to start the first from.
        tolerance: stops a fit when no entry of the gradient of the objective divided by `C * N` is larger.
        max_iter: limit on the iterations of a fit.

    Raises:
        ValueError: a C is not above 0.
    """
    for c in cs:
        start = problem.solve(c, start, tolerance=tolerance, max_iter=max_iter)
        yield start


def standardise(features: Tensor, fit: Tensor) -> Tensor:
    """Return the features `[N, D]` less the mean of `fit` `[n, D]`, divided by its standard deviation.

    Statistics are computed in float64; the result is float32, or float64 for float64 features. A channel that is
    constant over `fit` is only centred.
    """
    variance, mean = torch.var_mean(fit.double(), dim=0, correction=0)
    std = variance.sqrt()
    std = torch.where(std > torch.finfo(torch.float32).eps, std, torch.ones_like(std))
    values = _floating(features)
    return (values - mean.to(values)).div_(std.to(values))


def linear_probe(features: Tensor, targets: Tensor, split: Split, *, num_classes: int) -> LinearResult:
    """Choose C on the selection split, refit on fit and select, and predict the test split once.

    Features are standardised by the fit split. The highest accuracy wins; a tie goes to the lower cross-entropy.

    Args:
        features: `[N, D]`, frozen features.
        targets: `[N]`, int64 classes, all labelled.
        split: positions of fit, select and test images.
        num_classes: number of classes; each has to appear in the fit split.

    Raises:
        DataError: see `distill.probe.classification.require_classifiable`.
    """
    require_classifiable(features, targets, split, num_classes)
    fit, select, test = positions_of(split)
    both = torch.cat([fit, select])
    x, y = standardise(features[both], features[fit]), targets[both]
    problem = LogisticProblem(x[: len(fit)], y[: len(fit)], num_classes)
    x_select, y_select = x[len(fit) :], y[len(fit) :]
    models: dict[float, LogisticModel] = {}
    scores: dict[float, tuple[float, float]] = {}

    def try_path(cs: tuple[float, ...], start: LogisticModel | None) -> float:
        for model in fit_path(problem, cs, start=start):
            logits = model.logits(x_select)
            models[model.c] = model
            scores[model.c] = (accuracy(logits.argmax(1), y_select), -float(F.cross_entropy(logits, y_select)))
        return best_setting(scores)

    coarse = try_path(COARSE_CS, None)
    best = try_path(tuple(coarse * factor for factor in FINE_FACTORS), _nearest(models, coarse / 10))
    whole = LogisticProblem(x, y, num_classes, problem.basis)
    final = whole.solve(best, models[best], tolerance=FINAL_TOLERANCE, max_iter=MAX_ITER)
    logits = final.logits(standardise(features[test], features[fit])).float()
    return LinearResult(
        predictions=logits.argmax(1),
        probabilities=logits.softmax(1),
        c=best,
        path=tuple((c, scores[c][0]) for c in sorted(scores)),
        objective=final.objective,
        gradient_norm=final.gradient_norm,
        select_logits=models[best].logits(x_select).float(),
        test_logits=logits,
        model=final,
    )


def _nearest(models: dict[float, LogisticModel], c: float) -> LogisticModel:
    """Return the model whose C is nearest to `c` by ratio."""
    return models[min(models, key=lambda other: abs(math.log(other / c)))]


def _floating(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()
