"""Scores as the page writes them: tables with intervals, n and seed, tiles, facts about the probe's data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distill.probe.number_text import (
    PERCENT_KINDS,
    axis_text,
    count_text,
    difference_text,
    interval_text,
    score_text,
    short_count_text,
)
from distill.probe.results import OVERALL, MetricInfo, ProbeResults, Score
from distill.report.recipe import Part
from distill.report.score_charts import axis_title, chart_title, is_secondary
from distill.report.verdict import honest_verdict

ROLE_NAMES = {
    "initial": "initial student",
    "student": "distilled student",
    "teacher": "teacher",
    "other": "baseline",
    "ceiling": "ceiling",
}
TILES = (
    ("cosine_centred", "Fidelity to the teacher"),
    ("linear_top1", "Linear probe, top-1"),
    ("knn_top1", "kNN, top-1"),
)


@dataclass(frozen=True)
class Cell:
    """A figure of a table: the value, its interval, and how many images are behind it."""

    value: str
    interval: str = ""
    count: str = ""


@dataclass(frozen=True)
class TableRow:
    """One encoder's figures of one metric."""

    name: str
    role: str
    role_name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class ScoreGroup:
    """The rows of one metric; `note` tells the seed and what a guess scores."""

    title: str
    note: str
    rows: tuple[TableRow, ...]


@dataclass(frozen=True)
class AxisTable:
    """A metric over an axis: the points and the rows of its encoders."""

    title: str
    axis: str
    points: tuple[str, ...]
    group: ScoreGroup


@dataclass(frozen=True)
class Tile:
    """One figure of the heading: from the initial value to the distilled one, with the teacher's beside them."""

    label: str
    before: str
    after: str
    note: str


def table_scopes(probe: ProbeResults | None) -> list[str]:
    """Return the columns of the score table: all domains together, then each."""
    return [] if probe is None else [OVERALL, *probe.domains]


def score_groups(probe: ProbeResults | None, *, secondary: bool = False) -> list[ScoreGroup]:
    """Return the score table, of the main metrics or of the others: one row for each encoder that has a metric."""
    if probe is None:
        return []
    groups: list[ScoreGroup] = []
    judged = [*probe.encoders, *([probe.ceiling] if probe.ceiling else [])]
    for metric, info in probe.metrics.items():
        if is_secondary(metric, info) != secondary:
            continue
        found = [(encoder, encoder.of(metric)) for encoder in judged if encoder.of(metric)]
        rows = tuple(
            TableRow(
                encoder.name,
                encoder.role,
                ROLE_NAMES.get(encoder.role, encoder.role),
                tuple(_cell(scores.get(scope), info) for scope in table_scopes(probe)),
            )
            for encoder, scores in found
        )
        if rows:
            note = _note(probe, info, [score for _, scores in found for score in scores.values()])
            groups.append(ScoreGroup(chart_title(info), note, rows))
    return groups


def _cell(score: Score | None, info: MetricInfo) -> Cell:
    if score is None:
        return Cell(score_text(info.kind, None))
    count = "" if score.n is None else f"n\u00a0=\u00a0{score.n:,}"
    return Cell(score_text(info.kind, score.value), interval_text(info.kind, score.low, score.high), count)


def _note(probe: ProbeResults, info: MetricInfo, scores: Sequence[Score]) -> str:
    seeds = sorted({score.seed for score in scores if score.seed is not None})
    if not seeds and isinstance(probe.settings.get("seed"), int):
        seeds = [int(probe.settings["seed"])]
    known = ["seed " + ", ".join(map(str, seeds))] if seeds else []
    if info.blind is not None:
        known.append(f"without looking at the image {score_text(info.kind, info.blind)}")
    return "; ".join(known)


def axis_tables(probe: ProbeResults | None) -> list[AxisTable]:
    """Return the figures over each axis, all domains together."""
    if probe is None:
        return []
    tables: list[AxisTable] = []
    for metric, axis in dict.fromkeys(key for encoder in probe.encoders for key in encoder.curves):
        info = probe.info(metric)
        curves = {entry.name: dict(entry.curves.get((metric, axis), {}).get(OVERALL, [])) for entry in probe.encoders}
        points = sorted({x for curve in curves.values() for x in curve})
        rows = tuple(
            TableRow(
                entry.name,
                entry.role,
                ROLE_NAMES.get(entry.role, entry.role),
                tuple(_cell(curves[entry.name].get(x), info) for x in points),
            )
            for entry in probe.encoders
            if curves[entry.name]
        )
        if rows:
            note = _note(probe, info, [score for curve in curves.values() for score in curve.values()])
            group = ScoreGroup(chart_title(info), note, rows)
            tables.append(AxisTable(chart_title(info), axis_title(axis), tuple(map(axis_text, points)), group))
    return tables


