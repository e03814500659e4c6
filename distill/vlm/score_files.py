"""A VLM's answers as figures with intervals: probe.json with each question's part beside it, and a table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distill.probe.number_text import interval_text, score_text
from distill.probe.probe_file import FORMAT, write_probe
from distill.probe.score_intervals import score_entries
from distill.probe.scores import Scores, metrics_of
from distill.vlm.answers import Answer, ScoredQuestion
from distill.vlm.figures import rungs_of


def write_scores(
    answers: Sequence[Answer], target: Path, *, encoder: dict[str, Any], data: Path, seed: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Write `target` and the questions' parts beside it, atomically, and return the content of `target`.

    Args:
        answers: one for each question.
        target: the JSON file.
        encoder: the keys name, role, source, embed_dim and num_params of the encoder inside the VLM.
        data: the file of questions.
        seed: of the resampling.
        settings: further plain values that the file is to hold.

    Raises:
        ConfigError: a file cannot be written.
    """
    questions = [answer.question for answer in answers]
    fingerprint = questions_fingerprint(questions)
    rungs = rungs_of(answers, fingerprint)
    entries = [entry for rung in rungs for entry in score_entries(rung, seed=seed)]
    scores = Scores({"linear": None, "knn": None, "fidelity": None, "scores": entries}, rungs)
    name = str(encoder["name"])
    result: dict[str, Any] = {
        "format": FORMAT,
        "data": {
            "path": str(data),
            "fingerprint": fingerprint,
            "n_test": len(answers),
            "domains": list(dict.fromkeys(question.kind for question in questions)),
        },
        "seed": seed,
        **settings,
        "rungs": ["vlm"],
        "metrics": metrics_of({name: scores}),
        "encoders": [{**encoder, **scores.entry}],
        "paired": [],
    }
    write_probe(result, {name: scores}, target)
    return result


def questions_fingerprint(questions: Sequence[ScoredQuestion]) -> str:
    """Return a SHA-256 over ids, texts, answers and metrics, so that only equal question sets are paired."""
    lines = [
        [question.id, question.kind, question.metric, question.answers, [t.text for t in question.conversation.turns]]
        for question in questions
    ]
    return hashlib.sha256(json.dumps(lines, ensure_ascii=False).encode()).hexdigest()


def print_scores(result: dict[str, Any], console: Console) -> None:
    """Print each figure with its interval, beside chance."""
    table = Table("questions", "n", "score (%)", "95 % interval", "chance (%)")
    for entry in result["encoders"][0]["scores"]:
        about = result["metrics"][entry["metric"]]
        kind, title = about["kind"], about["title"].removeprefix("VLM: ")
        numbers = (score_text(kind, entry["value"]), interval_text(kind, entry["low"], entry["high"]))
        table.add_row(title, str(entry["n"]), *numbers, score_text(kind, about["blind"]))
    console.print(table)
