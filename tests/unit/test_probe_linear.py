"""The linear probe: same optimum as scikit-learn, selection on held-out images only, honest at both ends."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from distill.probe.linear import MAX_ITER, linear_probe, standardise
from distill.probe.logistic import LogisticModel, LogisticProblem
from distill.probe.protocol import Split, split_by_group

NUM_CLASSES = 5


def clusters(n: int, dim: int, distance: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = distance * torch.randn(NUM_CLASSES, dim, generator=generator)
    targets = torch.arange(n) % NUM_CLASSES
    scales = torch.linspace(0.1, 5, dim)
    return (centres[targets] + torch.randn(n, dim, generator=generator)) * scales + 3, targets


def fit(x: torch.Tensor, targets: torch.Tensor, c: float, start: LogisticModel | None = None) -> LogisticModel:
    return LogisticProblem(x, targets, NUM_CLASSES).solve(c, start, tolerance=1e-6, max_iter=MAX_ITER)


def split_of(targets: torch.Tensor, seed: int = 0) -> Split:
    return split_by_group([""] * len(targets), targets.numpy(), seed=seed)


@pytest.mark.parametrize("c", [1e-5, 1e-3, 1e-1, 1.0, 10.0])
def test_objective_and_accuracy_agree_with_scikit_learn_at_the_same_c(c: float) -> None:
    features, targets = clusters(1500, 16, 0.7, seed=1)
    x = standardise(features, features[:750])
    train, test = slice(0, 750), slice(750, 1500)
    ours = fit(x[train], targets[train], c)
    theirs = LogisticRegression(C=c, max_iter=2000, tol=1e-8).fit(x[train].numpy(), targets[train].numpy())
    weight, bias = torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_)
    loss = F.cross_entropy(x[train] @ weight.T + bias, targets[train], reduction="sum")
    reference = float(weight.square().sum() / 2 + c * loss)
    assert ours.objective == pytest.approx(reference, rel=1e-3)
    accuracy = float((ours.logits(x[test]).argmax(1) == targets[test]).double().mean())
    assert abs(accuracy - theirs.score(x[test].numpy(), targets[test].numpy())) <= 0.002


def test_a_warm_start_reaches_the_solution_of_a_cold_one() -> None:
    features, targets = clusters(200, 8, 0.5, seed=2)
    x = standardise(features, features)
    strong = fit(x, targets, 1e-3)
    warm = fit(x, targets, 1.0, strong)
    cold = fit(x, targets, 1.0)
    assert warm.objective == pytest.approx(cold.objective, rel=1e-6)


def test_oracle_features_score_one_and_random_features_chance() -> None:
    targets = torch.arange(1000) % NUM_CLASSES
    split = split_of(targets)
    test = torch.from_numpy(split.test)
    oracle = F.one_hot(targets, NUM_CLASSES).float()
    predicted = linear_probe(oracle, targets, split, num_classes=NUM_CLASSES).predictions
    assert torch.equal(predicted, targets[test])
    noise = torch.randn(1000, 16, generator=torch.Generator().manual_seed(3))
    accuracy = (
        (linear_probe(noise, targets, split, num_classes=NUM_CLASSES).predictions == targets[test]).double().mean()
    )
    standard_error = np.sqrt(0.2 * 0.8 / len(test))
    assert abs(float(accuracy) - 0.2) < 4 * standard_error


def test_c_is_the_best_on_the_selection_split_and_the_test_labels_play_no_part() -> None:
    features, targets = clusters(400, 40, 0.35, seed=4)
    split = split_of(targets)
    first = linear_probe(features, targets, split, num_classes=NUM_CLASSES)
    scores = dict(first.path)
    assert scores[first.c] == max(scores.values())
    shuffled = targets.clone()
    shuffled[torch.from_numpy(split.test)] = 0
    second = linear_probe(features, shuffled, split, num_classes=NUM_CLASSES)
    assert second.c == first.c
    assert torch.equal(second.predictions, first.predictions)


def test_a_constant_channel_does_no_harm() -> None:
    features, targets = clusters(200, 8, 1.0, seed=5)
    with_constant = torch.cat([features, torch.full((200, 1), 7.0)], dim=1)
    assert standardise(with_constant, with_constant).isfinite().all()
    split = split_of(targets)
    plain = linear_probe(features, targets, split, num_classes=NUM_CLASSES).predictions
    assert torch.equal(linear_probe(with_constant, targets, split, num_classes=NUM_CLASSES).predictions, plain)


def test_fitting_works_where_gradients_are_switched_off() -> None:
    features, targets = clusters(50, 4, 1.0, seed=6)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model = fit(features, targets, 0.1)
    assert not model.weight.requires_grad


@pytest.mark.parametrize(("c", "target"), [(0.0, 0), (1.0, NUM_CLASSES), (1.0, -1)])
def test_a_c_of_zero_or_a_target_out_of_range_is_refused(c: float, target: int) -> None:
    with pytest.raises(ValueError, match="must be|is not above"):
        fit(torch.randn(3, 2), torch.tensor([0, 1, target]), c)
