"""The rungs of the ladder, cheapest first: which there are, what each needs, and its figures as scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from distill.errors import ConfigError
from distill.probe.attentive import attentive_probe
from distill.probe.blind import commonest_class_accuracy
from distill.probe.calibration import NUM_BINS, calibrate
from distill.probe.classification import Classified
from distill.probe.cohort import Cohort
from distill.probe.feature_records import LAST, Features
from distill.probe.few_shot import few_shot_probe
from distill.probe.intervals import FloatArray
from distill.probe.knn import knn_probe
from distill.probe.linear import LinearResult, linear_probe
from distill.probe.rung import Kind, PerImage, RungScore
from distill.probe.score_intervals import parts_of
from distill.probe.sgd_grid import sgd_grid_probe

Rung = Literal[
    "linear",
    "knn",
    "fidelity",
    "effective_rank",
    "sgd",
    "attentive",
    "few_shot",
    "calibration",
    "segmentation",
    "ocr",
    "chart",
    "robustness",
]
LABELLED: tuple[Rung, ...] = ("linear", "knn", "sgd", "attentive", "few_shot", "calibration", "robustness")
"""Rungs that need labelled images; "fidelity" needs a teacher, "effective_rank" neither, and the others draw their own
data."""


def choose_rungs(asked: Sequence[Rung] | None, *, has_labels: bool, has_teacher: bool) -> tuple[Rung, ...]:
    """Return the rungs to climb, cheapest first.

    Args:
        asked: what `--rungs` names; None takes all that the data allows.
        has_labels: whether images are labelled.
        has_teacher: whether there is a teacher.

    Raises:
        ConfigError: a rung is unknown, or was asked for and cannot be had.
    """
    every: tuple[Rung, ...] = get_args(Rung)
    possible: list[Rung] = [
        rung for rung in every if (rung not in LABELLED or has_labels) and (rung != "fidelity" or has_teacher)
    ]
    if asked is None:
        return tuple(possible)
    unknown = [rung for rung in asked if rung not in every]
    if unknown or not asked:
        raise ConfigError(f"--rungs {', '.join(unknown) or '(none)'}: the rungs are {', '.join(every)}.")
    impossible = [rung for rung in asked if rung not in possible]
    if impossible:
        needs = "a teacher" if impossible[0] == "fidelity" else "labelled images"
        raise ConfigError(f"--rungs {impossible[0]} needs {needs}, and there are none here; leave it out.")
    return tuple(rung for rung in every if rung in asked)


def classification_scores(
    features: Features, cohort: Cohort, rungs: Sequence[Rung], layers: Sequence[int]
) -> tuple[list[RungScore], dict[str, dict[str, Any]], LinearResult | None]:
    """Climb the rungs that classify the cohort's labelled images.

    Args:
        features: of all images of the cohort, in its order.
        cohort: the images, with classes.
        rungs: which to climb.
        layers: with more than one, the linear and kNN probes give a point of a curve for each layer.

    Returns:
        The scores, the chosen settings of the rungs "linear" and "knn", and the last layer's linear probe, if a rung
        asked for it.
    """
    board = _Board(cohort)
    chosen: dict[str, dict[str, Any]] = {}
    linear: LinearResult | None = None
    for layer in sorted(layers, reverse=True):
        pooled = features.by_layer[layer]
        points = ([None] if layer == LAST else []) + ([("layer", float(layer))] if len(layers) > 1 else [])
        if "linear" in rungs or ("calibration" in rungs and layer == LAST):
            result = board.run(linear_probe, pooled)
            linear = result if layer == LAST else linear
            if "linear" in rungs:
                board.add("linear_top1", "Linear probe, top-1", result, points)
        if "knn" in rungs:
            board.add("knn_top1", "kNN, top-1", board.run(knn_probe, pooled), points)
    for score in board.scores:
        if score.at is None:
            chosen[score.metric] = dict(score.settings)
    _further(board, features, rungs, linear)
    return board.scores, chosen, linear


def _further(board: _Board, features: Features, rungs: Sequence[Rung], linear: LinearResult | None) -> None:
    cohort = board.cohort
    if "sgd" in rungs:
        by_layer = {f"layer {layer}": pooled for layer, pooled in features.by_layer.items()}
        result = sgd_grid_probe(
            by_layer, board.targets, cohort.labelled, num_classes=board.num_classes, seed=cohort.seed
        )
        board.add("sgd_top1", "Linear probe by SGD grid, top-1", result)
    if "attentive" in rungs and features.dense is not None:
        board.add(
            "attentive_top1", "Attentive probe, top-1", board.run(attentive_probe, features.dense, seed=cohort.seed)
        )
    if "few_shot" in rungs:
        _few_shot(board, features.pooled)
    if "calibration" in rungs and linear is not None:
        _calibration(board, linear)


class _Board:
    """Collects the scores of one encoder's classifiers."""

    def __init__(self, cohort: Cohort) -> None:
        self.cohort = cohort
        self.targets = torch.from_numpy(cohort.targets)
        self.num_classes = len(cohort.class_names)
        self.scores: list[RungScore] = []

    @property
    def test(self) -> Any:
        """Positions of the labelled test images."""
        return self.cohort.labelled.test

    @property
    def test_targets(self) -> Tensor:
        """Classes of the labelled test images."""
        return self.targets[torch.from_numpy(self.test)]

    def run(self, protocol: Callable[..., Any], features: Tensor, **options: Any) -> Any:
        """Return what a protocol finds."""
        return protocol(features, self.targets, self.cohort.labelled, num_classes=self.num_classes, **options)

    def add(
        self,
        metric: str,
        title: str,
        result: Classified,
        points: Sequence[tuple[str, float] | None] = (None,),
    ) -> None:
        """Add a classifier's accuracy at each of some points."""
        correct = (result.predictions == self.test_targets).numpy().astype(np.float64)
        score = self.score(metric, title, "accuracy", correct, result.settings)
        self.scores += [replace(score, at=point) for point in points]

    def score(self, metric: str, title: str, kind: Kind, values: FloatArray, settings: dict[str, Any]) -> RungScore:
        """Return the score of one value a test image."""
        cohort, at = self.cohort, self.test
        parts = parts_of(values, cohort.rows[at], cohort.groups[at], cohort.domains[at])
        score = RungScore(metric, title, kind, parts, settings, domain_names=cohort.domain_names, data=cohort.data)
        if kind != "accuracy":
            return score
        return replace(score, blind=commonest_class_accuracy(cohort.targets, cohort.labelled.fit, at))


