"""Every metric equals an independent scorer, written here from its paper or taken from a library.

The scorers below share no code with distill.vlm.scoring and are built another way where that is possible: sets of
annotators by combinations instead of leaving one out by count, a recursive edit distance, fractions instead of floats,
regular expressions instead of loops for the normalisation of answers. Choices and boxes: test_vlm_choice_parity.py.
"""

from __future__ import annotations

import doctest
import random
import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import cache
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.vlm.scoring import (
    anls,
    exact_match,
    normalise_answer,
    ocrbench,
    ocrbench_formula,
    relaxed_accuracy,
    vqa,
    vqa_accuracy,
)

# --- VQA accuracy (visualqa.org/evaluation.html) -------------------------------------------------------------------


def independent_vqa_accuracy(prediction: str, answers: list[str]) -> Fraction:
    """The mean of min(#/3, 1) over all subsets of nine annotators, on words that need no normalisation."""
    subsets = list(combinations(answers, len(answers) - 1))
    return sum((min(Fraction(subset.count(prediction), 3), Fraction(1)) for subset in subsets), Fraction(0)) / len(
        subsets
    )


@pytest.mark.parametrize(
    ("agreeing", "expected"), [(0, "0"), (1, "0.3"), (2, "0.6"), (3, "0.9"), (4, "1"), (9, "1"), (10, "1")]
)
def test_vqa_accuracy_of_ten_annotators_is_the_published_table(agreeing: int, expected: str) -> None:
    answers = ["yes"] * agreeing + ["no"] * (10 - agreeing)
    assert vqa_accuracy("yes", answers) == pytest.approx(float(Decimal(expected)), abs=1e-12)
    assert independent_vqa_accuracy("yes", answers) == Fraction(Decimal(expected))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["red", "blue", "green"]), min_size=2, max_size=10))
def test_vqa_accuracy_equals_the_mean_over_all_sets_without_one_annotator(answers: list[str]) -> None:
    assert vqa_accuracy("red", answers) == pytest.approx(float(independent_vqa_accuracy("red", answers)), abs=1e-12)


def independent_normalisation(text: str) -> str:
    """The official normalisation, by regular expressions."""
    text = re.sub(r"[\n\t]", " ", text).strip()
    marks = re.escape(';/[]"{}()=+\\_-><@`,?!')
    has_thousands = re.search(r"[0-9],[0-9]", text)
    beside = {
        mark for mark in re.findall(f"[{marks}]", text) if has_thousands or f"{mark} " in text or f" {mark}" in text
    }
    text = re.sub(f"[{marks}]", lambda found: "" if found[0] in beside else " ", text)
    text = re.sub(r"\.(?![0-9])", "", text).lower()
    names = ["none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    words = [str(names.index(word)) if word in names else "0" if word == "zero" else word for word in text.split()]
    return " ".join(word for word in words if word not in {"a", "an", "the"})


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [*'abc;/[]"{}()=+\\_-><@`,?!.:', "the", "An", "ten", "Zero", "none", "1,000", "3.5", "dog", "%"]
            ),
            st.sampled_from(["", " ", "  ", "\n"]),
        ),
        max_size=8,
    )
)
def test_normalised_answers_equal_the_independent_normalisation(parts: list[tuple[str, str]]) -> None:
    text = "".join(part + gap for part, gap in parts)
    assert normalise_answer(text) == independent_normalisation(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Entries of the official table: manual map, articles, contractions; and its rule for commas between digits.
        ("The Two dogs.", "2 dogs"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("oclock", "o'clock"),
        ("its", "its"),
        ("1,000", "1000"),
        ("hot-dog", "hot dog"),
        ("hot - dog", "hot dog"),
        ("3.5.", "3.5"),
        ("yes!", "yes"),
    ],
)
def test_answers_are_normalised_as_in_the_official_tables(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


def test_a_single_reference_answer_is_compared_by_itself() -> None:
    assert vqa_accuracy("A cat.", ["cat"]) == 1.0
    assert vqa_accuracy("dog", ["cat"]) == 0.0


# --- ANLS (arXiv 1905.13648, equation 1) -----------------------------------------------------------------------------


@cache
def independent_distance(first: str, second: str) -> int:
    if not first or not second:
        return len(first) + len(second)
    if first[0] == second[0]:
        return independent_distance(first[1:], second[1:])
    cut = (independent_distance(first[1:], second), independent_distance(first, second[1:]))
    return 1 + min(*cut, independent_distance(first[1:], second[1:]))


def independent_anls(prediction: str, answers: list[str]) -> Fraction:
    best = Fraction(0)
    for answer in answers:
        one, other = prediction.lower(), answer.lower()
        ratio = Fraction(independent_distance(one, other), max(len(one), len(other), 1))
        best = max(best, 1 - ratio if ratio < Fraction(1, 2) else Fraction(0))
    return best


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Coca Cola", ["coca cola"], "1"),
        ("Coca Cola", ["coca-cola", "coca cola company"], "8/9"),
        ("coca", ["coca cola"], "0"),
        ("ab", ["ac"], "0"),  # a ratio of exactly 0.5 is not below the threshold
        ("abc", ["abd"], "2/3"),
        ("  New   York ", ["new york"], "1"),
        ("", ["x"], "0"),
    ],
)
def test_anls_on_examples_by_hand(prediction: str, answers: list[str], expected: str) -> None:
    assert anls(prediction, answers) == pytest.approx(float(Fraction(expected)), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.text("abC1", min_size=1, max_size=7), st.lists(st.text("aBc1", min_size=1, max_size=7), min_size=1, max_size=3)
)
def test_anls_equals_the_independent_scorer(prediction: str, answers: list[str]) -> None:
    assert anls(prediction, answers) == pytest.approx(float(independent_anls(prediction, answers)), abs=1e-12)


