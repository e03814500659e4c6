"""What every classification protocol refuses, and what it must do with random and oracle features."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distill.errors import DataError
from distill.probe.attentive import attentive_probe
from distill.probe.few_shot import few_shot_probe
from distill.probe.knn import knn_probe
from distill.probe.linear import linear_probe
from distill.probe.protocol import Split, split_by_group
from distill.probe.sgd_grid import sgd_grid_probe

Tensors = tuple[torch.Tensor, torch.Tensor]
Probe = Callable[[torch.Tensor, torch.Tensor, Split, int], Tensors]
N, K = 600, 4


def linear(x: torch.Tensor, y: torch.Tensor, split: Split, k: int) -> Tensors:
    result = linear_probe(x, y, split, num_classes=k)
    return result.predictions, result.probabilities


def knn(x: torch.Tensor, y: torch.Tensor, split: Split, k: int) -> Tensors:
    result = knn_probe(x, y, split, num_classes=k)
    return result.predictions, result.probabilities


def sgd_grid(x: torch.Tensor, y: torch.Tensor, split: Split, k: int) -> Tensors:
    result = sgd_grid_probe({"pooled": x}, y, split, num_classes=k, seed=0)
    return result.predictions, result.probabilities


def attentive(x: torch.Tensor, y: torch.Tensor, split: Split, k: int) -> Tensors:
    result = attentive_probe(x[:, None].expand(-1, 3, -1), y, split, num_classes=k, seed=0, num_steps=150)
    return result.predictions, result.probabilities


def few_shot(x: torch.Tensor, y: torch.Tensor, split: Split, k: int) -> Tensors:
    result = few_shot_probe(x, y, split, num_classes=k, seed=0, shots=[10], num_draws=2)[0]
    return result.predictions[0], result.probabilities


PROBES = [linear, knn, sgd_grid, attentive, few_shot]


@pytest.fixture(scope="module")
def split() -> Split:
    return split_by_group([""] * N, (torch.arange(N) % K).numpy(), seed=0)


@pytest.mark.parametrize("probe", PROBES)
def test_oracle_features_score_one_and_random_features_chance(probe: Probe, split: Split) -> None:
    targets = torch.arange(N) % K
    truth = targets[torch.from_numpy(split.test)]
    predictions, probabilities = probe(F.one_hot(targets, K).float(), targets, split, K)
    assert torch.equal(predictions, truth)
    assert probabilities.shape == (len(truth), K)
    assert torch.allclose(probabilities.sum(1), torch.ones(len(truth)), atol=1e-5)
    noise = torch.randn(N, 8, generator=torch.Generator().manual_seed(1))
    predictions, _ = probe(noise, targets, split, K)
    chance = 1 / K
    accuracy = float((predictions == truth).double().mean())
    assert abs(accuracy - chance) < 4 * np.sqrt(chance * (1 - chance) / len(truth))


@pytest.mark.parametrize("probe", PROBES)
def test_the_same_call_gives_the_same_bits_and_test_labels_play_no_part(probe: Probe, split: Split) -> None:
    targets = torch.arange(N) % K
    features = F.one_hot(targets, K).float() + torch.randn(N, K, generator=torch.Generator().manual_seed(2))
    first = probe(features, targets, split, K)
    shuffled = targets.clone()
    shuffled[torch.from_numpy(split.test)] = 0
    second = probe(features, shuffled, split, K)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def broken(what: str) -> tuple[torch.Tensor, torch.Tensor, Split, int]:
    features, targets = torch.randn(30, 4, generator=torch.Generator().manual_seed(3)), torch.arange(30) % 3
    split, num_classes = Split(np.arange(15), np.arange(15, 20), np.arange(20, 30)), 3
    match what:
        case "one class":
            targets, num_classes = targets * 0, 1
        case "NaN":
            features[22, 1] = torch.nan
        case "missing label":
            targets[16] = -1
        case "label out of range":
            targets[3] = 3
        case "absent class":
            targets[:15] = torch.arange(15) % 2
        case "empty part":
            split = Split(split.fit, np.arange(0), split.test)
        case _:
            targets = targets[:-1]
    return features, targets, split, num_classes


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("one class", "two classes or more"),
        ("NaN", "test split are not finite, first image 22"),
        ("missing label", "1 of 5 images of the select split have no label"),
        ("label out of range", "class 3, but there are 3 classes"),
        ("absent class", "no image of 1 of 3 classes, first class 2"),
        ("empty part", "select split is empty"),
        ("lengths", "30 images and targets of 29"),
    ],
)
def test_bad_input_is_refused_by_every_protocol(probe: Probe, what: str, message: str) -> None:
    features, targets, split, num_classes = broken(what)
    with pytest.raises(DataError, match=message):
        probe(features, targets, split, num_classes)
