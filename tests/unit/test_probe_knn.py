"""kNN: the vote is DINOv2's, checked against scikit-learn's own neighbours and weights."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from distill.probe import knn
from distill.probe.knn import KS, TEMPERATURE, knn_predict, knn_probe, knn_shares
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


def test_blocks_of_queries_give_what_one_block_gives_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    bank, queries, targets = torch.randn(60, 6, generator=generator), torch.randn(25, 6), torch.arange(60) % 3
    whole = knn_shares(bank, targets, queries, ks=[3, 10], num_classes=3)
    monkeypatch.setattr(knn, "_SIMILARITIES", 4 * len(bank))
    sizes = [len(similarity) for _, similarity, _ in knn._neighbours(bank, queries, 3)]
    assert max(sizes) == 4
    assert sum(sizes) == 25
    blocks = knn_shares(bank, targets, queries, ks=[3, 10], num_classes=3)
    assert all(torch.allclose(blocks[k], whole[k], atol=1e-6) for k in (3, 10))


def test_the_ks_are_dinov2s_and_the_chosen_one_is_the_best_on_the_selection_split() -> None:
    assert KS == (10, 20, 100, 200)
    targets = torch.arange(900) % 3
    features = F.one_hot(targets, 3) + 1.2 * torch.randn(900, 3, generator=torch.Generator().manual_seed(4))
    result = knn_probe(features, targets, split_by_group([""] * 900, targets.numpy(), seed=0), num_classes=3)
    scores = dict(result.path)
    assert tuple(scores) == KS
    assert scores[result.k] == max(scores.values())
    assert result.settings == {"k": result.k, "temperature": 0.07}


def test_k_is_lowered_to_the_size_of_a_small_fit_split() -> None:
    split = Split(np.arange(4), np.arange(4, 6), np.arange(6, 8))
    result = knn_probe(torch.eye(8), torch.arange(8) % 2, split, num_classes=2)
    assert result.k == 4


@pytest.mark.parametrize("k", [0, 4])
def test_a_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="size of the bank, 3"):
        knn_predict(torch.eye(3), torch.arange(3), torch.eye(3), k=k, num_classes=3)
