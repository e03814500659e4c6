"""Multiple choice: reading a letter or an option out of an answer, and MMBench's circular evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from distill.errors import DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_LEADING = re.compile(r"^\W*([A-Z])(?:[\s.):,\]]*$|[.):\]])")
_STATED = re.compile(r"\b(?:answer|option|choice)\s*(?:is|:)?\s*:?\s*[\[(*\"']*([A-Z])\b(?!\s+[a-z])", re.IGNORECASE)
_NOT_NOUNS = frozenset(("or", "and", "is"))
"""After these a capital A is no article: "A or B"."""

_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}\"'?", " "))


def format_choices(question: str, options: Sequence[str]) -> str:
    """Return a question with its options, as LLaVA and InternVL ask it: `A. first`, a line for each.

    Args:
        question: the question.
        options: 1 to 26 of them.
    """
    lines = [f"{LETTERS[number]}. {option}" for number, option in enumerate(options)]
    return "\n".join([question, *lines, "Answer with the option's letter from the given choices directly."])


def parse_choice(prediction: str, options: Sequence[str]) -> int | None:
    """Return which option an answer chooses; None where it is not clear.

    In this order: a letter that is the whole answer or begins it (`B`, `(B)`, `B. cat`); one that is called answer or
    option (`the answer is B`); the one option letter that stands alone in it, where `A` before a small letter is taken
    for the article; the one option whose text stands in it, an option within another option's text not counted.

    Args:
        prediction: the answer.
        options: 2 to 26 texts.

    Raises:
        DataError: there are no options, or more than letters.
    """
    if not 1 <= len(options) <= len(LETTERS):
        raise DataError(f"A question has {len(options)} options; 1 to {len(LETTERS)} can be told apart by letters.")
    letters = LETTERS[: len(options)]
    text = prediction.strip()
    for pattern in (_LEADING, _STATED):
        found = {match.upper() for match in pattern.findall(text)}
        if len(found) == 1 and (letter := found.pop()) in letters:
            return letters.index(letter)
    words = text.translate(_MARKS).split()
    alone = {word for place, word in enumerate(words) if word in set(letters) and not _is_article(words, place)}
    if len(alone) == 1:
        return letters.index(alone.pop())
    return None if alone else _by_text(text, options)


def _is_article(words: Sequence[str], place: int) -> bool:
    following = words[place + 1] if place + 1 < len(words) else ""
    return words[place] == "A" and following[:1].islower() and following not in _NOT_NOUNS


def _by_text(text: str, options: Sequence[str]) -> int | None:
    lowered = [option.lower().strip() for option in options]
    inside = [number for number, option in enumerate(lowered) if option and option in text.lower()]
    # "red" stands in the answer "dark red" too, but the longer option is the one that was meant.
    longest = [
        number
        for number in inside
        if not any(other != number and lowered[number] in lowered[other] for other in inside)
    ]
    return longest[0] if len(longest) == 1 else None


def multiple_choice(prediction: str, options: Sequence[str], answer: int) -> float:
    """Return 1 where the prediction chooses the right option: AI2D, ScienceQA, MMMU's multiple-choice questions.

    Args:
        prediction: the model's answer.
        options: the texts offered.
        answer: number of the right one, from 0.

    Raises:
        DataError: the right option is not among them.
    """
    if not 0 <= answer < len(options):
        raise DataError(f"The right option is number {answer} of {len(options)}; options are counted from 0.")
    return float(parse_choice(prediction, options) == answer)


def circular_questions(options: Sequence[str], answer: int) -> list[tuple[list[str], int]]:
    """Return a question's options in each circular order, each with the number of the right one (MMBench).

    Args:
        options: the texts, in their first order.
        answer: number of the right one.
    """
    count = len(options)
    return [([*options[turn:], *options[:turn]], (answer - turn) % count) for turn in range(count)]


def circular_accuracy(scores: Mapping[str, Sequence[float]]) -> float:
    """Return MMBench's circular accuracy: a question counts where it was answered rightly in every order.

    Args:
        scores: of each question, by its id, whether each order was right (1 or 0).

    Raises:
        DataError: there is no question, or one has no order.
    """
    empty = [name for name, of_question in scores.items() if not of_question]
    if empty or not scores:
        raise DataError(
            f"Circular accuracy needs an answer for each question; {', '.join(empty) or 'no question'}: none."
        )
    return sum(all(of_question) for of_question in scores.values()) / len(scores)
