"""The logistic solver: exact in every shape, quick along a path, honest about where it stopped."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from distill.probe.lbfgs import Memory, Point, minimise
from distill.probe.linear import COARSE_CS, fit_path, standardise
from distill.probe.logistic import LogisticProblem, principal_basis

NUM_CLASSES = 6


def drawn(n: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Standardised features with a spectrum that falls over two decades, float64, and classes they half tell."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -2, dim)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    targets = torch.randint(NUM_CLASSES, (n,), generator=generator)
    targets[:NUM_CLASSES] = torch.arange(NUM_CLASSES)
    means = torch.randn(NUM_CLASSES, dim, generator=generator)
    latent = (0.6 * means[targets] + torch.randn(n, dim, generator=generator)) * scale
    features = (latent @ rotation).double()
    return standardise(features, features), targets


def gradient(
    features: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, c: float
) -> float:
    """Largest entry of the gradient of the objective divided by C * N, by autograd."""
    weight, bias = weight.double().clone().requires_grad_(), bias.double().clone().requires_grad_()
    loss = F.cross_entropy(F.linear(features.double(), weight, bias), targets)
    (loss + weight.square().sum() / (2 * c * len(targets))).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    return float(torch.cat([weight.grad.flatten(), bias.grad]).abs().max())


@pytest.mark.parametrize(("n", "dim"), [(400, 20), (40, 40), (30, 100)])
@pytest.mark.parametrize("c", [1e-3, 1.0])
def test_the_gradient_vanishes_with_more_as_many_and_fewer_images_than_channels(n: int, dim: int, c: float) -> None:
    features, targets = drawn(n, dim)
    model = LogisticProblem(features, targets, NUM_CLASSES).solve(c, None, tolerance=1e-9, max_iter=500)
    assert gradient(features, targets, model.weight, model.bias, c) < 2e-9
    assert model.gradient_norm == pytest.approx(gradient(features, targets, model.weight, model.bias, c), abs=1e-10)
    loss = F.cross_entropy(model.logits(features), targets, reduction="sum")
    assert model.objective == pytest.approx(float(model.weight.square().sum() / 2 + c * loss), rel=1e-9)


def test_features_far_from_centred_have_the_same_weights() -> None:
    features, targets = drawn(300, 12)
    shift = torch.linspace(-40, 60, 12).double()
    near = LogisticProblem(features, targets, NUM_CLASSES).solve(0.1, None, tolerance=1e-9, max_iter=500)
    far = LogisticProblem(features + shift, targets, NUM_CLASSES).solve(0.1, None, tolerance=1e-8, max_iter=500)
    assert torch.allclose(far.weight, near.weight, atol=1e-6)
    assert torch.allclose(far.bias, near.bias - near.weight @ shift, atol=1e-4)


def test_single_precision_reaches_a_gradient_far_below_the_rounding_of_its_values() -> None:
    features, targets = drawn(2000, 30)
    model = LogisticProblem(features.float(), targets, NUM_CLASSES).solve(0.1, None, tolerance=3e-7, max_iter=500)
    assert gradient(features, targets, model.weight, model.bias, 0.1) < 1e-6


def test_a_tolerance_below_rounding_ends_the_search_and_says_where() -> None:
    features, targets = drawn(200, 10)
    model = LogisticProblem(features.float(), targets, NUM_CLASSES).solve(1.0, None, tolerance=0.0, max_iter=10**6)
    assert 0 < model.gradient_norm < 1e-5


def evaluations(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> int:
    """How often the objective is evaluated."""
    count = 0
    plain = LogisticProblem._evaluate

    def counted(self: LogisticProblem, parameters: torch.Tensor, penalty: float) -> Point:
        nonlocal count
        count += 1
        return plain(self, parameters, penalty)

    with monkeypatch.context() as patch:
        patch.setattr(LogisticProblem, "_evaluate", counted)
        run()
    return count


def test_a_path_takes_fewer_evaluations_than_fits_that_start_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets = drawn(2000, 40)

    def cold() -> None:
        for c in COARSE_CS:
            LogisticProblem(features, targets, NUM_CLASSES).solve(c, None, tolerance=1e-4, max_iter=500)

    path = evaluations(monkeypatch, lambda: list(fit_path(LogisticProblem(features, targets, NUM_CLASSES), COARSE_CS)))
    assert path < 0.7 * evaluations(monkeypatch, cold)


def test_known_variances_save_evaluations_of_a_cold_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets = drawn(2000, 40)

    def fit() -> None:
        LogisticProblem(features, targets, NUM_CLASSES).solve(0.1, None, tolerance=1e-6, max_iter=500)

    with_variances = evaluations(monkeypatch, fit)
    with monkeypatch.context() as patch:
        patch.setattr(LogisticProblem, "_curvature", lambda self, parameters, penalty: torch.ones_like(parameters))
        assert with_variances < 0.7 * evaluations(monkeypatch, fit)


def test_another_c_finds_the_pairs_corrected_for_its_penalty_and_the_biases_as_they_were() -> None:
    features, targets = drawn(200, 6)
    problem = LogisticProblem(features, targets, NUM_CLASSES)
    model = problem.solve(1e-3, None, tolerance=1e-6, max_iter=100)
    before = list(problem._memory._pairs)
    problem.solve(1.0, model, tolerance=1e9, max_iter=0)
    change = torch.full((NUM_CLASSES, 7), (1 - 1e3) / 200, dtype=torch.float64)
    change[:, -1] = 0
    assert len(before) == len(problem._memory._pairs) > 2
    for (step, old, _), (_, new, _) in zip(before, problem._memory._pairs, strict=True):
        assert torch.allclose(new, old + change.flatten() * step, atol=1e-12)


def test_weak_regularisation_goes_on_where_the_classes_separate() -> None:
    features, targets = drawn(200, 60)
    path = list(fit_path(LogisticProblem(features, targets, NUM_CLASSES), (10.0, 1e3, 1e5)))
    losses = [float(F.cross_entropy(model.logits(features), targets)) for model in path]
    assert losses[1] < losses[0] / 5
    assert losses[2] < losses[1] / 5


def test_a_basis_of_fewer_images_than_channels_spans_the_centred_images() -> None:
    features, _ = drawn(20, 50)
    basis = principal_basis(features)
    centred = features - features.mean(0)
    assert not basis.is_complete
    assert basis.directions.shape == (50, 19)
    assert torch.allclose(centred @ basis.directions @ basis.directions.T, centred, atol=1e-8)
    assert torch.allclose((centred @ basis.directions).square().mean(0), basis.variances, atol=1e-8)


def quadratic(hessian: torch.Tensor, at: torch.Tensor) -> Callable[[torch.Tensor], Point]:
    def evaluate(x: torch.Tensor) -> Point:
        slope = hessian @ (x - at)
        return Point(x, float((x - at) @ slope / 2), slope, float(slope.abs().max()))

    return evaluate


def test_pairs_shifted_by_a_penalty_are_those_of_the_penalised_function() -> None:
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    hessian, at = root @ root.T + torch.eye(5), torch.ones(5, dtype=torch.float64)
    start, ones = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    memory, extra = Memory(), torch.full((5,), 3.0, dtype=torch.float64)
    minimise(quadratic(hessian, at), start, ones, memory, tolerance=1e-10, max_iter=100, rounding=1e-15)
    memory.shift(extra)
    penalised = hessian + torch.diag(extra)
    assert len(memory._pairs) > 3
    for step, change, curvature in memory._pairs:
        assert curvature == pytest.approx(float(step @ change))
        assert torch.allclose(change, penalised @ step)


def test_the_first_step_is_lengthened_or_shortened_as_needed() -> None:
    at = torch.ones(3, dtype=torch.float64)
    for scale in (1e-4, 1.0, 1e4):
        evaluate = quadratic(scale * torch.eye(3, dtype=torch.float64), at)
        ones = torch.ones(3, dtype=torch.float64)
        found = minimise(evaluate, 0 * at, ones, Memory(), tolerance=1e-9 * scale, max_iter=50, rounding=1e-15)
        assert torch.allclose(found.parameters, at)
