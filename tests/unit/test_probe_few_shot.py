"""Few-shot probes: balanced, nested, repeatable draws; more shots are better."""

import pytest
import torch

from distill.probe.few_shot import draw_shots, few_shot_probe
from distill.probe.protocol import split_by_group

NUM_CLASSES = 4


def clusters(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % NUM_CLASSES
    means = torch.randn(NUM_CLASSES, 24, generator=generator)
    return means[targets] + 1.5 * torch.randn(n, 24, generator=generator), targets


def test_a_draw_is_balanced_from_the_fit_split_alone_and_holds_those_of_fewer_shots() -> None:
    targets, fit = torch.arange(200) % NUM_CLASSES, torch.arange(0, 200, 3)
    five = draw_shots(targets, fit, 5, seed=0, draw=1)
    assert torch.bincount(targets[five]).tolist() == [5] * NUM_CLASSES
    assert set(five.tolist()) <= set(fit.tolist())
    assert set(draw_shots(targets, fit, 2, seed=0, draw=1).tolist()) < set(five.tolist())
    assert torch.equal(five, draw_shots(targets, fit, 5, seed=0, draw=1))
    assert not torch.equal(five, draw_shots(targets, fit, 5, seed=0, draw=2))
    assert not torch.equal(five, draw_shots(targets, fit, 5, seed=1, draw=1))


def test_more_shots_score_higher_and_counts_that_a_class_cannot_give_are_left_out() -> None:
    features, targets = clusters(400, seed=1)
    split = split_by_group([""] * 400, targets.numpy(), seed=0)
    results = few_shot_probe(features, targets, split, num_classes=NUM_CLASSES, seed=0, shots=(1, 5, 20, 500))
    assert [result.shots for result in results] == [1, 5, 20]
    truth = targets[torch.from_numpy(split.test)]
    scores = [result.correct(truth).mean() for result in results]
    assert scores == sorted(scores)
    assert scores[-1] > scores[0] + 0.1
    for result in results:
        assert result.predictions.shape == (5, len(truth))
        assert result.settings == {"shots": result.shots, "draws": 5, "C": result.c}


def test_no_shots_are_refused() -> None:
    features, targets = clusters(100, seed=2)
    split = split_by_group([""] * 100, targets.numpy(), seed=0)
    with pytest.raises(ValueError, match="must be 1 or more"):
        few_shot_probe(features, targets, split, num_classes=NUM_CLASSES, seed=0, shots=[0])
