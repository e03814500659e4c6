"""Metrics that compare a predicted text with reference texts: ANLS, relaxed accuracy, exact match, OCRBench."""

from __future__ import annotations

from collections.abc import Sequence

ANLS_THRESHOLD = 0.5
RELATIVE_TOLERANCE = 0.05


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 where the prediction is one of the answers, but for case, white space and a full stop at the end."""
    return float(_plain(prediction) in {_plain(answer) for answer in answers})


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".").strip()


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Return the average normalised Levenshtein similarity of one question, from 0 to 1.

    ST-VQA (arXiv 1905.13648), equation 1, as DocVQA and InfographicVQA use it: 1 minus the edit distance over the
    longer text's length where that ratio is below 0.5, else 0; the best answer counts. Case is ignored, and white
    space joined. A ratio of exactly 0.5 gives 0, as the equation says; VLMEvalKit's and lmms-eval's code gives 0.5.

    Args:
        prediction: predicted text.
        answers: reference answers.
    """
    predicted = _joined(prediction)
    best = 0.0
    for answer in map(_joined, answers):
        longer = max(len(predicted), len(answer))
        ratio = _edit_distance(predicted, answer) / longer if longer else 0.0
        best = max(best, 1 - ratio if ratio < ANLS_THRESHOLD else 0.0)
    return best


def _edit_distance(first: str, second: str) -> int:
    """Return the Levenshtein distance, row by row of its table; a library's would cost seconds to import."""
    previous = list(range(len(second) + 1))
    for row, letter in enumerate(first, start=1):
        current = [row]
        for column, other in enumerate(second, start=1):
            replaced = previous[column - 1] + (letter != other)
            current.append(min(replaced, previous[column] + 1, current[-1] + 1))
        previous = current
    return previous[-1]


def _joined(text: str) -> str:
    return " ".join(text.lower().split())


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 where a number is within 5 % of an answer, or a text equals it but for case (ChartQA, arXiv 2203.10244).

    As in pix2struct's scorer: a percentage is a number (`5%` is 0.05), and an answer of 0 must be met exactly as text.

    Args:
        prediction: predicted text or number.
        answers: reference answers.
    """
    return float(any(_is_relaxed_match(prediction.strip(), answer.strip()) for answer in answers))


def _is_relaxed_match(prediction: str, answer: str) -> bool:
    predicted, wanted = _number(prediction), _number(answer)
    if predicted is not None and wanted:
        return abs(predicted - wanted) / abs(wanted) <= RELATIVE_TOLERANCE
    return prediction.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def ocrbench(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 where an answer stands in the prediction, but for case (OCRBench, arXiv 2305.07895).

    The benchmark's score is the sum over its 1000 questions. An answer's line breaks count as spaces.

    Args:
        prediction: predicted text.
        answers: reference answers.
    """
    predicted = prediction.lower().strip().replace("\n", " ")
    return float(any(answer.lower().strip().replace("\n", " ") in predicted for answer in answers))


def ocrbench_formula(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 where an answer stands in the prediction, spaces left out: for OCRBench's formulas (HME100k)."""
    predicted = prediction.strip().replace("\n", " ").replace(" ", "")
    return float(any(answer.strip().replace("\n", " ").replace(" ", "") in predicted for answer in answers))
