"""Questions of a benchmark file: kinds, metrics, several answers, options, chance, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.errors import DataError
from distill.probe.compare import compare_contenders
from distill.probe.contenders import read_contenders
from distill.report.small_vlms import vlm_section
from distill.vlm.answers import Answer, read_questions
from distill.vlm.figures import chance
from distill.vlm.score_files import write_scores

ENCODER = {"name": "vit", "source": "here", "embed_dim": 8, "num_params": 1}


def write(folder: Path, *records: dict[str, Any]) -> Path:
    file = folder / "questions.jsonl"
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "4"}]
    lines = [{"id": f"q{number}", "conversations": turns, **record} for number, record in enumerate(records)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_a_record_says_its_kind_metric_and_answers(tmp_path: Path) -> None:
    file = write(tmp_path, {}, {"kind": "page", "metric": "anls", "answers": ["cat", "cats"]}, {"kind": "chart_value"})
    plain, page, drawn = read_questions(file)
    assert (plain.kind, plain.metric, plain.answers) == ("all", "exact_match", ("4",))
    assert (page.metric, page.value("cats")) == ("anls", 1.0)
    assert drawn.metric == "relaxed_accuracy"
    assert drawn.value("4.1") == 1.0


def test_options_make_a_multiple_choice_question_answered_by_text_or_letter(tmp_path: Path) -> None:
    options = ["red", "blue", "green"]
    question = read_questions(write(tmp_path, {"options": options, "answers": ["B"]}))[0]
    assert [question.value(text) for text in ("B", "B. blue", "A", "blue")] == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"metric": "bleu"}, "'bleu' is unknown"),
        ({"answers": []}, None),
        ({"answers": [1]}, "list of texts"),
        ({"options": ["a", "b"], "answers": ["C"]}, "neither an option"),
        ({"options": "ab"}, "must be a list"),
        ({"options": ["a", "b"], "answers": ["a"], "metric": "anls"}, "anls with 2 options"),
        ({"metric": "circular"}, "circular with 0 options"),
        ({"options": ["a", "b", "a"], "answers": ["b"], "metric": "circular"}, "an option stands twice"),
        ({"metric": "pope", "answers": ["maybe"]}, "yes and no, not 'maybe'"),
    ],
)
def test_a_question_that_cannot_be_scored_is_refused_naming_file_and_record(
    tmp_path: Path, record: dict[str, Any], told: str | None
) -> None:
    file = write(tmp_path, record)
    if told is None:
        assert read_questions(file)[0].answers == ("4",)
        return
    with pytest.raises(DataError, match=told) as error:
        read_questions(file)
    assert "questions.jsonl: record 1" in str(error.value)


def test_two_questions_of_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'q' twice"):
        read_questions(write(tmp_path, {"id": "q"}, {"id": "q"}))


def test_chance_is_the_best_constant_answer_of_each_kind(tmp_path: Path) -> None:
    records = [{"kind": "count", "answers": [str(number % 4)]} for number in range(8)]
    records += [{"kind": "yes", "answers": ["yes" if number < 6 else "no"]} for number in range(8)]
    assert chance(read_questions(write(tmp_path, *records))) == (2 + 6) / 16


def scored(folder: Path, name: str, role: str, right: int) -> None:
    questions = read_questions(write(folder, *({"kind": "count", "answers": [str(n % 4)]} for n in range(40))))
    answers = [Answer(question, "", float(number < right)) for number, question in enumerate(questions)]
    target = folder / "vlm" / name / "probe.json"
    target.parent.mkdir(parents=True)
    write_scores(answers, target, encoder={**ENCODER, "role": role}, data=folder, seed=0, settings={})


def test_two_vlms_are_paired_question_by_question_with_an_interval(tmp_path: Path) -> None:
    scored(tmp_path, "after", "student", 30)
    scored(tmp_path, "before", "initial", 10)
    folders = [tmp_path / "vlm" / name for name in ("before", "after")]
    (figure,) = compare_contenders(read_contenders(folders, "all")).figures
    assert (figure.label, figure.value, figure.baseline, figure.n, figure.verdict) == (
        "after",
        0.75,
        0.25,
        40,
        "better",
    )
    assert figure.low is not None
    assert 0 < figure.low < 0.5


def test_the_report_takes_the_initial_encoders_vlm_for_the_baseline_and_tells_chance(tmp_path: Path) -> None:
    scored(tmp_path, "after", "student", 30)
    assert vlm_section(tmp_path).comparison is None
    scored(tmp_path, "before", "initial", 10)
    section = vlm_section(tmp_path)
    assert section.comparison is not None
    assert section.comparison.baseline == "before"
    assert section.chance == {"VLM: count (%)": "25.0"}
    (row,) = section.rows
    assert row.cells["after"][2] == "better"


def test_the_report_says_why_vlms_cannot_be_compared(tmp_path: Path) -> None:
    scored(tmp_path, "after", "student", 30)
    scored(tmp_path, "before", "initial", 10)
    (tmp_path / "vlm" / "before" / "probe.json").write_text("{}")
    assert "could not be compared" in vlm_section(tmp_path).absent
