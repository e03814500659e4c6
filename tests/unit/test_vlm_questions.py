"""Generated questions: known answers that are seen in the image, a known chance level, and no image in both splits."""

from __future__ import annotations

import doctest
import hashlib
import json
import math
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from distill.data.synthetic.rendered import SPLITS
from distill.errors import ConfigError
from distill.vlm import questions as questions_module
from distill.vlm.image_sources import EncodedImage
from distill.vlm.question_scenes import split_of
from distill.vlm.questions import (
    QUESTION_KINDS,
    Question,
    QuestionConfig,
    draw_questions,
    question_texts,
    write_questions,
)
from distill.vlm.records import read_records
from distill.vlm.scoring import METRICS, relaxed_accuracy


def pixels(question: Question) -> np.ndarray:
    return np.asarray(question.conversation.images[0].read())


def digest(question: Question) -> str:
    return hashlib.sha256(pixels(question).tobytes()).hexdigest()


def test_questions_are_a_function_of_their_configuration() -> None:
    config = QuestionConfig(questions_per_kind=6)
    first, second = draw_questions(config), draw_questions(config)
    assert [digest(question) for question in first] == [digest(question) for question in second]
    assert [question.answer for question in first] == [question.answer for question in second]
    other = draw_questions(QuestionConfig(questions_per_kind=6, seed=1))
    assert not {digest(question) for question in first} & {digest(question) for question in other}


def test_train_and_held_out_sets_have_no_image_in_common_whatever_their_seeds() -> None:
    seen: dict[str, set[str]] = {"train": set(), "heldout": set()}
    for split, seed in product(SPLITS, range(3)):
        for question in draw_questions(QuestionConfig(("count",), 60, split, 32, seed)):
            # A function of the pixels alone says the split, so one image cannot be in both.
            assert split_of(question.conversation.images[0].read()) == split
            seen[split].add(digest(question))
    assert not seen["train"] & seen["heldout"]
    assert min(map(len, seen.values())) > 100, "the images are not all the same"


def test_other_kinds_do_not_change_a_kinds_questions() -> None:
    alone = draw_questions(QuestionConfig(("count",), 5))
    beside = draw_questions(QuestionConfig(("word", "count"), 5))
    assert [digest(question) for question in alone] == [
        digest(question) for question in beside if question.kind == "count"
    ]


@pytest.mark.parametrize("kind", sorted(QUESTION_KINDS))
def test_no_constant_answer_does_better_than_chance(kind: str) -> None:
    for count in (40, 43):
        questions = draw_questions(QuestionConfig((kind,), count, img_size_px=32))  # type: ignore[arg-type]
        answers = [[question.answer] for question in questions]
        scores = {
            constant: sum(METRICS[questions[0].metric](constant, given) for given in answers) / count
            for constant in QUESTION_KINDS[kind].answers  # type: ignore[index]
        }
        # Answers are dealt in turn.
        assert max(scores.values()) == pytest.approx(math.ceil(count / len(scores)) / count)
        assert len(scores) == len(Counter(question.answer for question in questions))


def test_a_charts_values_lie_further_apart_than_relaxed_accuracy_tolerates() -> None:
    values = QUESTION_KINDS["chart_value"].answers
    assert all(relaxed_accuracy(one, [other]) == (one == other) for one in values for other in values)


def test_as_many_discs_are_drawn_as_the_answer_says() -> None:
    for question in draw_questions(QuestionConfig(("count",), 25, img_size_px=112)):
        image = pixels(question).astype(int)
        is_ink = np.abs(image - image[0, 0]).sum(-1) > 60
        assert ndimage.label(is_ink)[1] == int(question.answer)


def test_the_tallest_bar_has_the_value_that_the_answer_says() -> None:
    for question in draw_questions(QuestionConfig(("chart_value",), 25, img_size_px=448)):
        # Right of the axis and above it; the grid's lines are light, the bars are not.
        image = pixels(question)[60:379, 76:400]
        rows = np.flatnonzero((image.min(-1) < 140).sum(1) > 30)
        top = 60 + rows[0]
        assert (380 - top) / 320 * 100 == pytest.approx(int(question.answer), abs=1.5)


def test_words_and_chart_types_look_different_for_different_answers() -> None:
    for kind, low in (("word", 8), ("chart_type", 4)):
        questions = draw_questions(QuestionConfig((kind,), 8, img_size_px=64))  # type: ignore[arg-type]
        assert len({digest(question) for question in questions}) == 8
        assert len({question.answer for question in questions}) == low
        assert all(pixels(question).std() > 5 for question in questions)


def test_written_questions_are_read_back_as_records(tmp_path: Path) -> None:
    questions = draw_questions(QuestionConfig(questions_per_kind=2, img_size_px=32))
    file = write_questions(questions, tmp_path, "train")
    records = read_records(file, "instruction")
    for question, record in zip(questions, records, strict=True):
        assert record.turns == question.conversation.turns
        assert np.array_equal(np.asarray(record.images[0].read()), pixels(question))
    assert [json.loads(line)["kind"] for line in file.read_text().splitlines()] == [q.kind for q in questions]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "train.jsonl"]


def test_every_text_of_the_questions_is_known_to_a_tokenizer_made_for_them() -> None:
    known = set(question_texts())
    for question in draw_questions(QuestionConfig(questions_per_kind=8, img_size_px=32)):
        asked, answered = (turn.text for turn in question.conversation.turns)
        assert {asked.removeprefix("<image>\n"), answered} <= known
        assert isinstance(question.conversation.images[0], EncodedImage)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ("word", "colour")}, "out of: word, chart_type"),
        ({"kinds": ("word", "word")}, "at most once"),
        ({"kinds": ()}, "name each"),
        ({"split": "test"}, "train, heldout"),
        ({"questions_per_kind": 0}, "questions_per_kind is 0"),
        ({"seed": -1}, "seed -1"),
        ({"img_size_px": 31}, "32 px a side"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuestionConfig(**settings)  # type: ignore[arg-type]


def test_the_example_runs() -> None:
    results = doctest.testmod(questions_module)
    assert results.attempted
    assert not results.failed
