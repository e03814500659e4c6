"""POPE: does an object stand in the image, yes or no (arXiv 2305.10355)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distill.errors import DataError

_NO_WORDS = frozenset(("No", "not", "no"))


@dataclass(frozen=True)
class PopeScore:
    """What POPE reports for one set of questions; "yes" is the positive class.

    Attributes:
        f1: harmonic mean of precision and recall; 0 without a true positive.
        accuracy: share of right answers.
        precision: share of "yes" answers that are right; 0 without any.
        recall: share of "yes" questions answered so; 0 without any.
        yes_ratio: share of "yes" answers.
    """

    f1: float
    accuracy: float
    precision: float
    recall: float
    yes_ratio: float


def parse_yes_no(prediction: str) -> bool:
    """Return whether an answer means yes: it does unless its first sentence has the word no or not.

    As in the official script: the first sentence ends at the first full stop, and commas are left out.
    """
    first = prediction.split(".")[0].replace(",", "")
    return not _NO_WORDS & set(first.split(" "))


def is_right_yes_no(prediction: str, answer: str) -> float:
    """Return 1 where an answer means what the right one, yes or no, says: POPE's accuracy of one question."""
    return float(parse_yes_no(prediction) == _is_yes(answer))


def f1_parts(prediction: str, answer: str) -> tuple[float, float]:
    """Return what a question brings to F1's numerator and denominator.

    F1 is 2 TP / (2 TP + FP + FN), a ratio of sums over questions, so that it can be resampled and paired by question.
    """
    said, wanted = parse_yes_no(prediction), _is_yes(answer)
    return 2.0 * (said and wanted), float(said) + float(wanted)


def _is_yes(answer: str) -> bool:
    return answer.strip().lower() == "yes"


def pope_f1(predictions: Sequence[str], answers: Sequence[str]) -> PopeScore:
    """Return POPE's scores of one of its sets (random, popular or adversarial); papers report the mean F1 of the three.

    Args:
        predictions: the model's answers.
        answers: "yes" or "no" each.

    Raises:
        DataError: the numbers differ, there is none, or an answer is neither yes nor no.
    """
    wrong = [answer for answer in answers if answer.strip().lower() not in ("yes", "no")]
    if wrong:
        raise DataError(f"POPE's answers are yes or no, not {wrong[0]!r}.")
    if len(predictions) != len(answers) or not answers:
        raise DataError(
            f"{len(predictions)} predictions for {len(answers)} questions; give one for each, and at least one."
        )
    said = [parse_yes_no(prediction) for prediction in predictions]
    true = [_is_yes(answer) for answer in answers]
    hits = sum(predicted and wanted for predicted, wanted in zip(said, true, strict=True))
    right = sum(predicted == wanted for predicted, wanted in zip(said, true, strict=True))
    precision = hits / sum(said) if any(said) else 0.0
    recall = hits / sum(true) if any(true) else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return PopeScore(f1, right / len(true), precision, recall, sum(said) / len(said))
