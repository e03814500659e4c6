"""Asking a trained VLM the questions of a file, and what each answer is worth."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.progress import track

from distill.errors import DataError
from distill.vlm.batch import collate
from distill.vlm.build import BuiltVLM
from distill.vlm.conversation import Conversation, Turn
from distill.vlm.questions import QUESTION_KINDS, QuestionName
from distill.vlm.records import RecordFile
from distill.vlm.scoring import (
    METRICS,
    MetricName,
    circular_questions,
    format_choices,
    is_right_yes_no,
    multiple_choice,
)
from distill.vlm.scoring.choice import LETTERS

MULTIPLE_CHOICE = "multiple_choice"
CIRCULAR = "circular"
POPE = "pope"

Metric = MetricName | Literal["multiple_choice", "circular", "pope"]


@dataclass(frozen=True)
class ScoredQuestion:
    """One question of a file.

    Attributes:
        id: of its record.
        kind: what is asked for, by which figures are grouped.
        metric: how an answer is scored.
        answers: what is right; several where people answered.
        conversation: image and question.
        options: of a multiple-choice question, whose one answer is an option or its letter; empty for others.
        circle: of a question that is asked in each order of its options: the id of its record; empty for others.
    """

    id: str
    kind: str
    metric: Metric
    answers: tuple[str, ...]
    conversation: Conversation
    options: tuple[str, ...] = ()
    circle: str = ""

    def value(self, text: str) -> float:
        """Return what an answer is worth, from 0 to 1; of a circle's questions each by itself."""
        if self.metric == "multiple_choice" or self.metric == "circular":
            return multiple_choice(text, self.options, right_option(self.answers[0], self.options))
        if self.metric == "pope":
            return is_right_yes_no(text, self.answers[0])
        return METRICS[self.metric](text, self.answers)


@dataclass(frozen=True)
class Answer:
    """What the model said, and what that is worth.

    Attributes:
        question: what was asked.
        text: the answer.
        value: from 0 to 1.
    """

    question: ScoredQuestion
    text: str
    value: float


def read_questions(file: Path, image_folder: Path | None = None, limit: int | None = None) -> list[ScoredQuestion]:
    """Return the questions of a JSONL file in LLaVA's layout.

    Beside `conversations` and `image`, a record may have `kind` (a group of questions; "all" without), `metric` (see
    `METRICS`; exact_match without), `answers` (a list; the last turn without) and `options` (a list, which makes it a
    multiple-choice question; its text is to name them). The metric pope is for answers yes and no. The metric circular
    makes a question of each order of the options, which are added to the record's text.

    Args:
        file: the records.
        image_folder: where image names start; the file's folder when left out.
        limit: read only the first so many records.

    Raises:
        ConfigError: the file is no JSONL.
        DataError: a record is not as it must be.
    """
    if file.suffix != ".jsonl":
        raise DataError(f"--data {file}: questions are read from a .jsonl file, a record a line.")
    records = RecordFile(file, "instruction", image_folder)
    lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    questions = [
        asked
        for number, line in enumerate(lines[:limit])
        for asked in _orders(
            _question(f"{file}: record {number + 1}", cast(dict[str, Any], json.loads(line)), records[number])
        )
    ]
    ids = [question.id for question in questions]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise DataError(f"{file} has the id {twice!r} twice; questions are paired by id, so each needs its own.")
    return questions


def _question(where: str, record: Mapping[str, Any], conversation: Conversation) -> ScoredQuestion:
    answers = record.get("answers") or [conversation.answer]
    if not isinstance(answers, list) or not all(isinstance(a, str) and a for a in cast(list[Any], answers)):
        raise DataError(f"{where}: 'answers' is {answers!r:.80}; give a list of texts, or an answer as the last turn.")
    kind = str(record.get("kind") or "all")
    drawn = QUESTION_KINDS.get(cast(QuestionName, kind))
    texts = tuple(cast(list[str], answers))
    options = _options(where, record, texts[0])
    metric = record.get("metric") or (MULTIPLE_CHOICE if options else drawn.metric if drawn else "exact_match")
    _check_metric(where, metric, texts, options)
    return ScoredQuestion(str(record.get("id") or where), kind, cast(Metric, metric), texts, conversation, options)


