"""The log becomes charts whatever its columns are, and charts become figures that need nothing from outside."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from distill.errors import DataError
from distill.report.curves import CurveChart, Line, file_key, score_charts, smooth, training_charts, validation_charts
from distill.report.figures import chart_png, chart_svg, inline_svg
from distill.report.metrics_csv import Series, read_metrics, split_validation
from distill.report.probe_json import EncoderScores, ProbeResults, Score


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "metrics.csv"
    file.write_text(text, encoding="utf-8")
    return file


def test_empty_cells_are_skipped_and_the_later_of_two_rows_of_a_step_wins(tmp_path: Path) -> None:
    file = write(tmp_path, "epoch,loss/total,step,val/cosine/a\n0,,0,0.5\n0,2.0,10,\n0,1.0,5,\n0,3.0,10,\n")
    metrics = read_metrics(file)
    assert metrics == {"val/cosine/a": Series((0.0,), (0.5,)), "loss/total": Series((5.0, 10.0), (1.0, 3.0))}
    assert metrics["val/cosine/a"].has_initial
    assert not metrics["loss/total"].has_initial


@pytest.mark.parametrize(
    "text", ["", "step,loss\n", "loss\n1\n", "step,loss\nx,y\n", "step,loss\n1,nan\n2,inf\n3,1,9\n"]
)
def test_a_log_without_usable_values_gives_no_or_fewer_series_but_no_error(tmp_path: Path, text: str) -> None:
    assert set(read_metrics(write(tmp_path, text))) <= {"loss"}


def test_a_log_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_bytes(b"\xff\xfe\x00step")
    with pytest.raises(DataError, match=r"metrics\.csv cannot be read as a CSV log"):
        read_metrics(file)


def test_without_steps_epochs_are_the_axis(tmp_path: Path) -> None:
    assert read_metrics(write(tmp_path, "epoch,loss\n3,1.5\n"))["loss"].steps == (3.0,)


def test_validation_columns_are_told_apart_by_pair_domain_metric_and_layer() -> None:
    one = Series((0.0, 1.0), (0.1, 0.2))
    names = (
        "val/cosine/ocr",
        "val/baseline/ocr",
        "val/cosine_layer_-2/ocr",
        "val/cosine",
        "val/stu/tea/cosine/ocr",
        "val/loss",
    )
    curves, others = split_validation(dict.fromkeys(names, one))
    assert [(entry.pair, entry.domain) for entry in curves] == [("", "ocr"), ("", ""), ("stu/tea", "ocr")]
    assert set(curves[0].metrics) == {"cosine", "baseline"}
    assert curves[0].layers == {"cosine": {-2: one}}
    assert set(others) == {"val/loss"}


def test_each_domain_has_a_chart_with_the_baseline_dashed_on_one_common_axis() -> None:
    def rise(top: float) -> Series:
        return Series((0.0, 10.0), (0.3, top))

    metrics = {f"val/{m}/{d}": rise(t) for d, t in (("ocr", 0.6), ("chart", 0.9)) for m in ("baseline", "cosine")}
    charts = validation_charts({**metrics, "val/cosine": rise(0.7)})
    assert [chart.title for chart in charts] == ["ocr", "chart"]
    assert [line.style for line in charts[0].lines] == ["dashed", "main"]
    assert charts[0].y_range == charts[1].y_range
    assert charts[0].y_range is not None
    assert charts[0].y_range[0] < 0.3
    assert charts[0].y_range[1] > 0.9


def test_layers_alone_still_make_a_domain_chart_of_their_mean() -> None:
    metrics = {
        "val/cosine_layer_-2/ocr": Series((0.0, 5.0), (0.2, 0.4)),
        "val/cosine_layer_-1/ocr": Series((0.0, 5.0, 9.0), (0.4, 0.6, 0.8)),
    }
    domain, by_layer = validation_charts(metrics)
    assert domain.lines[0].series.steps == (0.0, 5.0)
    assert domain.lines[0].series.values == pytest.approx((0.3, 0.5))
    assert [line.label for line in by_layer.lines] == ["layer -2", "layer -1"]


def test_unknown_columns_get_charts_of_their_own_and_equal_learning_rates_are_drawn_once() -> None:
    rate = Series((0.0, 1.0), (0.1, 0.2))
    other = Series((0.0, 1.0), (0.3, 0.4))
    columns = {
        "grad/norm": other,
        "lr-AdamW/a": rate,
        "lr-AdamW/b": rate,
        "throughput/images_per_s": other,
        "loss/x": rate,
    }
    charts = training_charts(columns)
    assert [chart.key for chart in charts] == ["loss", "throughput-images-per-s", "learning-rate", "grad"]
    assert len(charts[2].lines) == 1


def test_no_columns_make_no_charts() -> None:
    assert training_charts({}) == []
    assert validation_charts({}) == []


def test_the_moving_average_keeps_constants_length_and_ends() -> None:
    steps = tuple(float(i) for i in range(100))
    assert smooth(Series(steps, (2.0,) * 100)).values == pytest.approx((2.0,) * 100)
    straight = smooth(Series(steps, steps))
    assert straight.values == pytest.approx(steps)


def test_score_charts_show_accuracies_in_per_cent_and_only_metrics_that_exist() -> None:
    scores = {"linear_top1": {"overall": Score(0.5, 0.4, 0.6, 9)}, "knn_top1": {}, "cosine_centred": {}, "cka": {}}
    results = ProbeResults({"domains": ["a"]}, {}, (EncoderScores("s", "student", 1, 1, scores),), ())
    (chart,) = score_charts(results)
    assert chart.scopes == ("overall",)
    assert chart.encoders[0][2]["overall"] == Score(50.0, 40.0, 60.0, 9)


HOSTILE = '_<script>alert("$x^{$")</script>&'


def hostile_chart() -> CurveChart:
    series = Series((0.0, 1.0, 2.0), (0.1, 0.5, 0.4))
    return CurveChart("k", HOSTILE, (Line(HOSTILE, series), Line("b", series, "dashed", 1)), marks_ends=True)


def test_a_drawn_figure_escapes_names_uses_page_colours_and_refers_to_nothing_outside() -> None:
    svg = chart_svg(hostile_chart())
    ElementTree.fromstring(svg)
    assert "<script" not in svg
    assert "http" not in svg
    assert "var(--c0)" in svg
    assert "#0102" not in svg
    assert set(re.findall(r'href="(.)', svg)) <= {"#"}
    assert len(set(re.findall(r' id="([^"]*)"', svg))) == len(re.findall(r' id="([^"]*)"', svg))


def test_the_same_chart_is_drawn_as_the_same_bytes() -> None:
    assert chart_svg(hostile_chart()) == chart_svg(hostile_chart())
    assert chart_png(hostile_chart()) == chart_png(hostile_chart())
    assert chart_png(hostile_chart()).startswith(b"\x89PNG")


def test_a_curve_of_one_point_can_be_drawn() -> None:
    line = Line("one", Series((0.0,), (0.5,)))
    assert "<svg" in chart_svg(CurveChart("k", "t", (line,), marks_ends=True))


def test_a_file_without_an_svg_element_is_refused() -> None:
    with pytest.raises(ValueError, match="viewBox"):
        inline_svg("<html></html>", "t")


def test_file_names_hold_no_separators_whatever_a_domain_is_called() -> None:
    assert file_key("cosine ../../etc/passwd") == "cosine-etc-passwd"
    assert file_key("\u2603") == "unnamed"
