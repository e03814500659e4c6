"""The log becomes charts whatever its columns are, and charts become figures that need nothing from outside."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from distill.errors import DataError
from distill.probe.results import EncoderScores, MetricInfo, Paired, ProbeResults, Score
from distill.report.charts import AxisChart, CurveChart, Line, file_key
from distill.report.curves import smooth, training_charts, validation_charts
from distill.report.figures import chart_png, chart_svg, inline_svg
from distill.report.metrics_csv import Series, read_metrics, split_validation
from distill.report.score_charts import axis_charts, axis_title, score_charts
from distill.report.several import merged, overlay


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
    assert chart.title == "Linear probe, top-1 (%)"


def probe_with_curves() -> ProbeResults:
    def points(value: float) -> list[tuple[float, Score]]:
        return [(x, Score(value / x, value / x - 0.01, value / x + 0.01, 7)) for x in (8.0, 16.0, 64.0)]

    def encoder(name: str, role: str, value: float) -> EncoderScores:
        by_scope = {"overall": points(value), "a": points(value)}
        curves = {("ocr_cer", "font_px"): by_scope, ("cosine_centred", "layer"): by_scope}
        return EncoderScores(name, role, 1, 1, {"knn_top1": {"overall": Score(value, None, None, 7)}}, curves)

    metrics = {
        "knn_top1": MetricInfo("kNN, top-1", "accuracy"),
        "ocr_cer": MetricInfo("Character error rate", "error_rate", lower_is_better=True),
        "cosine_centred": MetricInfo("Fidelity, centred cosine", "cosine"),
    }
    encoders = (encoder("s (initial)", "initial", 0.2), encoder("s", "student", 0.4), encoder("t", "teacher", 0.8))
    pair = Paired("knn_top1", "overall", "s", "s (initial)", 0.2, 0.1, 0.3, 7, "better")
    return ProbeResults({"domains": ["a"], "fingerprint": "f"}, {"seed": 0}, encoders, (pair,), metrics)


def test_each_axis_makes_a_chart_and_layers_one_for_each_domain_too() -> None:
    charts = axis_charts(probe_with_curves())
    assert [(chart.title, chart.axis) for chart in charts] == [
        ("Character error rate (%), lower is better", "font (px)"),
        ("Fidelity, centred cosine", "layer"),
        ("a: Fidelity, centred cosine", "layer"),
    ]
    assert charts[0].lines[1].points[0][1].value == pytest.approx(5.0)  # per cent
    assert charts[1].lines[1].points[0][1].value == pytest.approx(0.05)
    assert axis_title("jpeg_quality") == "jpeg quality"


def test_an_axis_chart_is_drawn_with_its_points_as_ticks() -> None:
    (chart, *_) = axis_charts(probe_with_curves())
    assert isinstance(chart, AxisChart)
    svg = chart_svg(chart)
    ElementTree.fromstring(svg)
    for text in (">8<", ">16<", ">64<", "font (px)", ">s (initial)<"):
        assert text in svg
    assert chart_png(chart).startswith(b"\x89PNG")


def test_scores_of_several_runs_stand_in_one_table_with_an_equal_teacher_once() -> None:
    both = merged({"one": probe_with_curves(), "two": probe_with_curves()})
    assert [encoder.name for encoder in both.encoders] == [
        "one / s (initial)",
        "one / s",
        "t",
        "two / s (initial)",
        "two / s",
    ]
    assert both.initial_of("two / s") is both.encoders[3]
    assert merged({"one": probe_with_curves()}) == probe_with_curves()


def test_charts_of_several_runs_are_laid_over_each_other_in_one_colour_each() -> None:
    def charts(top: float, base: float) -> list[CurveChart]:
        mine = Line("cosine", Series((0.0, 1.0), (0.1, top)))
        faint = Line("", Series((0.0, 1.0), (0.0, top)), "thin")
        dashed = Line("trivial baseline", Series((0.0, 1.0), (base, base)), "dashed")
        return [CurveChart("cosine-a", "a", (dashed, faint, mine), marks_ends=True, y_range=(0.0, top))]

    (chart,) = overlay([("one", charts(0.5, 0.2)), ("two", charts(0.9, 0.2))])
    assert [(line.label, line.style, line.colour) for line in chart.lines] == [
        ("one", "main", 0),
        ("trivial baseline", "dashed", 0),
        ("two", "main", 1),
    ]
    assert chart.y_range == (0.0, 0.9)
    assert overlay([("one", charts(0.5, 0.2))]) == charts(0.5, 0.2)


def test_layers_are_shown_for_each_domain_and_for_their_mean() -> None:
    metrics = {
        f"val/cosine_layer_{layer}/{domain}": Series((0.0, 5.0), (0.2, 0.4))
        for layer in (-1, -2)
        for domain in ("ocr", "chart")
    }
    titles = [chart.title for chart in validation_charts(metrics)]
    assert titles == ["ocr", "chart", "By layer, mean over domains", "By layer, ocr", "By layer, chart"]


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