@pytest.mark.slow
def test_anls_equals_one_by_torchmetrics_edit_distance() -> None:
    from torchmetrics.functional.text import edit_distance

    rng = random.Random(2)
    for _ in range(200):
        one, other = ("".join(rng.choices("ab c1", k=rng.randint(1, 30))) for _ in range(2))
        one, other = (" ".join(text.split()) or "x" for text in (one, other))
        other = one[: rng.randint(0, len(one))].strip() + other[:3].strip() or "y"
        ratio = float(edit_distance([one], [other], reduction="sum")) / max(len(one), len(other))
        assert anls(one, [other]) == pytest.approx(1 - ratio if ratio < 0.5 else 0.0, abs=1e-6)


# --- Relaxed accuracy (ChartQA, arXiv 2203.10244, section 5.1) -------------------------------------------------------


def independent_relaxed(prediction: str, answer: str) -> bool:
    """Within 5 % in exact decimals; else equal text but for case."""

    def read(text: str) -> Fraction | None:
        try:
            number = Decimal(text.removesuffix("%"))
        except InvalidOperation:
            return None
        return Fraction(number) / (100 if text.endswith("%") else 1)

    said, true = read(prediction), read(answer)
    if said is None or not true:
        return prediction.lower() == answer.lower()
    return abs(said - true) * 20 <= abs(true)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("104.9", "100", 1.0),
        ("105", "100", 1.0),
        ("105.1", "100", 0.0),
        ("-95", "-100", 1.0),
        ("5%", "0.05", 1.0),
        ("5", "5%", 0.0),
        ("0", "0", 1.0),
        ("0.0", "0", 0.0),  # no relative change of nothing: compared as text
        ("Yes", "yes", 1.0),
        ("2019 ", "2019", 1.0),
        ("1,000", "1000", 0.0),
        ("red", "blue", 0.0),
    ],
)
def test_relaxed_accuracy_on_examples_of_its_rule(prediction: str, answer: str, expected: float) -> None:
    assert relaxed_accuracy(prediction, [answer]) == expected
    assert independent_relaxed(prediction.strip(), answer) == bool(expected)


@settings(max_examples=150, deadline=None)
@given(st.integers(-300, 300), st.integers(-300, 300))
def test_relaxed_accuracy_equals_exact_fractions(said: int, true: int) -> None:
    assert relaxed_accuracy(str(said), [str(true)]) == float(independent_relaxed(str(said), str(true)))


# --- Exact match ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [("Cat.", ["cat"], 1.0), ("the cat", ["cat"], 0.0), (" two  cats ", ["dog", "Two cats"], 1.0), ("", ["cat"], 0.0)],
)
def test_exact_match_ignores_case_space_and_a_final_stop(prediction: str, answers: list[str], expected: float) -> None:
    assert exact_match(prediction, answers) == expected


# --- OCRBench (arXiv 2305.07895) -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("The word is CENTRE.", ["centre"], 1.0),
        ("centr", ["centre"], 0.0),
        ("12.50", ["$12.50", "12.50"], 1.0),
        ("line one\nline two", ["line one line two"], 1.0),
        ("categories", ["cat"], 1.0),  # containment, whole words or not
    ],
)
def test_ocrbench_counts_containment(prediction: str, answers: list[str], expected: float) -> None:
    assert ocrbench(prediction, answers) == expected
    assert any(a.casefold() in " ".join(prediction.casefold().splitlines()) for a in answers) == bool(expected)


def test_ocrbench_formulas_keep_case_and_leave_spaces_out() -> None:
    assert ocrbench_formula("x ^ { 2 } + Y", ["x^{2} + Y"]) == 1.0
    assert ocrbench_formula("x ^ { 2 } + y", ["x^{2} + Y"]) == 0.0


def test_the_example_runs() -> None:
    results = doctest.testmod(vqa)
    assert results.attempted
    assert not results.failed
