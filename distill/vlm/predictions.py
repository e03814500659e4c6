"""A model's answers in files that VLMEvalKit and lmms-eval read, to be scored there or compared with their models.

VLMEvalKit takes predictions from `<model>_<dataset>.tsv` or `.json` (environment variable PRED_FORMAT=tsv or json) and
judges them without running the model: put the file where it would write its own, and run it with `--mode eval`.
lmms-eval reads sample files, `<date>_samples_<task>.jsonl`, as a baseline to compare with.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from distill.checkpoint_files import temporary_beside
from distill.errors import ConfigError, DataError
from distill.vlm.scoring.choice import LETTERS


@dataclass(frozen=True)
class Prediction:
    """One answered question.

    Attributes:
        index: the question's number in its benchmark.
        question: as it was asked, without template.
        answers: the reference answers; of a multiple-choice question the right letter.
        prediction: what the model said.
        score: from 0 to 1; None where it is to be scored elsewhere.
        options: of a multiple-choice question.
        category: of the question; empty for none.
    """

    index: int
    question: str
    answers: tuple[str, ...]
    prediction: str
    score: float | None = None
    options: tuple[str, ...] = ()
    category: str = ""


def write_vlmevalkit(predictions: Sequence[Prediction], folder: Path, model: str, dataset: str) -> tuple[Path, Path]:
    """Write predictions as VLMEvalKit's own TSV and JSON.

    The JSON is the safer one: pandas reads a TSV's `None`, `NA` or `null` as missing, which are answers too.

    Args:
        predictions: in the benchmark's order.
        folder: where the files go.
        model: VLMEvalKit's name of the model.
        dataset: VLMEvalKit's name of the benchmark, such as `MMBench_DEV_EN`.

    Returns:
        The TSV and the JSON.

    Raises:
        ConfigError: a name cannot be part of a file's name.
        DataError: there is no prediction, or an index occurs twice.
        OSError: the folder cannot be written.
    """
    _check(predictions, model, dataset)
    rows = [_vlmevalkit_row(prediction) for prediction in predictions]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    folder.mkdir(parents=True, exist_ok=True)
    table, listing = (folder / f"{model}_{dataset}{suffix}" for suffix in (".tsv", ".json"))
    with temporary_beside(table) as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(
                stream, columns, restval="", delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n"
            )
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(table)
    with temporary_beside(listing) as temporary:
        temporary.write_text(json.dumps(rows, ensure_ascii=False, indent=4), encoding="utf-8")
        temporary.replace(listing)
    return table, listing


def _vlmevalkit_row(prediction: Prediction) -> dict[str, object]:
    # Several answers are written as a Python list, which VLMEvalKit evaluates.
    answers = prediction.answers
    row: dict[str, object] = {
        "index": prediction.index,
        "question": prediction.question,
        "answer": answers[0] if len(answers) == 1 else str(list(answers)),
    }
    row |= {LETTERS[number]: option for number, option in enumerate(prediction.options)}
    if prediction.category:
        row["category"] = prediction.category
    return {**row, "prediction": prediction.prediction}


def write_lmms_eval(
    predictions: Sequence[Prediction],
    folder: Path,
    model: str,
    task: str,
    when: datetime,
    results: Mapping[str, float] | None = None,
) -> Path:
    """Write predictions as lmms-eval writes its samples, and its results beside them.

    Args:
        predictions: each with a score, in the task's order.
        folder: lmms-eval's output path; the files go to its folder of the model.
        model: the model's name.
        task: lmms-eval's name of the task, such as `chartqa`.
        when: time of the run, which is part of the files' names.
        results: metrics of the task as a whole, by name; None writes samples only.

    Returns:
        The sample file.

    Raises:
        ConfigError: a name cannot be part of a file's name.
        DataError: there is no prediction, an index occurs twice, or a score is missing.
        OSError: the folder cannot be written.
    """
    _check(predictions, model, task)
    bare = next((prediction for prediction in predictions if prediction.score is None), None)
    if bare is not None:
        raise DataError(f"The prediction of question {bare.index} has no score; lmms-eval's samples carry one.")
    own = folder / model
    own.mkdir(parents=True, exist_ok=True)
    date = when.strftime("%Y%m%d_%H%M%S")
    target = own / f"{date}_samples_{task}.jsonl"
    with temporary_beside(target) as temporary:
        with temporary.open("w", encoding="utf-8") as stream:
            for prediction in predictions:
                stream.write(json.dumps(_lmms_eval_sample(prediction), ensure_ascii=False) + "\n")
        temporary.replace(target)
    if results is not None:
        _write_results(own / f"{date}_results.json", model, task, date, results)
    return target


def _write_results(target: Path, model: str, task: str, date: str, results: Mapping[str, float]) -> None:
    of_task = {"alias": task, **{f"{name},none": value for name, value in results.items()}}
    content = {"results": {task: of_task}, "model_name": model, "date": date}
    with temporary_beside(target) as temporary:
        temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")
        temporary.replace(target)


def _lmms_eval_sample(prediction: Prediction) -> dict[str, object]:
    answers = prediction.answers
    content = json.dumps([prediction.index, prediction.question, answers, prediction.options], ensure_ascii=False)
    return {
        "doc_id": prediction.index,
        "input": prediction.question,
        "target": answers[0] if len(answers) == 1 else str(list(answers)),
        "filtered_resps": prediction.prediction,
        "doc_hash": hashlib.sha256(content.encode()).hexdigest(),
        "score": prediction.score,
    }


def _check(predictions: Sequence[Prediction], *names: str) -> None:
    wrong = [name for name in names if not re.fullmatch(r"[\w.-]+", name) or name.startswith(".")]
    if wrong:
        raise ConfigError(f"{wrong[0]!r} cannot be part of a file's name; use letters, digits, '.', '_' and '-'.")
    if not predictions:
        raise DataError("There is no prediction to write.")
    seen: set[int] = set()
    for prediction in predictions:
        if prediction.index in seen:
            raise DataError(f"The index {prediction.index} occurs twice; a benchmark counts each question once.")
        seen.add(prediction.index)
