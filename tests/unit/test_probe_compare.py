"""Encoders of several probes are paired image by image, and only what an interval bears out is called better."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from distill import cli
from distill.errors import ConfigError, DataError
from distill.probe.compare import Comparison, compare, compare_contenders
from distill.probe.contenders import read_contenders
from distill.probe.paired_ratio import MIN_CLUSTERS, paired_figure
from distill.probe.results_file import read_probe
from distill.probe.rung import PerImage

N = 200
DOMAINS = ("chart", "ocr")
METRICS = {
    "linear_top1": {"title": "Linear probe, top-1", "kind": "accuracy", "lower_is_better": False},
    "ocr_cer": {"title": "Character error rate", "kind": "error_rate", "lower_is_better": True},
}
Values = Mapping[tuple[str, float | None], np.ndarray[Any, np.dtype[np.float64]]]


def write_probe(
    folder: Path,
    encoders: Mapping[str, tuple[str, Values]],
    *,
    data: str = "d" * 64,
    rows: np.ndarray[Any, Any] | None = None,
    groups: np.ndarray[Any, Any] | None = None,
) -> Path:
    """A probe.json of format 2 whose figures are means of the given values `[n]`."""
    folder.mkdir(parents=True)
    rows = np.arange(N) if rows is None else rows
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    listing, entries = [], []
    for e, (name, (role, values)) in enumerate(encoders.items()):
        scores = []
        for m, ((metric, x), column) in enumerate(values.items()):
            at = None if x is None else ["font_px", x]
            prefix = f"E{e}/M{m}"
            listing.append({"encoder": name, "metric": metric, "at": at, "prefix": prefix, "data": data})
            tensors[f"{prefix}/rows"] = rows
            tensors[f"{prefix}/numerator"] = column[:, None]
            tensors[f"{prefix}/denominator"] = np.ones((len(column), 1))
            tensors[f"{prefix}/groups"] = np.arange(len(column)) if groups is None else groups
            tensors[f"{prefix}/domains"] = np.arange(len(column)) % 2
            mean = float(column.mean())
            score = {"metric": metric, "scope": "overall", "at": at, "value": mean, "low": mean, "high": mean}
            scores.append({**score, "n": len(column), "seed": 0, "settings": {}})
        entries.append({"name": name, "role": role, "scores": scores})
    save_file(tensors, folder / "probe.safetensors")
    content = {
        "format": "distill-probe/2",
        "data": {"fingerprint": data, "domains": list(DOMAINS)},
        "seed": 0,
        "metrics": METRICS,
        "encoders": entries,
        "paired": [],
        "per_image": "probe.safetensors",
        "tensors": listing,
    }
    (folder / "probe.json").write_text(json.dumps(content))
    return folder


def answers(accuracy: float, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return (np.random.default_rng(seed).random(N) < accuracy).astype(np.float64)


def student(values: Values) -> dict[str, tuple[str, Values]]:
    return {"vit": ("student", values)}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs: the second reads better, and has fewer errors at 8 px and as many at 16 px."""
    weak, even, many = answers(0.5, 0), answers(0.3, 1), answers(0.6, 2)
    strong, few = np.maximum(weak, answers(0.4, 3)), many * answers(0.5, 4)
    a = {("linear_top1", None): weak, ("ocr_cer", 8.0): many, ("ocr_cer", 16.0): even}
    b = {("linear_top1", None): strong, ("ocr_cer", 8.0): few, ("ocr_cer", 16.0): np.roll(even, 1)}
    return write_probe(tmp_path / "first", student(a)), write_probe(tmp_path / "second", student(b))


def verdicts(found: Comparison) -> dict[tuple[str, float | None, str], str]:
    return {(entry.metric, entry.at and entry.at[1], entry.scope): entry.verdict for entry in found.figures}


def compared(*probes: Path, **options: Any) -> Comparison:
    return compare_contenders(read_contenders(probes, options.pop("encoders", "students")), **options)


def test_figures_are_paired_and_judged_in_the_direction_of_their_metric(pair: tuple[Path, Path]) -> None:
    found = compared(*pair)
    assert (found.baseline, found.labels) == ("first", ("first", "second"))
    told = verdicts(found)
    assert told["linear_top1", None, "overall"] == "better"
    assert told["ocr_cer", 8.0, "overall"] == "better"  # fewer errors
    assert told["ocr_cer", 16.0, "overall"] == "not distinguishable"
    assert {scope for _, _, scope in told} == {"overall", *DOMAINS}
    turned = verdicts(compared(*pair, baseline="second"))
    assert turned["linear_top1", None, "overall"] == turned["ocr_cer", 8.0, "overall"] == "worse"
    for entry in found.figures:
        assert entry.difference == pytest.approx(entry.value - entry.baseline)
        assert entry.low is not None
        assert entry.high is not None
        assert entry.low <= entry.difference <= entry.high
        assert (entry.verdict == "not distinguishable") == (entry.low <= 0 <= entry.high)


