"""Several runs on one page: their charts laid over each other, their scores in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from distill.probe.results import OVERALL, EncoderScores, MetricInfo, Paired, ProbeResults
from distill.report.charts import CurveChart, Line


def overlay(charts: Sequence[tuple[str, Sequence[CurveChart]]]) -> list[CurveChart]:
    """Return charts of the same key as one, a colour for each run; raw values under moving averages are left out.

    Args:
        charts: (run, its charts); one run's are returned as they are.
    """
    if len(charts) == 1:
        return list(charts[0][1])
    keys = dict.fromkeys(chart.key for _, own in charts for chart in own)
    return [_overlaid([(run, chart) for run, own in charts for chart in own if chart.key == key]) for key in keys]


def _overlaid(parts: Sequence[tuple[str, CurveChart]]) -> CurveChart:
    lines: list[Line] = []
    colour = 0
    for run, chart in parts:
        mains = [line for line in chart.lines if line.style == "main"]
        for line in mains:
            label = run if len(mains) == 1 else f"{run}: {line.label}"
            lines.append(replace(line, label=label, colour=colour))
            colour += 1
        for line in chart.lines:
            # Runs of one teacher share a baseline; it is drawn once.
            if line.style == "dashed" and all(line.series != drawn.series for drawn in lines):
                lines.append(line)
    ranges = [chart.y_range for _, chart in parts if chart.y_range is not None]
    y_range = (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None
    return CurveChart(parts[0][1].key, parts[0][1].title, tuple(lines), marks_ends=False, y_range=y_range)


def merged(probes: Mapping[str, ProbeResults]) -> ProbeResults:
    """Return the scores of several runs as those of one probe, encoders named "run / encoder".

    A teacher that scores the same as one before it, on the same images, is kept once. Data and settings are the first
    run's.
    """
    if len(probes) == 1:
        return next(iter(probes.values()))
    first = next(iter(probes.values()))
    encoders: list[EncoderScores] = []
    paired: list[Paired] = []
    metrics: dict[str, MetricInfo] = {}
    domains: dict[str, None] = {}
    for run, probe in probes.items():
        metrics |= {name: info for name, info in probe.metrics.items() if name not in metrics}
        domains |= dict.fromkeys(probe.domains)
        for encoder in probe.encoders:
            known = (entry for entry in encoders if entry.role == "teacher")
            if encoder.role == "teacher" and any(_scores_equal(encoder, entry) for entry in known):
                continue
            name = encoder.name if encoder.role == "teacher" else f"{run} / {encoder.name}"
            taken = {entry.name for entry in encoders}
            encoders.append(replace(encoder, name=f"{run} / {encoder.name}" if name in taken else name))
        paired += [replace(entry, a=f"{run} / {entry.a}", b=f"{run} / {entry.b}") for entry in probe.paired]
    data = {**first.data, "domains": list(domains)}
    return replace(first, data=data, encoders=tuple(encoders), paired=tuple(paired), metrics=metrics, tensors=())


def _scores_equal(a: EncoderScores, b: EncoderScores) -> bool:
    overall = [{metric: scores.get(OVERALL) for metric, scores in entry.scores.items()} for entry in (a, b)]
    return overall[0] == overall[1]


def of_same_images(probes: Mapping[str, ProbeResults]) -> bool:
    """Whether all probes scored the same data."""
    return len({str(probe.data.get("fingerprint", "")) for probe in probes.values()}) <= 1
