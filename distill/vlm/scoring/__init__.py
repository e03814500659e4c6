"""How answers are scored: each metric as its paper or its official code has it; what differs is said at the metric.

A metric of one question takes the prediction and the reference answers and gives a value from 0 to 1, so that a score
is a mean over questions and intervals can be had by resampling them. POPE's F1 is a ratio of such sums; MMBench's
circular accuracy is a mean over records that are asked several times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from distill.vlm.scoring.boxes import box_accuracy, box_iou, parse_boxes
from distill.vlm.scoring.choice import (
    circular_accuracy,
    circular_questions,
    format_choices,
    multiple_choice,
    parse_choice,
)
from distill.vlm.scoring.pope import PopeScore, f1_parts, is_right_yes_no, parse_yes_no, pope_f1
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
    "f1_parts",
    "format_choices",
    "is_right_yes_no",
    "multiple_choice",
    "normalise_answer",
    "ocrbench",
    "ocrbench_formula",
    "parse_boxes",
    "parse_choice",
    "parse_yes_no",
    "pope_f1",
    "relaxed_accuracy",
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
"""Metrics of one question and its reference answers, by name. Beside these there are multiple choice, which needs the
options too, alone and circular, and POPE's yes or no."""
