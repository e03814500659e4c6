"""Calibration: known values, the temperature's optimum and its bounds, bad input."""

import math

import pytest
import torch

from distill.errors import DataError
from distill.probe.calibration import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    calibrate,
    fit_temperature,
    measure_calibration,
)


def drawn(n: int, temperature: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose targets are drawn from softmax(logits / temperature)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(n, 5, generator=generator)
    return logits, torch.multinomial((logits / temperature).softmax(1), 1, generator=generator).flatten()


def test_values_by_hand() -> None:
    logits = torch.tensor([[0.8, 0.2], [0.8, 0.2]]).log()
    measured = measure_calibration(logits, torch.tensor([0, 1]))
    assert measured.ece == pytest.approx(0.3)
    assert measured.brier == pytest.approx((2 * 0.2**2 + 2 * 0.8**2) / 2)
    assert measured.nll == pytest.approx(-(math.log(0.8) + math.log(0.2)) / 2)
    assert measured.nll_per_image.mean().item() == pytest.approx(measured.nll)
    assert measured.brier_per_image.mean().item() == pytest.approx(measured.brier)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_drew_the_labels_is_found(temperature: float) -> None:
    assert fit_temperature(*drawn(20_000, temperature, seed=1)) == pytest.approx(temperature, rel=0.05)


def test_scaling_mends_an_overconfident_classifier_and_keeps_its_predictions() -> None:
    result = calibrate(*drawn(4000, 3.0, seed=2), *drawn(4000, 3.0, seed=3))
    assert result.scaled.ece < 0.03 < result.raw.ece
    assert result.scaled.nll < result.raw.nll
    assert result.scaled.brier < result.raw.brier


def test_the_temperature_is_fitted_on_the_selection_split_alone() -> None:
    select, test = drawn(500, 2.0, seed=4), drawn(500, 0.5, seed=5)
    assert calibrate(*select, *test).temperature == fit_temperature(*select)


def test_a_classifier_that_is_always_right_or_knows_nothing_stays_within_the_bounds() -> None:
    right = torch.eye(4)[torch.arange(40) % 4]
    assert MIN_TEMPERATURE <= fit_temperature(right, torch.arange(40) % 4) < 0.05
    noise = torch.randn(40, 4, generator=torch.Generator().manual_seed(6))
    wrong = (noise.argmax(1) + 1) % 4
    assert fit_temperature(noise, wrong) == pytest.approx(MAX_TEMPERATURE, rel=1e-6)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), "one at least"),
        (torch.zeros(2, 3), torch.zeros(1, dtype=torch.int64), "as many of each"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), "labelled images"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "of 3 classes"),
        (torch.full((2, 3), torch.nan), torch.tensor([0, 1]), "not finite"),
    ],
)
def test_bad_input_is_refused(logits: torch.Tensor, targets: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit_temperature(logits, targets)
    with pytest.raises(DataError, match=message):
        measure_calibration(logits, targets)
