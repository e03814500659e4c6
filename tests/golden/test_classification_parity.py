"""Classification protocols against independent implementations on the same features: scikit-learn and scipy."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from distill.probe.calibration import fit_temperature, measure_calibration
from distill.probe.knn import KS, TEMPERATURE, knn_predict, knn_probe
from distill.probe.linear import MAX_ITER, linear_probe, standardise
from distill.probe.logistic import LogisticProblem
from distill.probe.protocol import Split, split_by_group

NUM_CLASSES = 10
POINTS = 0.002
"""0.2 points of accuracy: what the protocols promise against independent implementations."""


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor, Split]:
    """Correlated features of 10 classes that a linear probe gets about 80 % right."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(NUM_CLASSES, (3000,), generator=generator)
    mixing = torch.randn(48, 48, generator=generator) * torch.arange(1, 49).float().rsqrt()[:, None]
    means = 1.1 * torch.randn(NUM_CLASSES, 48, generator=generator) * torch.arange(1, 49).float().rsqrt()
    latent = means[targets] + torch.randn(3000, 48, generator=generator)
    return latent @ mixing + 2, targets, split_by_group([""] * 3000, targets.numpy(), seed=0)


@pytest.mark.parametrize("c", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logistic_coefficients_and_accuracy_are_scikit_learns(
    data: tuple[torch.Tensor, torch.Tensor, Split], c: float, dtype: torch.dtype
) -> None:
    features, targets, split = data
    x = standardise(features.to(dtype), features[split.fit])
    tolerance = 1e-6 if dtype == torch.float32 else 1e-10  # single precision ends near 1e-7
    problem = LogisticProblem(x[split.fit], targets[split.fit], NUM_CLASSES)
    ours = problem.solve(c, None, tolerance=tolerance, max_iter=MAX_ITER)
    assert ours.gradient_norm <= tolerance
    wide = x.double().numpy()
    theirs = LogisticRegression(C=c, tol=1e-9, max_iter=5000).fit(wide[split.fit], targets[split.fit].numpy())
    # Biases are free up to a constant over classes; scikit-learn's and ours start from zero and keep their mean there.
    scale = float(np.abs(theirs.coef_).max())
    assert np.abs(ours.weight.double().numpy() - theirs.coef_).max() <= 1e-3 * scale
    assert np.abs(ours.bias.double().numpy() - theirs.intercept_).max() <= 2e-3
    accuracy = (ours.logits(x[split.test]).argmax(1) == targets[split.test]).double().mean()
    assert abs(float(accuracy) - theirs.score(wide[split.test], targets[split.test].numpy())) <= POINTS


@pytest.mark.slow
def test_the_whole_linear_probe_is_scikit_learns_at_the_chosen_c(
    data: tuple[torch.Tensor, torch.Tensor, Split],
) -> None:
    features, targets, split = data
    ours = linear_probe(features, targets, split, num_classes=NUM_CLASSES)
    both = np.concatenate([split.fit, split.select])
    x = standardise(features, features[split.fit]).double().numpy()
    for c in (0.1, 1.0):
        tried = LogisticRegression(C=c, tol=1e-6, max_iter=5000).fit(x[split.fit], targets[split.fit].numpy())
        assert abs(dict(ours.path)[c] - tried.score(x[split.select], targets[split.select].numpy())) <= 0.005
    theirs = LogisticRegression(C=ours.c, tol=1e-8, max_iter=5000).fit(x[both], targets[both].numpy())
    accuracy = (ours.predictions == targets[split.test]).double().mean()
    assert abs(float(accuracy) - theirs.score(x[split.test], targets[split.test].numpy())) <= POINTS
    assert np.abs(ours.probabilities.numpy() - theirs.predict_proba(x[split.test])).max() < 5e-3
    assert ours.gradient_norm <= 1e-5
    loss = F.nll_loss(torch.from_numpy(theirs.predict_log_proba(x[both])), targets[both], reduction="sum")
    objective = np.square(theirs.coef_).sum() / 2 + ours.c * float(loss)
    assert ours.objective == pytest.approx(objective, rel=1e-5)


def dino_votes(cosine_distance: np.ndarray) -> np.ndarray:
    return np.exp((1 - cosine_distance) / TEMPERATURE)


@pytest.mark.parametrize("k", KS)
def test_knn_is_scikit_learns_with_dinos_weights(data: tuple[torch.Tensor, torch.Tensor, Split], k: int) -> None:
    features, targets, split = data
    reference = KNeighborsClassifier(k, metric="cosine", weights=dino_votes, algorithm="brute")
    reference.fit(features[split.fit].double().numpy(), targets[split.fit].numpy())
    theirs = reference.predict(features[split.test].double().numpy())
    ours = knn_predict(features[split.fit], targets[split.fit], features[split.test], k=k, num_classes=NUM_CLASSES)
    truth = targets[split.test].numpy()
    assert abs((ours.numpy() == truth).mean() - (theirs == truth).mean()) <= POINTS
    assert (ours.numpy() == theirs).mean() >= 0.998


def test_the_whole_knn_probe_is_scikit_learns(data: tuple[torch.Tensor, torch.Tensor, Split]) -> None:
    features, targets, split = data
    ours = knn_probe(features, targets, split, num_classes=NUM_CLASSES)
    x, y = features.double().numpy(), targets.numpy()

    def reference(k: int, bank: np.ndarray) -> KNeighborsClassifier:
        model = KNeighborsClassifier(k, metric="cosine", weights=dino_votes, algorithm="brute")
        return model.fit(x[bank], y[bank])

    scores = {k: reference(k, split.fit).score(x[split.select], y[split.select]) for k in KS}
    assert ours.k == max(scores, key=scores.__getitem__)
    assert dict(ours.path) == pytest.approx(scores, abs=POINTS)
    theirs = reference(ours.k, np.concatenate([split.fit, split.select]))
    assert np.abs(ours.probabilities.numpy() - theirs.predict_proba(x[split.test])).max() < 1e-4
    accuracy = (ours.predictions.numpy() == y[split.test]).mean()
    assert abs(accuracy - theirs.score(x[split.test], y[split.test])) <= POINTS


def test_the_temperature_is_scipys_optimum() -> None:
    generator = np.random.default_rng(0)
    logits, targets = 6 * generator.normal(size=(500, 7)), generator.integers(7, size=500)
    logits[np.arange(500), targets] += 4

    def nll(temperature: float) -> float:
        return float(-log_softmax(logits / temperature, axis=1)[np.arange(500), targets].mean())

    theirs = minimize_scalar(nll, bounds=(0.05, 50), method="bounded", options={"xatol": 1e-10})
    ours = fit_temperature(torch.from_numpy(logits), torch.from_numpy(targets))
    assert ours == pytest.approx(theirs.x, rel=1e-5)
    scaled = measure_calibration(torch.from_numpy(logits / ours), torch.from_numpy(targets))
    assert scaled.nll == pytest.approx(theirs.fun, abs=1e-9)
