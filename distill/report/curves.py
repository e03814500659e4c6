"""Which charts a run's log makes: plain descriptions, drawn elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from distill.report.charts import CurveChart, Line, file_key
from distill.report.metrics_csv import DomainCurves, Series, split_validation

SMOOTH_FROM_POINTS = 40
SMOOTHING_SHARE = 0.05
"""A curve of many points is drawn faintly under its moving average over this share of them."""


def smooth(series: Series) -> Series:
    """Return a centred moving average; the window shrinks at the ends, so nothing is invented there."""
    half = max(1, int(len(series.values) * SMOOTHING_SHARE / 2))
    averages: list[float] = []
    for i in range(len(series.values)):
        reach = min(half, i, len(series.values) - 1 - i)
        window = series.values[i - reach : i + reach + 1]
        averages.append(sum(window) / len(window))
    return Series(series.steps, tuple(averages))


def training_charts(metrics: Mapping[str, Series]) -> list[CurveChart]:
    """Return charts of everything logged outside `val/`: losses first, then throughput, learning rates, the rest."""
    groups: dict[str, dict[str, Series]] = {}
    for name, series in metrics.items():
        head = "learning rate" if name.startswith("lr-") else name.split("/", 1)[0]
        if head != "val":
            groups.setdefault(head, {})[name] = series
    charts: list[CurveChart] = []
    for head in sorted(
        groups,
        key=lambda head: (
            (("loss", "throughput", "learning rate").index(head), "")
            if head in ("loss", "throughput", "learning rate")
            else (3, head)
        ),
    ):
        if head == "loss":
            charts.append(_loss_chart(groups[head]))
        elif head == "throughput":
            charts += [_throughput_chart(name, series) for name, series in groups[head].items()]
        else:
            charts.append(_group_chart(head, groups[head]))
    return charts


def _loss_chart(columns: Mapping[str, Series]) -> CurveChart:
    total = next((name for name in columns if "total" in name), next(iter(columns)))
    others = [name for name in columns if name != total]
    lines = [Line(_tail(name), columns[name], "thin", i + 1) for i, name in enumerate(others)]
    return CurveChart("loss", "Training loss", (*lines, *_smoothed(_tail(total), columns[total])))


def _smoothed(label: str, series: Series) -> list[Line]:
    if len(series.values) < SMOOTH_FROM_POINTS:
        return [Line(label, series)]
    return [Line("", series, "thin"), Line(label, smooth(series))]


def _throughput_chart(name: str, series: Series) -> CurveChart:
    title = "Throughput, images/s" if name == "throughput/images_per_s" else _readable(name)
    return CurveChart(file_key(name), title, tuple(_smoothed(title, series)))


def _group_chart(head: str, columns: Mapping[str, Series]) -> CurveChart:
    # Parameter groups share a few rates: curves that coincide are drawn once.
    labels: dict[Series, list[str]] = {}
    for name, series in columns.items():
        labels.setdefault(series, []).append(_tail(name))
    if len(labels) == 1:
        names = [""]
    else:
        names = [group[0] if len(group) == 1 else f"{group[0]} (+{len(group) - 1})" for group in labels.values()]
    lines = tuple(Line(name, series, colour=i) for i, (name, series) in enumerate(zip(names, labels, strict=True)))
    return CurveChart(file_key(head), _readable(head), lines)


def _tail(name: str) -> str:
    return name.removeprefix("lr-").rsplit("/", 1)[-1].replace("_", " ")


def _readable(name: str) -> str:
    text = name.replace("/", ": ", 1).replace("_", " ")
    return text[:1].upper() + text[1:]


def validation_charts(metrics: Mapping[str, Series]) -> list[CurveChart]:
    """Return charts of everything logged under `val/`.

    One chart for each domain, cosine with the trivial baseline dashed; then the layers, the skill, and columns of
    other names. The mean over domains has a chart of its own only where no domain has one.
    """
    curves, others = split_validation(metrics)
    charts: list[CurveChart] = []
    for pair in dict.fromkeys(entry.pair for entry in curves):
        mine = [entry for entry in curves if entry.pair == pair]
        domains = [entry for entry in mine if entry.domain] or mine
        charts += _share_range([chart for entry in domains if (chart := _domain_chart(entry)) is not None])
        charts += _layer_charts(domains, pair)
        charts += _skill_charts(domains, pair)
    grouped: dict[str, dict[str, Series]] = {}
    for name, series in others.items():
        grouped.setdefault(name.rsplit("/", 1)[0] if name.count("/") > 1 else name, {})[name] = series
    for head, columns in grouped.items():
        lines = tuple(Line(_tail(name), series, colour=i) for i, (name, series) in enumerate(columns.items()))
        charts.append(CurveChart(file_key(head), _readable(head), lines))
    return charts


def _domain_chart(curves: DomainCurves) -> CurveChart | None:
    cosine = curves.metrics.get("cosine") or _mean(list(curves.layers.get("cosine", {}).values()))
    if cosine is None:
        return None
    baseline = curves.metrics.get("baseline") or _mean(list(curves.layers.get("baseline", {}).values()))
    lines = [Line("trivial baseline", baseline, "dashed")] if baseline else []
    name = curves.domain or "all domains"
    title = f"{name} ({curves.pair})" if curves.pair else name
    return CurveChart(
        file_key(f"cosine {curves.pair} {name}"), title, (*lines, Line("cosine", cosine)), marks_ends=True
    )


def _share_range(charts: Sequence[CurveChart]) -> list[CurveChart]:
    values = [value for chart in charts for line in chart.lines for value in line.series.values]
    if not values:
        return list(charts)
    margin = 0.12 * (max(values) - min(values)) or 0.1
    return [replace(chart, y_range=(min(values) - margin, max(values) + margin)) for chart in charts]


def _layer_charts(domains: Sequence[DomainCurves], pair: str) -> list[CurveChart]:
    """One chart of the layers for the mean over domains, then one for each domain; none for a single layer."""
    layers = sorted({layer for entry in domains for layer in entry.layers.get("cosine", {})})
    if len(layers) < 2:
        return []
    suffix = f" ({pair})" if pair else ""
    charts = [_layers_of(domains, layers, f"By layer, mean over domains{suffix}", f"cosine {pair} by layer")]
    if len(domains) > 1:
        charts += [
            _layers_of([entry], layers, f"By layer, {entry.domain}{suffix}", f"cosine {pair} by layer {entry.domain}")
            for entry in domains
        ]
    return _share_range(charts)


def _layers_of(domains: Sequence[DomainCurves], layers: Sequence[int], title: str, key: str) -> CurveChart:
    lines: list[Line] = []
    for i, layer in enumerate(layers):
        series = _mean([entry.layers["cosine"][layer] for entry in domains if layer in entry.layers.get("cosine", {})])
        if series is not None:
            lines.append(Line(f"layer {layer}", series, colour=i))
    return CurveChart(file_key(key), title, tuple(lines))


def _skill_charts(domains: Sequence[DomainCurves], pair: str) -> list[CurveChart]:
    with_skill = [entry for entry in domains if "skill" in entry.metrics]
    if not with_skill:
        return []
    lines = tuple(
        Line(entry.domain or "all domains", entry.metrics["skill"], colour=i) for i, entry in enumerate(with_skill)
    )
    title = "Skill: 0 = trivial baseline, 1 = teacher" + (f" ({pair})" if pair else "")
    return [CurveChart(file_key(f"skill {pair}"), title, lines)]


def _mean(series: Sequence[Series]) -> Series | None:
    """Mean over curves at the steps that all of them have."""
    shared = sorted(set[float].intersection(*(set(entry.steps) for entry in series))) if series else []
    if not shared:
        return None
    tables = [dict(zip(entry.steps, entry.values, strict=True)) for entry in series]
    return Series(tuple(shared), tuple(sum(table[step] for table in tables) / len(tables) for step in shared))
