"""Generated questions on drawn images, with known answers and a known chance level: does a small VLM see anything?

Four kinds: a word to read, a chart's type, a chart's value, discs to count. Answers are dealt in turn, so no constant
answer does better than chance, and no image is both in a training and in a held-out set of one size.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
from rich.progress import track

from distill.checkpoint_files import temporary_beside
from distill.data.synthetic.rendered import SPLITS, Split
from distill.errors import ConfigError
from distill.vlm.conversation import IMAGE_PLACE, Conversation, Turn
from distill.vlm.image_sources import EncodedImage
from distill.vlm.question_scenes import CHART_TYPES, CHART_VALUES, COUNTS, WORDS, draw_image

QuestionName = Literal["word", "chart_type", "chart_value", "count"]
MetricName = Literal["exact_match", "relaxed_accuracy"]

MIN_SIZE_PX = 32
_BAR_FROM = 2000


@dataclass(frozen=True)
class QuestionKind:
    """One kind of question.

    Attributes:
        question: the text that is asked.
        answers: all that can be right, each as often.
        metric: how an answer is scored; the values of charts lie further apart than the metric's tolerance.
    """

    question: str
    answers: tuple[str, ...]
    metric: MetricName = "exact_match"


QUESTION_KINDS: dict[QuestionName, QuestionKind] = {
    "word": QuestionKind("What word is written in the image?", WORDS),
    "chart_type": QuestionKind("What type of chart is this?", CHART_TYPES),
    "chart_value": QuestionKind("What is the value of the tallest bar?", CHART_VALUES, "relaxed_accuracy"),
    "count": QuestionKind("How many discs are there?", COUNTS),
}


@dataclass(frozen=True)
class QuestionConfig:
    """A set of generated questions.

    Attributes:
        kinds: kinds of questions; every kind has as many.
        questions_per_kind: how many of each.
        split: "train" or "heldout".
        img_size_px: side of the square images.
        seed: another seed draws other images of the same split.

    Raises:
        ConfigError: a value is unknown or out of range, or the fonts are not installed.
    """

    kinds: tuple[QuestionName, ...] = tuple(QUESTION_KINDS)
    questions_per_kind: int = 100
    split: Split = "train"
    img_size_px: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in QUESTION_KINDS]
        if unknown or not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ConfigError(
                f"kinds is {list(self.kinds)}; name each at most once, out of: {', '.join(QUESTION_KINDS)}."
            )
        if self.split not in SPLITS:
            raise ConfigError(f"Unknown split {self.split!r}; choose one of {', '.join(SPLITS)}.")
        if self.questions_per_kind < 1 or self.seed < 0:
            raise ConfigError(
                f"questions_per_kind is {self.questions_per_kind} and seed {self.seed}; there must be one question at "
                "least, and the seed must not be negative."
            )
        if self.img_size_px < MIN_SIZE_PX:
            raise ConfigError(f"img_size_px is {self.img_size_px}; the drawings need {MIN_SIZE_PX} px a side at least.")
        if find_spec("matplotlib") is None:
            raise ConfigError("The questions are drawn in matplotlib's fonts: pip install 'encoder-distill[demo]'.")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        kind: its kind.
        conversation: image, question and right answer.
    """

    kind: QuestionName
    conversation: Conversation

    @property
    def answer(self) -> str:
        """The right answer."""
        return self.conversation.answer

    @property
    def metric(self) -> MetricName:
        """How answers to it are scored."""
        return QUESTION_KINDS[self.kind].metric


def draw_questions(config: QuestionConfig) -> list[Question]:
    r"""Return generated questions, kinds in turn: a function of the configuration alone.

    Example:
        >>> question = draw_questions(QuestionConfig(kinds=("count",), questions_per_kind=1))[0]
        >>> question.conversation.turns[0].text, question.answer
        ('<image>\nHow many discs are there?', '1')
    """
    places: list[tuple[QuestionName, int]] = [
        (kind, number) for number in range(config.questions_per_kind) for kind in config.kinds
    ]
    shown = track(places, description="drawing questions", transient=True, disable=len(places) < _BAR_FROM)
    return [_draw_question(config, kind, number) for kind, number in shown]


def _draw_question(config: QuestionConfig, kind: QuestionName, number: int) -> Question:
    # The order of QUESTION_KINDS is part of a kind's stream, so that choosing other kinds does not change this one.
    stream = [config.seed, SPLITS.index(config.split), list(QUESTION_KINDS).index(kind), number]
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(stream)))
    of_kind = QUESTION_KINDS[kind]
    answer = of_kind.answers[number % len(of_kind.answers)]
    buffer = io.BytesIO()
    draw_image(kind, answer, config.split, config.img_size_px, rng).save(buffer, "PNG")
    name = f"{kind}-{config.split}-{config.seed}-{number:06d}"
    turns = (Turn("human", f"{IMAGE_PLACE}\n{of_kind.question}"), Turn("assistant", answer))
    return Question(kind, Conversation(name, turns, (EncodedImage(buffer.getvalue(), name),)))


def question_texts() -> list[str]:
    """Return all questions and answers: what a tiny tokenizer is built from."""
    return [text for kind in QUESTION_KINDS.values() for text in (kind.question, *kind.answers)]


def write_questions(questions: Sequence[Question], folder: Path, name: str) -> Path:
    """Write questions as LLaVA records with images beside them, for `read_records`.

    Args:
        questions: as `draw_questions` gives them.
        folder: gets `<name>.jsonl` and the folder `<name>/` of PNG images.
        name: of the set, as "train".

    Returns:
        The JSONL file. It is there only when all images are.

    Raises:
        OSError: the folder cannot be written.
    """
    images = folder / name
    images.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.jsonl"
    with temporary_beside(target) as temporary:
        with temporary.open("w", encoding="utf-8") as stream:
            for question in questions:
                record = _write_question(question, images)
                stream.write(json.dumps({**record, "kind": question.kind}, ensure_ascii=False) + "\n")
        temporary.replace(target)
    return target


def _write_question(question: Question, images: Path) -> dict[str, object]:
    conversation = question.conversation
    (source,) = conversation.images
    assert isinstance(source, EncodedImage), "drawn questions hold their image"
    file = images / f"{conversation.id}.png"
    file.write_bytes(source.data)
    turns = [
        {"from": "gpt" if turn.role == "assistant" else "human", "value": turn.text} for turn in conversation.turns
    ]
    return {"id": conversation.id, "image": f"{images.name}/{file.name}", "conversations": turns}
