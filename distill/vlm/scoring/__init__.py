"""How answers are scored: each metric as its paper or its official code has it; what differs is said at the metric.

A metric of one question takes the prediction and the reference answers and gives a value from 0 to 1, so that a score
is a mean over questions and intervals can be had by resampling them. POPE's F1 and MMBench's circular accuracy are no
such means: they take all answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from distill.errors import ConfigError, DataError
from distill.vlm.scoring.boxes import box_accuracy, box_iou, parse_boxes
from distill.vlm.scoring.choice import (
    circular_accuracy,
    circular_questions,
    format_choices,
    multiple_choice,
    parse_choice,
)
from distill.vlm.scoring.pope import PopeScore, parse_yes_no, pope_f1
from distill.vlm.scoring.text import anls, exact_match, ocrbench, ocrbench_formula, relaxed_accuracy
from distill.vlm.scoring.vqa import normalise_answer, vqa_accuracy

__all__ = [
    "METRICS",
    "MetricName",
    "PopeScore",
    "anls",
    "box_accuracy",
    "box_iou",
    "circular_accuracy",
    "circular_questions",
    "exact_match",
    "format_choices",
    "multiple_choice",
    "normalise_answer",
    "ocrbench",
    "ocrbench_formula",
    "parse_boxes",
    "parse_choice",
    "parse_yes_no",
    "pope_f1",
    "relaxed_accuracy",
    "score_answers",
    "vqa_accuracy",
]

MetricName = Literal[
    "vqa_accuracy", "anls", "relaxed_accuracy", "exact_match", "ocrbench", "ocrbench_formula", "box_accuracy"
]

METRICS: dict[MetricName, Callable[[str, Sequence[str]], float]] = {
    "vqa_accuracy": vqa_accuracy,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "exact_match": exact_match,
    "ocrbench": ocrbench,
    "ocrbench_formula": ocrbench_formula,
    "box_accuracy": box_accuracy,
}
"""Metrics of one question, by name. Multiple choice needs the options too: `multiple_choice`."""


def score_answers(metric: MetricName, predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """Return each prediction's score, from 0 to 1.

    Args:
        metric: one of `METRICS`.
        predictions: one a question.
        answers: the reference answers of each question, at least one.

    Raises:
        ConfigError: the metric is unknown.
        DataError: predictions and questions differ in number, or a question has no reference answer.
    """
    if metric not in METRICS:
        raise ConfigError(f"Unknown metric {metric!r}; choose one of {', '.join(METRICS)}.")
    if len(predictions) != len(answers):
        raise DataError(f"{len(predictions)} predictions for {len(answers)} questions; give one for each.")
    bare = next((number for number, given in enumerate(answers) if not given), None)
    if bare is not None:
        raise DataError(f"Question {bare} has no reference answer; give at least one, or leave it out.")
    return [METRICS[metric](prediction, given) for prediction, given in zip(predictions, answers, strict=True)]
