"""Asking a trained VLM the questions of a file, and what each answer is worth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.progress import track

from distill.errors import DataError
from distill.vlm.batch import collate
from distill.vlm.build import BuiltVLM
from distill.vlm.conversation import Conversation
from distill.vlm.questions import QUESTION_KINDS, QuestionName
from distill.vlm.records import RecordFile
from distill.vlm.scoring import METRICS, MetricName, multiple_choice
from distill.vlm.scoring.choice import LETTERS

MULTIPLE_CHOICE = "multiple_choice"


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
    """

    id: str
    kind: str
    metric: MetricName | Literal["multiple_choice"]
    answers: tuple[str, ...]
    conversation: Conversation
    options: tuple[str, ...] = ()

    def value(self, text: str) -> float:
        """Return what an answer is worth, from 0 to 1."""
        if self.metric == MULTIPLE_CHOICE:
            return multiple_choice(text, self.options, right_option(self.answers[0], self.options))
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
    multiple-choice question; its text is to name them).

    Raises:
        ConfigError: the file is no JSONL.
        DataError: a record is not as it must be.
    """
    if file.suffix != ".jsonl":
        raise DataError(f"--data {file}: questions are read from a .jsonl file, a record a line.")
    records = RecordFile(file, "instruction", image_folder)
    lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    questions = [
        _question(f"{file}: record {number + 1}", cast(dict[str, Any], json.loads(line)), records[number])
        for number, line in enumerate(lines[:limit])
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
    options = _options(where, record, cast(list[str], answers)[0])
    metric = MULTIPLE_CHOICE if options else record.get("metric") or (drawn.metric if drawn else "exact_match")
    if metric != MULTIPLE_CHOICE and metric not in METRICS:
        raise DataError(f"{where}: the metric {metric!r:.80} is unknown; choose one of {', '.join(METRICS)}.")
    texts = tuple(cast(list[str], answers))
    return ScoredQuestion(str(record.get("id") or where), kind, cast(MetricName, metric), texts, conversation, options)


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