def test_images_of_one_group_are_resampled_together_unless_told_otherwise(tmp_path: Path) -> None:
    groups = np.arange(N) // 10
    mine = np.repeat(answers(0.65, 5)[: N // 10], 10)
    theirs = np.repeat(answers(0.35, 6)[: N // 10], 10)
    first = write_probe(tmp_path / "a", student({("linear_top1", None): theirs}), groups=groups)
    second = write_probe(tmp_path / "b", student({("linear_top1", None): mine}), groups=groups)
    (clustered, *_), (single, *_) = compared(first, second).figures, compared(first, second, cluster="none").figures
    assert (clustered.num_clusters, single.num_clusters) == (N // 10, N)
    assert clustered.low is not None
    assert clustered.high is not None
    assert single.low is not None
    assert single.high is not None
    assert clustered.high - clustered.low > 2 * (single.high - single.low)


def test_rows_in_another_order_are_matched_by_number(tmp_path: Path) -> None:
    values = answers(0.5, 7)
    order = np.random.default_rng(8).permutation(N)
    first = write_probe(tmp_path / "a", student({("linear_top1", None): values}))
    second = write_probe(tmp_path / "b", student({("linear_top1", None): values[order]}), rows=order, groups=order)
    entry = compared(first, second).figures[0]
    assert (entry.difference, entry.low, entry.high) == (0.0, 0.0, 0.0)
    assert entry.verdict == "not distinguishable"


def test_the_interval_of_a_ratio_covers_the_true_difference_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits, rounds = 0, 200
    for _ in range(rounds):
        length = rng.integers(5, 60, size=(120, 1)).astype(np.float64)
        edits = rng.binomial(length.astype(int), 0.3).astype(np.float64), rng.binomial(length.astype(int), 0.2)
        sides = [PerImage(np.arange(120), np.asarray(e, np.float64), length, np.arange(120)) for e in edits]
        figure = paired_figure(*sides, "error_rate", num_resamples=400, seed=1)
        assert figure.low is not None
        assert figure.high is not None
        hits += figure.low <= 0.1 <= figure.high
    assert 0.90 <= hits / rounds <= 0.99


def test_a_mean_over_columns_and_a_share_of_variance_are_computed_as_defined() -> None:
    numerator = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    denominator = np.array([[2.0, 0.0], [0.0, 4.0], [2.0, 0.0]])
    a = PerImage(np.arange(3), numerator, denominator, np.arange(3))
    b = PerImage(np.arange(3), numerator / 2, denominator, np.arange(3))
    iou = paired_figure(a, b, "iou")
    assert (iou.value, iou.baseline, iou.difference) == (0.5, 0.25, 0.25)
    assert paired_figure(a, b, "r2").difference == -0.25
    assert (iou.low, iou.num_clusters) == (None, 3)
    assert iou.num_clusters < MIN_CLUSTERS
    assert iou.verdict(lower_is_better=False) == "not distinguishable"


def test_different_images_are_refused_and_the_way_out_is_named(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    column = {("linear_top1", None): answers(0.5, 0)}
    other_data = write_probe(tmp_path / "data", student(column), data="e" * 64)
    with pytest.raises(DataError, match=r"nothing|no figure in common.*fingerprints differ.*Linear probe"):
        compared(pair[0], other_data)
    other_rows = write_probe(tmp_path / "rows", student(column), rows=np.arange(N) + 50)
    with pytest.raises(DataError, match=r"200 and 200, 150 in common: probe with equal --seed"):
        compared(pair[0], other_rows)


def test_what_only_one_side_has_is_told_and_nothing_in_common_is_an_error(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    part = write_probe(tmp_path / "part", student({("linear_top1", None): answers(0.5, 0)}))
    (note,) = compared(pair[0], part).notes
    assert "measured for one of the two only: Character error rate at font_px 8" in note
    none = write_probe(tmp_path / "none", student({("ocr_cer", 99.0): answers(0.5, 0)}))
    with pytest.raises(DataError, match="no figure in common"):
        compared(part, none)


def test_a_missing_damaged_or_foreign_file_of_per_image_values_is_named(pair: tuple[Path, Path]) -> None:
    values = pair[1] / "probe.safetensors"
    content = values.read_bytes()
    save_file({"E0/M0/rows": np.arange(3)}, values)
    with pytest.raises(DataError, match=r"has no E0/M0/numerator.*belong to different probes"):
        compared(*pair)
    values.write_bytes(content[:50])
    with pytest.raises(DataError, match=r"probe\.safetensors cannot be read"):
        compared(*pair)
    values.unlink()
    with pytest.raises(DataError, match=r"probe\.safetensors is missing.*Copy it beside"):
        compared(*pair)


def test_old_probes_are_shown_without_verdict_and_only_of_equal_images(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    def old(name: str, fingerprint: str) -> Path:
        linear = {"overall": {"top1": 0.9, "low": 0.85, "high": 0.95, "n": N}, "domains": {}}
        encoder = {"name": "vit", "role": "student", "linear": linear, "knn": None, "fidelity": None}
        content = {"format": "distill-probe/1", "data": {"fingerprint": fingerprint}, "encoders": [encoder]}
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(content))
        return file

    found = compared(pair[0], old("same", "d" * 64))
    assert set(verdicts(found).values()) == {"not paired"}
    assert found.figures[0].low is None
    assert "format distill-probe/1" in found.notes[0]
    with pytest.raises(DataError, match="different images"):
        compared(pair[0], old("other", "e" * 64))


def test_encoders_of_one_probe_can_be_compared_with_each_other(tmp_path: Path) -> None:
    better = np.maximum(answers(0.4, 0), answers(0.4, 1))
    both = {
        "vit (initial)": ("initial", {("linear_top1", None): answers(0.4, 0)}),
        "vit": ("student", {("linear_top1", None): better}),
    }
    folder = write_probe(tmp_path / "run", both)
    with pytest.raises(ConfigError, match="vit stands alone.*--encoders all"):
        compared(folder)
    found = compared(folder, encoders="all")
    assert found.labels == ("vit (initial)", "vit")
    assert found.figures[0].verdict == "better"


def test_the_command_prints_one_table_and_writes_what_out_names(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    cli.main(["compare", str(pair[0]), str(pair[1] / "probe.json"), "--out", str(out), "--baseline", str(pair[1])])
    printed = capsys.readouterr().out
    for text in ("Linear probe", "n. d.", "worse", "second", "By domain (chart, ocr)", "whole groups"):
        assert text in printed, text
    lines = list(csv.DictReader((out / "compare.csv").open()))
    assert {line["verdict"] for line in lines} == {"worse", "not distinguishable"}
    assert {line["encoder"] for line in lines} == {"first"}
    content = json.loads((out / "compare.json").read_text())
    assert content["format"] == "distill-compare/1"
    assert content["baseline"] == "second"
    assert len(content["figures"]) == len(lines) == 9
    table = (out / "compare.md").read_text()
    assert "| figure | scope | n | second (baseline) | first |" in table
    assert "| Character error rate (%), font px 8, lower is better | chart |" in table
    assert not [path for path in out.iterdir() if path.suffix == ".tmp"]
    cli.main(["compare", *map(str, pair), "--out", str(tmp_path / "one.md")])
    assert (tmp_path / "one.md").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": Path("table.xlsx")}, r"suffix '\.xlsx' is none of \.csv, \.json, \.md"),
        ({"out": Path("no/where/a.csv")}, "the folder no/where does not exist"),
        ({"baseline": "third"}, "names none, or several, of the encoders; choose one of 'first', 'second'"),
        ({"seed": -1}, "--seed -1 must be 0 or more"),
    ],
)
def test_options_of_compare_that_cannot_work_are_refused_by_name(
    pair: tuple[Path, Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(list(pair), **options)


def test_paths_without_a_probe_and_repeated_ones_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty has no probe\.json. Run `distill probe"):
        compare([pair[0], tmp_path / "empty"])
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        compare([pair[0], tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="given twice"):
        compare([pair[0], pair[0] / "probe.json"])


def test_figures_curves_and_metrics_of_format_2_are_read(pair: tuple[Path, Path]) -> None:
    results = read_probe(pair[0] / "probe.json")
    (encoder,) = results.encoders
    assert encoder.of("linear_top1")["overall"].n == N
    assert [x for x, _ in encoder.curves["ocr_cer", "font_px"]["overall"]] == [8.0, 16.0]
    assert results.info("ocr_cer").lower_is_better
    assert results.info("unheard_of").title == "unheard_of"


def test_the_help_shows_paths_as_they_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("compare", "report"):
        with pytest.raises(SystemExit, match="0"):
            cli.main([verb, "--help"])
        printed = capsys.readouterr().out
        assert "PATH [PATH ...]" in printed
        assert "LIST_OF_PATHS_FILE" not in printed


def test_the_words_before_the_first_option_are_one_list() -> None:
    assert cli.gather_leading(["a b", "c", "--out", "x"]) == ['["a b", "c"]', "--out", "x"]
    assert cli.gather_leading(["--help"]) == ["--help"]
    assert cli.gather_leading([]) == []
