"""POPE's F1 and MMBench's circular accuracy, from a benchmark file to the files that a scored run leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.probe.compare import compare_contenders
from distill.probe.contenders import read_contenders
from distill.vlm.answers import Answer, ScoredQuestion, read_questions
from distill.vlm.figures import pope_results
from distill.vlm.score_files import write_scores
from distill.vlm.scored_run import write_predictions

ENCODER = {"name": "vit", "role": "student", "source": "here", "embed_dim": 8, "num_params": 1}


def questions_of(folder: Path, *records: dict[str, Any], limit: int | None = None) -> list[ScoredQuestion]:
    folder.mkdir(parents=True, exist_ok=True)
    turns = [{"from": "human", "value": "Is it so?"}, {"from": "gpt", "value": "-"}]
    lines = [{"id": f"q{number}", "conversations": turns, **record} for number, record in enumerate(records)]
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_questions(file, limit=limit)


def answered(questions: Sequence[ScoredQuestion], texts: Sequence[str]) -> list[Answer]:
    return [Answer(q, text, q.value(text)) for q, text in zip(questions, texts, strict=True)]


def scores_of(answers: Sequence[Answer], target: Path) -> dict[str, dict[str, Any]]:
    """Write what `distill vlm score` writes, and return each figure's entry with its chance, by metric."""
    target.parent.mkdir(parents=True, exist_ok=True)
    result = write_scores(answers, target, encoder=ENCODER, data=target, seed=0, settings={})
    entries = result["encoders"][0]["scores"]
    return {entry["metric"]: {**entry, "chance": result["metrics"][entry["metric"]]["blind"]} for entry in entries}


def pope(kind: str, answers: Sequence[str]) -> list[dict[str, Any]]:
    return [{"id": f"{kind}-{n}", "kind": kind, "metric": "pope", "answers": [a]} for n, a in enumerate(answers)]


def test_popes_f1_of_a_file_equals_scikit_learns_set_by_set_and_papers_mean(tmp_path: Path) -> None:
    from sklearn.metrics import f1_score, precision_score, recall_score

    rng = np.random.default_rng(0)
    sets = {kind: rng.choice(["yes", "no"], 40).tolist() for kind in ("random", "popular", "adversarial")}
    said = {kind: rng.choice(["Yes", "No, none.", "There is not a cat", "yes, two"], 40).tolist() for kind in sets}
    questions = questions_of(tmp_path, *(record for kind in sets for record in pope(kind, sets[kind])))
    answers = answered(questions, [text for kind in sets for text in said[kind]])
    found = scores_of(answers, tmp_path / "probe.json")

    def truth(kind: str) -> tuple[list[bool], list[bool]]:
        return [a == "yes" for a in sets[kind]], [text.lower().startswith("yes") for text in said[kind]]

    expected = {kind: f1_score(*truth(kind)) for kind in sets}
    for kind, value in expected.items():
        entry = found[f"vlm_{kind}_f1"]
        assert entry["value"] == pytest.approx(value)
        assert entry["low"] < value < entry["high"]
        assert entry["n"] == 40
        share = sets[kind].count("yes") / 40
        assert entry["chance"] == pytest.approx(2 * share / (1 + share)), "who always says yes"
        wanted, given = truth(kind)
        assert found[f"vlm_{kind}"]["value"] == np.mean(np.array(wanted) == given), "accuracy"
    assert found["vlm_pope_f1"]["value"] == pytest.approx(np.mean(list(expected.values())))
    results = pope_results(answers)
    assert results["vlm_popular_precision"] == pytest.approx(precision_score(*truth("popular")))
    assert results["vlm_popular_recall"] == pytest.approx(recall_score(*truth("popular")))


def test_popes_f1_of_two_models_is_paired_question_by_question(tmp_path: Path) -> None:
    records = pope("random", ["yes", "no"] * 30)
    for name, texts in (("worse", ["yes"] * 60), ("better", ["yes", "no"] * 30)):
        scores_of(answered(questions_of(tmp_path, *records), texts), tmp_path / name / "probe.json")
    contenders = read_contenders([tmp_path / "worse", tmp_path / "better"], "all")
    figures = {figure.metric: figure for figure in compare_contenders(contenders).figures}
    f1 = figures["vlm_random_f1"]
    assert (f1.baseline, f1.value, f1.verdict) == (pytest.approx(2 / 3), 1.0, "better")


def test_a_set_of_pope_without_a_yes_has_accuracy_and_no_f1(tmp_path: Path) -> None:
    answers = answered(questions_of(tmp_path, *pope("random", ["no"] * 6)), ["no"] * 6)
    assert set(scores_of(answers, tmp_path / "probe.json")) == {"vlm_random"}


OPTIONS = ["red", "blue", "green"]


def circular(*rights: str) -> list[dict[str, Any]]:
    return [{"options": OPTIONS, "answers": [right], "metric": "circular"} for right in rights]


def test_a_circular_question_is_asked_in_each_order_with_its_options(tmp_path: Path) -> None:
    asked = questions_of(tmp_path, *circular("blue", "A"), limit=1)
    assert [question.id for question in asked] == ["q0/0", "q0/1", "q0/2"]
    assert [question.options for question in asked] == [
        ("red", "blue", "green"),
        ("blue", "green", "red"),
        ("green", "red", "blue"),
    ]
    assert [question.conversation.answer for question in asked] == ["B", "A", "C"]
    assert "A. blue\nB. green\nC. red\n" in asked[1].conversation.question.turns[-1].text
    assert [question.value(letter) for question, letter in zip(asked, "BAC", strict=True)] == [1.0, 1.0, 1.0]


def test_a_circular_question_counts_once_and_only_where_every_order_is_right(tmp_path: Path) -> None:
    questions = questions_of(tmp_path, *circular("red", "blue", "green", "green", "A"))
    # The first, by who always says A; the second and third rightly; the fourth wrong once; the fifth is "red" again.
    texts = [*"AAA", *"BAC", *("green",) * 3, "green", "red", "green", *("red",) * 3]
    found = scores_of(answered(questions, texts), tmp_path / "probe.json")["vlm_all"]
    assert (found["n"], found["value"], found["chance"]) == (5, 3 / 5, 2 / 5)


def test_predictions_carry_letters_circles_indices_and_the_tasks_results(tmp_path: Path) -> None:
    records = [*circular("blue"), {"answers": ["4"]}, {"options": OPTIONS, "answers": ["green"]}]
    questions = questions_of(tmp_path, *records, *pope("popular", ["yes", "no"]))
    answers = answered(questions, [*"BAC", "4", "C", "yes", "yes"])
    files = write_predictions(answers, tmp_path, tmp_path / "tiny", tmp_path / "mixed.jsonl", {"vlm_all": 0.5})
    rows = json.loads(next(file for file in files if file.suffix == ".json").read_text())
    # vlmeval/dataset/utils/multiple_choice.py adds a million to the index for each order, and takes it off by modulo.
    assert [row["index"] for row in rows] == [0, 1_000_000, 2_000_000, 1, 2, 3, 4]
    assert [row["answer"] for row in rows] == ["B", "A", "C", "4", "C", "yes", "no"]
    results = json.loads(next((tmp_path / "predictions/lmms_eval").rglob("*_results.json")).read_text())["results"]
    assert results["mixed"]["vlm_all,none"] == 0.5
    assert results["mixed"]["vlm_popular_precision,none"] == 0.5