def _check_metric(where: str, metric: object, answers: Sequence[str], options: Sequence[str]) -> None:
    """Refuse a metric that is unknown, or that answers or options do not suit."""
    of_choices = (MULTIPLE_CHOICE, CIRCULAR)
    if metric not in (*METRICS, *of_choices, POPE):
        known = ", ".join((*METRICS, *of_choices, POPE))
        raise DataError(f"{where}: the metric {metric!r:.80} is unknown; choose one of {known}.")
    if bool(options) != (metric in of_choices):
        raise DataError(
            f"{where}: the metric {metric} with {len(options)} options; {' and '.join(of_choices)} score questions "
            "with options, the other metrics those without."
        )
    if metric == POPE and answers[0].strip().lower() not in ("yes", "no"):
        raise DataError(f"{where}: the metric pope is for the answers yes and no, not {answers[0]!r:.80}.")
    if metric == CIRCULAR and len(set(options)) < len(options):
        raise DataError(f"{where}: an option stands twice in {list(options)!r:.80}; which order is right is not clear.")


def _orders(question: ScoredQuestion) -> Iterator[ScoredQuestion]:
    """Yield a question, or, of a circular one, a question for each order of its options, which its text names."""
    if question.metric != CIRCULAR:
        yield question
        return
    right = right_option(question.answers[0], question.options)
    *before, last = question.conversation.question.turns
    for number, (options, place) in enumerate(circular_questions(question.options, right)):
        turns = (*before, Turn("human", format_choices(last.text, options)), Turn("assistant", LETTERS[place]))
        name = f"{question.id}/{number}"
        yield replace(
            question,
            id=name,
            answers=(options[place],),
            conversation=replace(question.conversation, id=name, turns=turns),
            options=tuple(options),
            circle=question.id,
        )


def _options(where: str, record: Mapping[str, Any], answer: str) -> tuple[str, ...]:
    given = record.get("options") or []
    options = tuple(cast(list[Any], given)) if isinstance(given, list) else ()
    if given and (not options or not all(isinstance(option, str) for option in options)):
        raise DataError(f"{where}: 'options' is {given!r:.80}; it must be a list of texts.")
    if options and right_option(answer, options) < 0:
        raise DataError(f"{where}: the answer {answer!r:.80} is neither an option nor the letter of one.")
    return options


def right_option(answer: str, options: Sequence[str]) -> int:
    """Return the number of the option that an answer gives, as its text or its letter; -1 for none."""
    if answer in options:
        return options.index(answer)
    return LETTERS[: len(options)].find(answer) if len(answer) == 1 else -1


@torch.inference_mode()
def ask(built: BuiltVLM, questions: Sequence[ScoredQuestion], *, batch_size: int, device: str) -> list[Answer]:
    """Return the model's answers, the likeliest token at each step.

    Args:
        built: the model, with its trained weights.
        questions: what to ask.
        batch_size: questions at a time.
        device: where the model runs.
    """
    builder = built.prompt_builder()
    built.model.to(device).eval()
    found: list[Answer] = []
    starts = range(0, len(questions), batch_size)
    for start in track(starts, "answering", transient=True):
        part = questions[start : start + batch_size]
        samples = [builder.build_prompt(question.conversation) for question in part]
        longest = max(len(sample.input_ids) for sample in samples)
        batch = collate(samples, built.pad_id, longest, pack=False).to(device)
        tokens = built.model.generate(batch, built.recipe.max_new_tokens, builder.stop_ids)
        for question, ids in zip(part, tokens, strict=True):
            text = builder.decode(ids)
            found.append(Answer(question, text, question.value(text)))
    return found
