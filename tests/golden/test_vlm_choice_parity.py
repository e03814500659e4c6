"""Choices, yes and no, and boxes: every metric equals an independent scorer or a library's.

The rules here share no code with distill.vlm.scoring: letters by splitting as VLMEvalKit does, F1 by scikit-learn,
boxes by torchvision.
"""

from __future__ import annotations

import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import DataError
from distill.vlm.scoring import (
    box_accuracy,
    box_iou,
    circular_accuracy,
    circular_questions,
    format_choices,
    multiple_choice,
    parse_boxes,
    parse_choice,
    parse_yes_no,
    pope_f1,
)

# --- Multiple choice --------------------------------------------------------------------------------------------------

OPTIONS = ("a red cat", "a dog", "the moon", "none of the above")


@pytest.mark.parametrize(
    ("prediction", "chosen"),
    [
        ("B", 1),
        ("(C)", 2),
        ("D.", 3),
        (" B. a dog", 1),
        ("A: a red cat", 0),
        ("The answer is C", 2),
        ("The correct option is (B), since it barks.", 1),
        ("I think B fits best", 1),
        ("A dog can be seen", 1),  # "A" is an article here, and "a dog" an option's text
        ("It shows the moon.", 2),
        ("Either A or B", None),
        ("E", None),
        ("a cat", None),
        ("", None),
    ],
)
def test_the_choice_is_read_from_the_usual_forms_of_an_answer(prediction: str, chosen: int | None) -> None:
    assert parse_choice(prediction, OPTIONS) == chosen
    assert multiple_choice(prediction, OPTIONS, 1) == float(chosen == 1)


def test_an_option_inside_a_longer_option_does_not_count_beside_it() -> None:
    assert parse_choice("it is dark red", ["red", "dark red", "blue"]) == 1


def independent_choice(prediction: str, count: int) -> int | None:
    """The one capital letter of the options that stands alone, as VLMEvalKit splits an answer."""
    words = re.split(r"[\s.()\[\],:;!*#{}]+", prediction)
    found = [number for number in range(count) if chr(ord("A") + number) in words]
    return found[0] if len(found) == 1 else None


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(["B", "C", "D", "(B)", "C.", "so", "it", "must", "be", "[D]", "Z"]), min_size=1, max_size=5
    )
)
def test_a_letter_that_stands_alone_is_chosen_as_the_independent_rule_does(words: list[str]) -> None:
    prediction, options = " ".join(words), ("wwww", "xxxx", "yyyy", "zzzz")
    expected = independent_choice(prediction, 4)
    leads = re.match(r"(?:\(([B-D])\)|\[([D])\]|(C)\.)", prediction)  # a marked letter at the beginning comes first
    assert parse_choice(prediction, options) == (ord(max(filter(None, leads.groups()))) - 65 if leads else expected)


def test_a_question_is_asked_with_lettered_options() -> None:
    assert format_choices("Which?", ("x", "y")) == (
        "Which?\nA. x\nB. y\nAnswer with the option's letter from the given choices directly."
    )


def test_circular_evaluation_counts_a_question_only_where_every_order_is_right() -> None:
    turns = circular_questions(["p", "q", "r"], 1)
    assert turns == [(["p", "q", "r"], 1), (["q", "r", "p"], 0), (["r", "p", "q"], 2)]
    assert all(options[answer] == "q" for options, answer in turns)
    # Whoever always says A is right once in every three orders, and never by this rule (MMBench, arXiv 2307.06281).
    constant = [multiple_choice("A", options, answer) for options, answer in turns]
    assert constant == [0.0, 1.0, 0.0]
    knows = [multiple_choice("q", options, answer) for options, answer in turns]
    assert circular_accuracy({"one": constant, "two": knows, "three": [1, 1, 0], "four": [1]}) == 0.5


# --- POPE (arXiv 2305.10355) -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "is_yes"),
    [
        ("Yes", True),
        ("yes, there is a dog.", True),
        ("No", False),
        ("No, there is not.", False),
        ("There is not a dog", False),
        ("There is a dog. No cat though.", True),
        ("nothing", True),
        ("", True),
    ],
)
def test_yes_and_no_are_read_as_by_the_official_script(answer: str, is_yes: bool) -> None:
    assert parse_yes_no(answer) == is_yes


def test_pope_scores_equal_scikit_learns() -> None:
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    rng = random.Random(1)
    for _ in range(20):
        true = [rng.choice(["yes", "no"]) for _ in range(40)]
        said = [rng.choice(["Yes", "No", "no", "yes, a dog", "There is not."]) for _ in true]
        mine = pope_f1(said, true)
        yes = [not re.search(r"\b(?:No|no|not)\b", text.split(".")[0]) for text in said]
        wanted = [text == "yes" for text in true]
        precision, recall, f1, _ = precision_recall_fscore_support(wanted, yes, average="binary", zero_division=0)
        assert (mine.precision, mine.recall, mine.f1) == pytest.approx((precision, recall, f1))
        assert mine.accuracy == pytest.approx(accuracy_score(wanted, yes))
        assert mine.yes_ratio == pytest.approx(sum(yes) / 40)


def test_pope_without_a_true_positive_is_zero_and_not_an_error() -> None:
    assert pope_f1(["no", "no"], ["yes", "no"]).f1 == 0.0
    assert pope_f1(["yes"], ["no"]).precision == 0.0


# --- Boxes -----------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=8, max_size=8))
def test_box_iou_equals_torchvisions(values: list[int]) -> None:
    from torchvision.ops import box_iou as reference

    pair = [(min(a, c), min(b, d), max(a, c) + 1, max(b, d) + 1) for a, b, c, d in (values[:4], values[4:])]
    expected = reference(*(torch.tensor([box], dtype=torch.float64) for box in pair)).item()
    assert box_iou(*((float(a), float(b), float(c), float(d)) for a, b, c, d in pair)) == pytest.approx(
        expected, abs=1e-9
    )


def test_boxes_are_read_from_internvls_text() -> None:
    assert parse_boxes("<ref>a dog</ref><box>[[10, 20, 500, 1000]]</box>") == [(10, 20, 500, 1000)]
    assert parse_boxes("[[1,2,3,4], [5.5, 6, 7, 8]]") == [(1, 2, 3, 4), (5.5, 6, 7, 8)]
    assert parse_boxes("[1, 2, 3] and [a, b, c, d]") == []


def test_box_accuracy_wants_an_overlap_of_one_half() -> None:
    assert box_accuracy("[[0, 0, 100, 100]]", ["[[0, 0, 100, 200]]"]) == 1.0
    assert box_accuracy("[[0, 0, 100, 99]]", ["[[0, 0, 100, 200]]"]) == 0.0
    assert box_accuracy("there", ["[[0, 0, 100, 200]]"]) == 0.0
    assert box_iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0.0


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_scores_that_cannot_be_are_refused() -> None:
    with pytest.raises(DataError, match="yes or no, not 'maybe'"):
        pope_f1(["yes"], ["maybe"])
    with pytest.raises(DataError, match="0 predictions for 0"):
        pope_f1([], [])
    with pytest.raises(DataError, match="no question"):
        circular_accuracy({})
    with pytest.raises(DataError, match="two: none"):
        circular_accuracy({"one": [1], "two": []})
    with pytest.raises(DataError, match="number 4 of 2"):
        multiple_choice("A", ["x", "y"], 4)
    with pytest.raises(DataError, match="27 options"):
        parse_choice("A", ["x"] * 27)
