"""The SGD grid: its heads are what torch's own SGD trains, chosen on held-out images."""

import math

import pytest
import torch
from torch.nn import functional as F

from distill.errors import DataError
from distill.probe.protocol import Split, split_by_group
from distill.probe.sgd_grid import (
    INIT_STD,
    LEARNING_RATES,
    MAX_PASSES,
    NUM_STEPS,
    _batches,
    sgd_grid_probe,
    steps_for,
    train_heads,
)

RATES = (0.01, 0.3, 2.0)


def clusters(n: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % 3
    return torch.randn(3, dim, generator=generator)[targets] + torch.randn(n, dim, generator=generator), targets


def split_of(targets: torch.Tensor) -> Split:
    return split_by_group([""] * len(targets), targets.numpy(), seed=0)


def test_every_head_is_the_one_that_torchs_sgd_trains_alone() -> None:
    features, targets = clusters(70, 6, seed=0)
    steps, batch = 25, 32
    weights, biases = train_heads(
        features, targets, num_classes=3, learning_rates=RATES, num_steps=steps, seed=4, batch_size=batch
    )
    first = INIT_STD * torch.randn(3, 6, generator=torch.Generator().manual_seed(4))
    for at, rate in enumerate(RATES):
        weight, bias = first.clone().requires_grad_(), torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.SGD([weight, bias], lr=rate * batch / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        for rows in _batches(70, batch, steps, 4):
            optimizer.zero_grad()
            F.cross_entropy(F.linear(features[rows], weight, bias), targets[rows]).backward()
            optimizer.step()
            schedule.step()
        assert torch.allclose(weights[at], weight, atol=1e-4)
        assert torch.allclose(biases[at], bias, atol=1e-4)


def test_each_pass_sees_every_image_once() -> None:
    rows = torch.cat(_batches(10, 4, 5, 0))
    assert rows[:10].sort().values.tolist() == rows[10:].sort().values.tolist() == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()


def test_the_feature_that_tells_the_classes_is_chosen_and_test_labels_play_no_part() -> None:
    targets = torch.arange(300) % 3
    noise = torch.randn(300, 5, generator=torch.Generator().manual_seed(1))
    features = {"noise": noise, "classes": F.one_hot(targets, 3) + 0.1 * noise[:, :3]}
    result = sgd_grid_probe(features, targets, split_of(targets), num_classes=3, seed=0, num_steps=100)
    assert result.feature == "classes"
    assert len(result.path) == 2 * len(LEARNING_RATES)
    scores = {(name, rate): score for name, rate, score in result.path}
    assert scores[result.feature, result.learning_rate] == max(scores.values())


def test_a_head_that_diverges_is_passed_over_and_spoils_no_other() -> None:
    features, targets = clusters(300, 6, seed=2)
    split = split_of(targets)
    common = {"num_classes": 3, "seed": 0, "num_steps": 60}
    alone = sgd_grid_probe({"x": features}, targets, split, learning_rates=[0.1], **common)
    beside = sgd_grid_probe({"x": features}, targets, split, learning_rates=[0.1, 1e38], **common)
    assert [rate for _, rate, _ in beside.path] == [0.1]
    assert torch.equal(beside.predictions, alone.predictions)
    with pytest.raises(DataError, match="diverged"):
        sgd_grid_probe({"x": features}, targets, split, learning_rates=[1e38], **common)


def test_steps_are_the_releases_or_fewer_for_a_small_set() -> None:
    assert steps_for(1_281_167) == NUM_STEPS
    assert steps_for(256) == 2 * MAX_PASSES


def test_an_empty_grid_is_refused() -> None:
    features, targets = clusters(30, 2, seed=3)
    with pytest.raises(ValueError, match="one learning rate"):
        sgd_grid_probe({"x": features}, targets, split_of(targets), num_classes=3, seed=0, learning_rates=[])