def paired_rows(probe: ProbeResults | None) -> list[dict[str, str]]:
    """Return every paired difference as text, with the verdict that its interval allows."""
    if probe is None:
        return []
    rows: list[dict[str, str]] = []
    for entry in probe.paired:
        info = probe.info(entry.metric)
        at = "" if entry.at is None else f", {axis_title(entry.at[0])} {axis_text(entry.at[1])}"
        rows.append(
            {
                "a": entry.a,
                "b": entry.b,
                "metric": info.title + at,
                "scope": entry.scope,
                "difference": difference_text(info.kind, entry.difference, None, None),
                "interval": interval_text(info.kind, entry.low, entry.high),
                "n": count_text(entry.n),
                "verdict": honest_verdict(entry, lower_is_better=info.lower_is_better),
            }
        )
    return rows


def tiles(probe: ProbeResults | None, parts: Sequence[Part]) -> list[Tile]:
    """Return the figures of the heading: fidelity, accuracies and size of the first student."""
    found: list[Tile] = []
    if probe is not None and (students := probe.of_role("student")):
        initial, teachers = probe.initial_of(students[0].name), probe.of_role("teacher")
        for metric, label in TILES:
            kind = probe.info(metric).kind
            unit = "\u202f%" if kind in PERCENT_KINDS else ""
            after = students[0].of(metric).get(OVERALL)
            if after is not None:
                before = None if initial is None else initial.of(metric).get(OVERALL)
                top = teachers[0].of(metric).get(OVERALL) if teachers else None
                shown = "" if before is None else score_text(kind, before.value)
                limit = probe.ceiling.of(metric).get(OVERALL) if probe.ceiling else None
                absent = "a perfect copy would have 1" if limit is None else f"ceiling {score_text(kind, limit.value)}"
                note = f"teacher {score_text(kind, top.value)}{unit}" if top else absent
                found.append(Tile(label, shown, score_text(kind, after.value) + unit, note))
    size = _size_tile(parts)
    return [*found, size] if size else found


def _size_tile(parts: Sequence[Part]) -> Tile | None:
    counts = {
        kind: next((part.num_params for part in parts if part.kind == kind and part.num_params), None)
        for kind in ("teacher", "student")
    }
    if counts["student"] is None:
        return None
    teacher = counts["teacher"]
    note = "parameters" if teacher is None else f"of the teacher's {short_count_text(teacher)} parameters"
    return Tile("Student size", "", short_count_text(counts["student"]), note)


def data_facts(probe: ProbeResults | None) -> list[tuple[str, str]]:
    """Return (name, value) of the probe's data and settings."""
    if probe is None:
        return []
    data: dict[str, Any] = probe.data
    facts = [("domains", ", ".join(probe.domains))]
    for key, name in (("n_fit", "images to fit on"), ("n_select", "images to select on"), ("n_test", "images scored")):
        if isinstance(data.get(key), int):
            facts.append((name, count_text(data[key])))
    if isinstance(data.get("num_classes"), int):
        facts.append(("classes", count_text(data["num_classes"])))
    facts += [(key, str(data[key])) for key in ("path", "fingerprint") if data.get(key)]
    facts += [(key.replace("_", " "), str(value)) for key, value in probe.settings.items() if value is not None]
    return facts


def leak_sentence(probe: ProbeResults | None) -> str:
    """Return how many probed images were met in training shards; "" where nobody looked."""
    if probe is None or not probe.leaks:
        return ""
    counts = {key: probe.leaks.get(key) for key in ("checked", "exact", "near", "excluded")}
    if not isinstance(counts["exact"], int) or not isinstance(counts["near"], int):
        return ""
    looked = f" of {counts['checked']:,} looked at" if isinstance(counts["checked"], int) else ""
    if not counts["exact"] and not counts["near"]:
        return f"No probed image{looked} is in the training shards, neither exactly nor nearly."
    left_out = "; they were left out of the figures" if counts["excluded"] else "; they count in the figures"
    return (
        f"In the training shards too: {counts['exact']:,} probed images exactly and {counts['near']:,} nearly"
        f"{looked}{left_out}."
    )
