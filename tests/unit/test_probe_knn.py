"""kNN: the vote is DINOv2's, checked against scikit-learn's own neighbours and weights."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from distill.probe.knn import TEMPERATURE, knn_predict, knn_probe
from distill.probe.protocol import Split, split_by_group


def votes(cosine_distance: np.ndarray) -> np.ndarray:
    return np.exp((1 - cosine_distance) / TEMPERATURE)


@pytest.mark.parametrize("k", [1, 10, 20])
def test_predictions_equal_those_of_scikit_learn_with_the_same_weights(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(300) % 4
    features = torch.randn(4, 12, generator=generator)[targets] + 1.5 * torch.randn(300, 12, generator=generator)
    queries = features[200:]
    reference = KNeighborsClassifier(k, metric="cosine", weights=votes, algorithm="brute")
    reference.fit(features[:200].double().numpy(), targets[:200].numpy())
    ours = knn_predict(features[:200], targets[:200], queries, k=k, num_classes=4)
    agreement = (ours.numpy() == reference.predict(queries.double().numpy())).mean()
    assert agreement >= 0.998


def test_a_nearer_neighbour_outvotes_two_far_ones() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    predicted = knn_predict(bank, torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.5]]), k=3, num_classes=2)
    assert predicted.tolist() == [0]


def test_the_scale_of_a_feature_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    bank, targets, queries = torch.randn(50, 6, generator=generator), torch.arange(50) % 3, torch.randn(20, 6)
    plain = knn_predict(bank, targets, queries, k=5, num_classes=3)
    assert torch.equal(knn_predict(bank * torch.rand(50, 1) + bank, targets, 9 * queries, k=5, num_classes=3), plain)


def test_oracle_features_score_one_and_random_features_chance() -> None:
    targets = torch.arange(1000) % 5
    split = split_by_group([""] * 1000, targets.numpy(), seed=0)
    test = torch.from_numpy(split.test)
    oracle = knn_probe(F.one_hot(targets, 5).float(), targets, split, num_classes=5)
    assert torch.equal(oracle.predictions, targets[test])
    noise = torch.randn(1000, 16, generator=torch.Generator().manual_seed(2))
    accuracy = (knn_probe(noise, targets, split, num_classes=5).predictions == targets[test]).double().mean()
    assert abs(float(accuracy) - 0.2) < 4 * np.sqrt(0.2 * 0.8 / len(test))


def test_k_is_lowered_to_the_size_of_a_small_fit_split() -> None:
    split = Split(np.arange(4), np.arange(4, 6), np.arange(6, 8))
    result = knn_probe(torch.eye(8), torch.arange(8) % 2, split, num_classes=2)
    assert result.k == 4


@pytest.mark.parametrize("k", [0, 4])
def test_a_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="size of the bank, 3"):
        knn_predict(torch.eye(3), torch.arange(3), torch.eye(3), k=k, num_classes=3)
