"""Prediction files as VLMEvalKit and lmms-eval read them."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pandas as pd
import pytest

from distill.errors import ConfigError, DataError
from distill.vlm.predictions import Prediction, write_lmms_eval, write_vlmevalkit

ROWS = [
    Prediction(0, "Which?", ("B",), "B.\nBecause\tit is", 1.0, ("x", 'a "quoted" one'), "reasoning"),
    Prediction(7, "How much?", ("10", "ten"), "None", 0.0),
]
WHEN = datetime(2026, 1, 2, 3, 4, 5)


def test_pandas_reads_the_table_as_vlmevalkit_does(tmp_path: Path) -> None:
    table, _ = write_vlmevalkit(ROWS, tmp_path, "tiny", "MMBench_DEV_EN")
    assert table.name == "tiny_MMBench_DEV_EN.tsv"
    # The two calls of vlmeval/smp/file.py: load_tsv, and what a judge does with each row.
    read = pd.read_csv(table, sep="\t")
    assert list(read.columns) == ["index", "question", "answer", "A", "B", "category", "prediction"]
    assert read["prediction"][0] == "B.\nBecause\tit is"
    assert read["B"][0] == 'a "quoted" one'
    assert read["index"].tolist() == [0, 7]
    assert read["answer"].tolist() == ["B", "['10', 'ten']"]
    assert pd.isna(read["category"][1])


def test_the_listing_keeps_answers_that_pandas_takes_for_missing(tmp_path: Path) -> None:
    table, listing = write_vlmevalkit(ROWS, tmp_path, "tiny", "ChartQA_TEST")
    assert pd.isna(pd.read_csv(table, sep="\t")["prediction"][1]), "why the JSON is written too"
    rows = json.loads(listing.read_text(encoding="utf-8"))
    assert rows[1]["prediction"] == "None"
    assert rows[0]["A"] == "x"
    assert "A" not in rows[1]


def test_lmms_eval_finds_its_samples_and_their_scores(tmp_path: Path) -> None:
    path = write_lmms_eval(ROWS, tmp_path, "tiny", "chartqa", WHEN, {"relaxed_overall": 0.5})
    assert path == tmp_path / "tiny/20260102_030405_samples_chartqa.jsonl"
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    # lmms_eval/baselines/loader.py: the score is the first number under a key with "score" in it, by doc_id; the
    # results lie beside the samples under the same date.
    scores = {s["doc_id"]: next(float(s[key]) for key in s if "score" in key.lower()) for s in samples}
    assert scores == {0: 1.0, 7: 0.0}
    assert samples[1]["filtered_resps"] == "None"
    assert samples[0]["target"] == "B"
    assert len({s["doc_hash"] for s in samples}) == 2
    date, task = path.stem.split("_samples_")
    results = json.loads((path.parent / f"{date}_results.json").read_text())
    assert results["results"][task]["relaxed_overall,none"] == 0.5


def test_files_appear_only_when_they_are_whole(tmp_path: Path) -> None:
    bad = [*ROWS, Prediction(9, "?", ("x",), object())]  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        write_lmms_eval([*ROWS, Prediction(9, "?", ("x",), object(), 1.0)], tmp_path, "m", "t", WHEN)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        write_vlmevalkit(bad, tmp_path, "m", "d")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".jsonl", ".json")]


def test_predictions_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prediction"):
        write_vlmevalkit([], tmp_path, "m", "d")
    with pytest.raises(DataError, match="index 0 occurs twice"):
        write_vlmevalkit([ROWS[0], ROWS[0]], tmp_path, "m", "d")
    with pytest.raises(ConfigError, match=r"'\.\./m' cannot be part"):
        write_vlmevalkit(ROWS, tmp_path, "../m", "d")
    with pytest.raises(DataError, match="question 3 has no score"):
        write_lmms_eval([Prediction(3, "?", ("x",), "y")], tmp_path, "m", "t", WHEN)