def _few_shot(board: _Board, pooled: Tensor) -> None:
    for result in board.run(few_shot_probe, pooled, seed=board.cohort.seed):
        draws = result.correct(board.test_targets)
        score = board.score("few_shot_top1", "Few-shot linear probe, top-1", "accuracy", draws.mean(0), result.settings)
        board.scores.append(replace(score, draws=draws, at=("shots", float(result.shots))))


def _calibration(board: _Board, linear: LinearResult) -> None:
    select = board.targets[torch.from_numpy(board.cohort.labelled.select)]
    result = calibrate(linear.select_logits, select, linear.test_logits, board.test_targets)
    settings = {"temperature": result.temperature, "of": "linear probe"}
    for name, text, logits, found in (
        ("", "", linear.test_logits, result.raw),
        ("_scaled", ", after one temperature", linear.test_logits / result.temperature, result.scaled),
    ):
        chosen = settings if name else {"temperature": 1.0, "of": "linear probe"}
        board.scores += [
            _ece(board, f"ece{name}", f"Expected calibration error{text}", logits, {**chosen, "bins": NUM_BINS}),
            board.score(
                f"nll{name}",
                f"Negative log-likelihood, nats{text}",
                "calibration_error",
                found.nll_per_image.numpy(),
                chosen,
            ),
            board.score(
                f"brier{name}", f"Brier score{text}", "calibration_error", found.brier_per_image.numpy(), chosen
            ),
        ]


def _ece(board: _Board, metric: str, title: str, logits: Tensor, settings: dict[str, Any]) -> RungScore:
    """Expected calibration error as sums over images: a column a bin, confidence less correctness in the image's."""
    confidence, predicted = logits.double().softmax(1).max(1)
    gap = (confidence - (predicted == board.test_targets).double()).numpy()
    # As torchmetrics bins them: boundaries belong to the bin below.
    bins = np.clip(np.ceil(confidence.numpy() * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    denominator = np.eye(NUM_BINS)[bins]
    cohort, at = board.cohort, board.test
    parts = PerImage(cohort.rows[at], denominator * gap[:, None], denominator, cohort.groups[at], cohort.domains[at])
    return RungScore(
        metric, title, "calibration_error", parts, settings, domain_names=cohort.domain_names, data=cohort.data
    )
