"""Every rung that judges features: random ones score at chance, ones that encode the label at 100 %, NaN is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.errors import ConfigError, DataError
from distill.probe.calibration import measure_calibration
from distill.probe.cohort import Cohort
from distill.probe.feature_records import Features
from distill.probe.ladder import choose_rungs, classification_scores
from distill.probe.linear import linear_probe
from distill.probe.protocol import split_by_group
from distill.probe.rung import ratio_of_sums
from distill.probe.scores import Reference, Scores, compare, metrics_of, score_encoder

N, K, T, WIDTH = 400, 4, 4, 8
GRID = (2, 2)
RUNGS = choose_rungs(None, has_labels=True, has_teacher=True)
# Three standard errors of an accuracy of 1 / K over the 120 test images.
CHANCE, SLACK = 1 / K, 3 * (1 / K * (1 - 1 / K) / 120) ** 0.5


@pytest.fixture(scope="module")
def cohort() -> Cohort:
    targets = np.arange(N, dtype=np.int64) % K
    domains = np.arange(N, dtype=np.int64) // K % 2
    split = split_by_group([""] * N, targets * 2 + domains, seed=0)
    at = np.arange(N)
    return Cohort(targets, tuple("abcd"), domains, ("x", "y"), at, split, 0, at, "data")


def features_of(tokens: Tensor) -> Features:
    """Features of two layers whose tokens `[N, T, D]` are given, the vectors being their means."""
    at = torch.arange(N)
    layers = {layer: tokens.mean(1) for layer in (-2, -1)}
    return Features(at % K, at // K % 2, at, layers, {layer: {GRID: tokens} for layer in layers}, tokens)


def random_tokens(seed: int) -> Tensor:
    return torch.randn(N, T, WIDTH, generator=torch.Generator().manual_seed(seed))


def oracle_tokens() -> Tensor:
    labels = torch.nn.functional.one_hot(torch.arange(N) % K, WIDTH).float()
    # No noise beside the label's channels: one shot a class cannot tell it from a signal, and standardises it to one.
    return labels[:, None] + 0.01 * random_tokens(5) * (torch.arange(WIDTH) < K)


@pytest.fixture(scope="module")
def judged(cohort: Cohort) -> dict[str, Scores]:
    torch.manual_seed(0)
    teacher = features_of(random_tokens(1))
    reference = Reference("teacher", teacher, GRID)
    oracle = score_encoder(features_of(oracle_tokens()), cohort, None, RUNGS, (-1,))
    random = score_encoder(features_of(random_tokens(2)), cohort, reference, RUNGS, (-2, -1))
    return {
        "random": random,
        "oracle": oracle,
        "teacher": score_encoder(teacher, cohort, reference, ["fidelity"], (-1,)),
    }


def values(scores: Scores, kind: str) -> dict[tuple[str, str, object], float]:
    kinds = {metric: about["kind"] for metric, about in metrics_of({"one": scores}).items()}
    return {
        (entry["metric"], entry["scope"], tuple(entry["at"] or ())): entry["value"]
        for entry in scores.entry["scores"]
        if kinds[entry["metric"]] == kind
    }


@pytest.mark.slow
def test_every_classifier_of_the_ladder_is_here(judged: dict[str, Scores]) -> None:
    metrics = {metric for metric, _, _ in values(judged["random"], "accuracy")}
    assert metrics == {"linear_top1", "knn_top1", "sgd_top1", "attentive_top1", "few_shot_top1", "retrieval_agreement"}


def test_random_features_score_at_chance_in_every_protocol(judged: dict[str, Scores]) -> None:
    for (metric, scope, at), value in values(judged["random"], "accuracy").items():
        if metric == "retrieval_agreement":
            assert value == pytest.approx(10 / 119, abs=0.03), (metric, scope, at)
        else:
            slack = SLACK if scope == "overall" else SLACK * 2**0.5
            assert value == pytest.approx(CHANCE, abs=slack), (metric, scope, at)


def test_features_that_encode_the_label_score_100_percent_in_every_protocol(judged: dict[str, Scores]) -> None:
    for (metric, scope, at), value in values(judged["oracle"], "accuracy").items():
        if metric != "retrieval_agreement":
            assert value == 1.0, (metric, scope, at)


def test_fidelity_is_one_for_the_teacher_itself_and_about_zero_for_random_features(judged: dict[str, Scores]) -> None:
    own, other = values(judged["teacher"], "cosine"), values(judged["random"], "cosine")
    assert all(value == pytest.approx(1.0, abs=1e-3) for value in own.values())
    assert all(abs(value) < 0.1 for (metric, _, _), value in other.items() if metric != "cosine_raw")
    agreement = values(judged["teacher"], "accuracy")
    assert all(value == 1.0 for (metric, _, _), value in agreement.items() if metric == "retrieval_agreement")
    distances = values(judged["teacher"], "distance"), values(judged["random"], "distance")
    assert all(value < 0.01 for value in distances[0].values())
    assert all(0.9 < value < 1.1 for value in distances[1].values())


def test_an_oracle_is_better_than_random_features_in_every_paired_accuracy(judged: dict[str, Scores]) -> None:
    found = compare(judged, [("oracle", "random")], 0)
    accuracies = [entry for entry in found if entry["metric"].endswith("top1")]
    assert accuracies
    assert {entry["verdict"] for entry in accuracies} == {"better"}
    errors = [entry for entry in found if entry["metric"] == "nll" and entry["scope"] == "overall"]
    assert [entry["verdict"] for entry in errors] == ["better"]
    assert errors[0]["difference"] < 0


def test_every_figure_has_n_seed_and_an_interval_around_it(judged: dict[str, Scores]) -> None:
    for scores in judged.values():
        for entry in scores.entry["scores"]:
            assert (entry["n"] > 0, entry["seed"]) == (True, 0)
            assert entry["low"] - 1e-9 <= entry["value"] <= entry["high"] + 1e-9, entry


def test_layers_give_curves_beside_the_last_ones_figures(judged: dict[str, Scores]) -> None:
    at = {metric: set() for metric in ("linear_top1", "knn_top1", "cosine_centred", "cka", "effective_rank")}
    for entry in judged["random"].entry["scores"]:
        if entry["metric"] in at:
            at[entry["metric"]].add(tuple(entry["at"] or ()))
    assert all(points == {(), ("layer", -1.0), ("layer", -2.0)} for points in at.values())


def test_expected_calibration_error_is_torchmetrics(cohort: Cohort) -> None:
    features = features_of(random_tokens(2) + 0.5 * oracle_tokens())
    scores, _, _ = classification_scores(features, cohort, ["calibration"], (-1,))
    (ece,) = [score for score in scores if score.metric == "ece"]
    targets = torch.from_numpy(cohort.targets)
    found = linear_probe(features.pooled, targets, cohort.labelled, num_classes=K)
    expected = measure_calibration(found.test_logits, targets[torch.from_numpy(cohort.labelled.test)])
    assert ratio_of_sums(ece.per_image.numerator, ece.per_image.denominator, ece.kind) == pytest.approx(
        expected.ece, abs=1e-6
    )


@pytest.mark.parametrize("rung", ["linear", "knn", "sgd", "attentive", "few_shot", "calibration"])
def test_features_that_are_not_finite_are_refused(cohort: Cohort, rung: str) -> None:
    tokens = random_tokens(3)
    tokens[7] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        classification_scores(features_of(tokens), cohort, [rung], (-1,))  # pyright: ignore


def test_rungs_that_cannot_be_had_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="--rungs dense: the rungs are linear, knn"):
        choose_rungs(["dense"], has_labels=True, has_teacher=True)  # pyright: ignore
    with pytest.raises(ConfigError, match="--rungs fidelity needs a teacher"):
        choose_rungs(["fidelity"], has_labels=True, has_teacher=False)
    with pytest.raises(ConfigError, match="--rungs sgd needs labelled images"):
        choose_rungs(["sgd"], has_labels=False, has_teacher=True)
    undemanding = choose_rungs(None, has_labels=False, has_teacher=False)
    assert undemanding == ("effective_rank", "segmentation", "ocr", "chart")
    assert choose_rungs(["knn", "linear"], has_labels=True, has_teacher=False) == ("linear", "knn")
