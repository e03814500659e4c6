"""Which charts a probe's figures make: one for each metric, and one for each axis that a metric was measured along."""

from __future__ import annotations

from distill.probe.number_text import PERCENT_KINDS
from distill.probe.results import OVERALL, MetricInfo, ProbeResults, Score
from distill.report.charts import AxisChart, AxisLine, IntervalChart, file_key
from distill.report.verdict import FIDELITY

LAYER_AXIS = "layer"
SECONDARY = ("sgd_top1", "cosine_raw", "relative_l2", "retrieval_agreement", "cka")
"""Further views of what a main metric tells; these, and calibration, stand folded on the page."""
UNITS = {"px": "px", "percent": "%"}


def score_charts(results: ProbeResults, *, secondary: bool = False) -> list[IntervalChart]:
    """Return one chart for each metric that is a single figure in some scope; either the main ones or the others."""
    charts: list[IntervalChart] = []
    for metric, info in results.metrics.items():
        if is_secondary(metric, info) != secondary:
            continue
        encoders = tuple(
            (encoder.name, encoder.role, {scope: scaled(score, info) for scope, score in scores.items()})
            for encoder in results.encoders
            if (scores := encoder.of(metric))
        )
        # Drawn data has parts of its own, such as families of charts; they follow the domains.
        met = dict.fromkeys(scope for _, _, scores in encoders for scope in scores)
        order = (OVERALL, *results.domains)
        scopes = (*(scope for scope in order if scope in met), *(scope for scope in met if scope not in order))
        if scopes:
            charts.append(IntervalChart(file_key(f"probe {metric}"), chart_title(info), scopes, encoders))
    return charts


def axis_charts(results: ProbeResults) -> list[AxisChart]:
    """Return one chart for each metric and axis over all domains; fidelity along layers also one for each domain."""
    keys = dict.fromkeys(key for encoder in results.encoders for key in encoder.curves)
    charts: list[AxisChart] = []
    for metric, axis in keys:
        info = results.info(metric)
        scopes = (OVERALL, *results.domains) if (metric, axis) == (FIDELITY, LAYER_AXIS) else (OVERALL,)
        for scope in scopes:
            lines = tuple(
                AxisLine(encoder.name, encoder.role, tuple((x, scaled(score, info)) for x, score in points))
                for encoder in results.encoders
                if (points := encoder.curves.get((metric, axis), {}).get(scope))
            )
            if lines:
                title = chart_title(info) if scope == OVERALL else f"{scope}: {chart_title(info)}"
                key = file_key(f"probe {metric} by {axis} {'' if scope == OVERALL else scope}")
                charts.append(AxisChart(key, title, axis_title(axis), lines))
    return charts


def is_secondary(metric: str, info: MetricInfo) -> bool:
    """Whether a metric is a further view of what another one tells."""
    return metric in SECONDARY or info.kind == "calibration_error"


def chart_title(info: MetricInfo) -> str:
    """Return a metric's title with its unit and, where that is not plain, its direction."""
    unit = " (%)" if info.kind in PERCENT_KINDS and "%" not in info.title else ""
    return f"{info.title}{unit}" + (", lower is better" if info.lower_is_better else "")


def axis_title(axis: str) -> str:
    """Return an axis name as words with its unit: "font px" becomes "font (px)"."""
    words = axis.split("_")
    unit = UNITS.get(words[-1]) if len(words) > 1 else None
    return f"{' '.join(words[:-1])} ({unit})" if unit else " ".join(words)


def scaled(score: Score, info: MetricInfo) -> Score:
    """Return a figure as it is drawn: kinds that are written in per cent times 100."""
    factor = 100.0 if info.kind in PERCENT_KINDS else 1.0
    low = None if score.low is None else score.low * factor
    high = None if score.high is None else score.high * factor
    return Score(score.value * factor, low, high, score.n)
