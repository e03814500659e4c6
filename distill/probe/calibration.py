"""Calibration of a classifier's probabilities, before and after a temperature that is fitted on the selection split.

Guo et al. 2017, "On calibration of modern neural networks" (arXiv 1706.04599): expected calibration error over 15
equal bins, and one temperature that divides all logits. Negative log-likelihood and Brier score are proper scores;
a classifier cannot improve them by being evasive, as it can the calibration error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from distill.errors import DataError

NUM_BINS = 15
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-2, 1e3
"""A classifier that is right on every selection image wants temperature 0, and one without information infinity."""


@dataclass(frozen=True)
class Calibration:
    """How far probabilities can be taken at their word.

    Attributes:
        ece: expected calibration error, in [0, 1].
        brier: squared distance between probabilities and the one-hot class, mean over images, in [0, 2].
        nll: negative log-likelihood in nats, mean over images.
        nll_per_image: `[n]`, float64.
        brier_per_image: `[n]`, float64.
    """

    ece: float
    brier: float
    nll: float
    nll_per_image: Tensor
    brier_per_image: Tensor


@dataclass(frozen=True)
class CalibrationResult:
    """The test split's calibration as the classifier is, and with its logits divided by the temperature."""

    temperature: float
    raw: Calibration
    scaled: Calibration


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Return the temperature that minimises the negative log-likelihood of `softmax(logits / temperature)`.

    In 1 / temperature the likelihood is convex, so its slope is bisected; in float64, to about nine digits, inside
    [MIN_TEMPERATURE, MAX_TEMPERATURE].

    Args:
        logits: `[n, K]`.
        targets: `[n]`, int64.

    Raises:
        DataError: there is no image, a logit is not finite, or a target is out of range.
    """
    _require_usable(logits, targets)
    z = logits.double()
    wanted = z.gather(1, targets[:, None]).mean()
    low, high = math.log(1 / MAX_TEMPERATURE), math.log(1 / MIN_TEMPERATURE)
    for _ in range(34):
        middle = (low + high) / 2
        expected = ((z * math.exp(middle)).softmax(1) * z).sum(1).mean()
        low, high = (middle, high) if expected < wanted else (low, middle)
    return math.exp(-(low + high) / 2)


def measure_calibration(logits: Tensor, targets: Tensor) -> Calibration:
    """Return calibration error, Brier score and negative log-likelihood of `softmax(logits)`.

    Args:
        logits: `[n, K]`.
        targets: `[n]`, int64.

    Raises:
        DataError: see `fit_temperature`.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error  # imports transformers: seconds
    from torchmetrics.functional.regression import mean_squared_error

    _require_usable(logits, targets)
    num_classes = logits.shape[1]
    log_probabilities = logits.double().log_softmax(1)
    probabilities, truth = log_probabilities.exp(), F.one_hot(targets, num_classes).double()
    ece = multiclass_calibration_error(probabilities, targets, num_classes, n_bins=NUM_BINS, norm="l1")
    return Calibration(
        ece=float(ece),
        brier=float(mean_squared_error(probabilities.flatten(), truth.flatten())) * num_classes,
        nll=float(F.nll_loss(log_probabilities, targets)),
        nll_per_image=F.nll_loss(log_probabilities, targets, reduction="none"),
        brier_per_image=(probabilities - truth).square().sum(1),
    )


def calibrate(
    select_logits: Tensor, select_targets: Tensor, test_logits: Tensor, test_targets: Tensor
) -> CalibrationResult:
    """Fit a temperature on the selection split and measure the test split without and with it.

    Args:
        select_logits: `[n_select, K]`, of a classifier that has not seen these images.
        select_targets: `[n_select]`, int64.
        test_logits: `[n_test, K]`.
        test_targets: `[n_test]`, int64.

    Raises:
        DataError: see `fit_temperature`.
    """
    temperature = fit_temperature(select_logits, select_targets)
    raw = measure_calibration(test_logits, test_targets)
    return CalibrationResult(temperature, raw, measure_calibration(test_logits.double() / temperature, test_targets))


def _require_usable(logits: Tensor, targets: Tensor) -> None:
    if len(targets) == 0 or len(logits) != len(targets):
        raise DataError(
            f"Calibration was given {len(logits)} rows of logits and {len(targets)} labels; it needs as many of each, "
            "and one at least."
        )
    if int(targets.min()) < 0 or int(targets.max()) >= logits.shape[1]:
        raise DataError(
            f"Labels run from {int(targets.min())} to {int(targets.max())}, but the logits are of {logits.shape[1]} "
            "classes; restrict the split to labelled images."
        )
    if not logits.isfinite().all():
        raise DataError("Logits are not finite; the classifier that gave them did not converge. Check the features.")
