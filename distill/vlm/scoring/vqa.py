"""VQA accuracy with its official normalisation of answers (visualqa.org/evaluation.html; VQA, arXiv 1505.00468)."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NEEDED_MATCHES = 3

_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = frozenset(("a", "an", "the"))

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")

# The official list of contractions: a form that lacks an apostrophe is given it back. Forms that are words of their own
# ("its", "ill", "well", "shed") are not in it.
_CONTRACTIONS = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_DOUBLE_CONTRACTIONS = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""


def _contraction_table() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _CONTRACTIONS.split()}
    for word in _DOUBLE_CONTRACTIONS.split():
        first, second = (place for place, letter in enumerate(word) if letter == "'")
        table[word[:first] + word[first + 1 :]] = word
        table[word[:second] + word[second + 1 :]] = word
    # Entries of the official list that follow no rule, kept because answers are compared after it.
    table |= {"somebody'd": "somebodyd", "someonell": "someone'll"}
    table |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    return table


_APOSTROPHES = _contraction_table()


def normalise_answer(text: str) -> str:
    """Return an answer as VQA accuracy compares it.

    Lower case; punctuation removed where it stands beside a space or the text has a number with a comma, else made a
    space; full stops removed unless a digit follows; number words as digits; articles left out; apostrophes of
    contractions put back.

    Example:
        >>> normalise_answer("The two  dogs, dont you think?")
        "2 dogs don't you think"
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_comma_number = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if is_beside_space or has_comma_number else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", cleaned).lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return VQA accuracy: the mean over all sets of annotators without one of min(matches / 3, 1).

    With ten annotators, 1, 2, 3 and 4 equal answers give 0.3, 0.6, 0.9 and 1. Prediction and answers are always
    normalised; the official code leaves the answers as they are where all ten agree, which matters for answers that
    were not normalised before.

    Args:
        prediction: predicted answer.
        answers: one of each annotator, usually ten. A single one is compared by itself: the rule would give it 0.
    """
    predicted = normalise_answer(prediction)
    matches = [normalise_answer(answer) == predicted for answer in answers]
    if len(matches) == 1:
        return float(matches[0])
    total = sum(matches)
    return sum(min((total - match) / _NEEDED_MATCHES, 1.0) for match in matches) / len(matches)
