"""From answers to figures: each kind of question by itself, POPE's F1, MMBench's circles, and chance beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distill.probe.rung import PerImage, RungScore
from distill.vlm.answers import POPE, Answer, ScoredQuestion
from distill.vlm.scoring import circular_accuracy, f1_parts, pope_f1

OVERALL_METRIC = "vlm_all"
POPE_METRIC = "vlm_pope_f1"


@dataclass(frozen=True)
class _Counted:
    """What counts once: a question, or all orders of a circular one.

    Attributes:
        row: number of its first answer.
        question: as it was asked first.
        value: from 0 to 1.
    """

    row: int
    question: ScoredQuestion
    value: float


def rungs_of(answers: Sequence[Answer], fingerprint: str) -> list[RungScore]:
    """Return a figure for each kind of question, one for all together where there are several, and F1 of POPE's.

    Args:
        answers: one for each question.
        fingerprint: of the questions.
    """
    counted = _count(answers)
    kinds = list(dict.fromkeys(entry.question.kind for entry in counted))
    groups = [(f"vlm_{kind}", _title(kind), [kind]) for kind in kinds]
    if len(kinds) > 1:
        groups.insert(0, (OVERALL_METRIC, "VLM: all questions", kinds))
    found: list[RungScore] = []
    for metric, title, members in groups:
        chosen = [entry for entry in counted if entry.question.kind in members]
        rows = np.array([entry.row for entry in chosen])
        values = np.array([[entry.value] for entry in chosen], dtype=np.float64)
        parts = PerImage(rows, values, np.ones_like(values), rows)
        blind = chance([entry.question for entry in chosen])
        found.append(RungScore(metric, title, "accuracy", parts, {}, data=fingerprint, blind=blind))
    return found + _pope_rungs(answers, fingerprint)


def _title(kind: str) -> str:
    return f"VLM: {kind.replace('_', ' ')}"


def _count(answers: Sequence[Answer]) -> list[_Counted]:
    circles: dict[str, list[float]] = {}
    for answer in answers:
        if answer.question.circle:
            circles.setdefault(answer.question.circle, []).append(answer.value)
    found: list[_Counted] = []
    for row, answer in enumerate(answers):
        circle = answer.question.circle
        if not circle:
            found.append(_Counted(row, answer.question, answer.value))
        elif circle in circles:
            found.append(_Counted(row, answer.question, circular_accuracy({circle: circles.pop(circle)})))
    return found


def _pope_rungs(answers: Sequence[Answer], fingerprint: str) -> list[RungScore]:
    """Return F1 of each of POPE's sets, and their mean where there are several; sets without a yes have none."""
    sets = pope_sets(answers)
    groups = [(f"vlm_{kind}_f1", f"{_title(kind)}, F1", [kind]) for kind in sets]
    if len(sets) > 1:
        groups.insert(0, (POPE_METRIC, "VLM: POPE, mean F1 of its sets", list(sets)))
    found: list[RungScore] = []
    for metric, title, members in groups:
        rows = np.array([row for row, answer in enumerate(answers) if answer.question.kind in members])
        numerator, denominator = np.zeros((len(rows), len(members))), np.zeros((len(rows), len(members)))
        for place, row in enumerate(rows.tolist()):
            question = answers[row].question
            column = members.index(question.kind)
            numerator[place, column], denominator[place, column] = f1_parts(answers[row].text, question.answers[0])
        blind = sum(_f1_of_always_yes(sets[kind]) for kind in members) / len(members)
        parts = PerImage(rows, numerator, denominator, rows)
        found.append(RungScore(metric, title, "accuracy", parts, {}, data=fingerprint, blind=blind))
    return found


def pope_sets(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Return the answers of POPE's sets by kind: those whose questions are all POPE's, at least one answered by yes."""
    kinds = dict.fromkeys(answer.question.kind for answer in answers)
    sets = {kind: [answer for answer in answers if answer.question.kind == kind] for kind in kinds}
    return {
        kind: given
        for kind, given in sets.items()
        if all(answer.question.metric == POPE for answer in given)
        and any(f1_parts("yes", answer.question.answers[0])[0] for answer in given)
    }


def _f1_of_always_yes(answers: Sequence[Answer]) -> float:
    return pope_f1(["yes"] * len(answers), [answer.question.answers[0] for answer in answers]).f1


def pope_results(answers: Sequence[Answer]) -> dict[str, float]:
    """Return what POPE reports of each of its sets beside accuracy and F1: precision, recall and the share of yes."""
    found: dict[str, float] = {}
    for kind, given in pope_sets(answers).items():
        score = pope_f1([answer.text for answer in given], [answer.question.answers[0] for answer in given])
        found |= {
            f"vlm_{kind}_precision": score.precision,
            f"vlm_{kind}_recall": score.recall,
            f"vlm_{kind}_yes_ratio": score.yes_ratio,
        }
    return found


def chance(questions: Sequence[ScoredQuestion]) -> float:
    """Return what the best constant answer to each kind of question scores: who sees no image cannot expect more."""
    right = 0
    for kind in {question.kind for question in questions}:
        answers = [question.answers for question in questions if question.kind == kind]
        candidates = {answer for given in answers for answer in given}
        right += max(sum(candidate in given for given in answers) for candidate in candidates)
    return right / len(questions)
