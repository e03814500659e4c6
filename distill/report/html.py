"""The page: one HTML file that reads nothing else, neither from the network nor from the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from distill.export.provenance import Source
from distill.report.feature_maps import MapRow
from distill.report.metrics_csv import Series
from distill.report.number_text import (
    count_text,
    difference_text,
    interval_text,
    score_text,
    short_count_text,
)
from distill.report.probe_json import OVERALL, EncoderScores, ProbeResults
from distill.report.recipe import ExportEntry, Part
from distill.report.verdict import Verdict, honest_verdict

ROLE_NAMES = {"initial": "initial student", "student": "distilled student", "teacher": "teacher", "other": "baseline"}
METRIC_NAMES = {
    "linear_top1": ("Linear probe", "top-1 accuracy, %"),
    "knn_top1": ("kNN", "top-1 accuracy, %"),
    "cosine_centred": ("Fidelity", "centred cosine with the teacher"),
    "cka": ("CKA", "of pooled features with the teacher's"),
}


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
    """The rows of one metric."""

    title: str
    note: str
    rows: tuple[TableRow, ...]


@dataclass(frozen=True)
class Tile:
    """One figure of the heading: from the initial value to the distilled one, with the teacher's beside them."""

    label: str
    before: str
    after: str
    note: str


@dataclass
class Page:
    """Everything on the page. Where a section's content is empty, its `*_absent` sentence says why.

    Attributes:
        name: of the run.
        parts: teachers and students.
        probe: scores, or None.
        verdicts: one for each student.
        score_svgs: charts of the scores, SVG elements.
        validation_svgs: charts of validation.
        training_svgs: charts of loss, throughput and the rest.
        map_rows: images and feature maps.
    """

    name: str
    parts: list[Part]
    probe: ProbeResults | None = None
    probe_absent: str = ""
    verdicts: list[Verdict] = field(default_factory=list[Verdict])
    score_svgs: list[str] = field(default_factory=list[str])
    validation_svgs: list[str] = field(default_factory=list[str])
    validation_absent: str = ""
    training_svgs: list[str] = field(default_factory=list[str])
    training_absent: str = ""
    training_facts: list[str] = field(default_factory=list[str])
    map_rows: list[MapRow] = field(default_factory=list[MapRow])
    maps_absent: str = ""
    exports: list[ExportEntry] = field(default_factory=list[ExportEntry])
    sources: list[Source] = field(default_factory=list[Source])
    versions: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    commands: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    config_yaml: str = ""


def render(page: Page) -> str:
    """Return the page as HTML; every name and text from outside is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    package = files("distill.report")
    template = environment.from_string((package / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        page=page,
        # Not user text: the package's own file, and figures whose texts were escaped when they were drawn.
        css=Markup((package / "page.css").read_text(encoding="utf-8")),
        score_svgs=_markup(page.score_svgs),
        validation_svgs=_markup(page.validation_svgs),
        training_svgs=_markup(page.training_svgs),
        tiles=tiles(page.probe, page.parts),
        scopes=table_scopes(page.probe),
        score_groups=score_groups(page.probe),
        paired=paired_rows(page.probe),
        data_facts=data_facts(page.probe),
        count_text=count_text,
        decimal=lambda value: score_text("cosine_centred", value),
    )


def _markup(svgs: Sequence[str]) -> list[Markup]:
    return [Markup(svg) for svg in svgs]


def table_scopes(probe: ProbeResults | None) -> list[str]:
    """Return the columns of the score table: all domains together, then each."""
    return [] if probe is None else [OVERALL, *probe.domains]


def score_groups(probe: ProbeResults | None) -> list[ScoreGroup]:
    """Return the score table: for each metric one row for each encoder that has it."""
    if probe is None:
        return []
    groups: list[ScoreGroup] = []
    for metric, (title, note) in METRIC_NAMES.items():
        rows = tuple(_row(encoder, metric, table_scopes(probe)) for encoder in probe.encoders if encoder.scores[metric])
        if rows:
            groups.append(ScoreGroup(title, note, rows))
    return groups


def _row(encoder: EncoderScores, metric: str, scopes: Sequence[str]) -> TableRow:
    cells: list[Cell] = []
    for scope in scopes:
        score = encoder.scores[metric].get(scope)
        if score is None:
            cells.append(Cell(score_text(metric, None)))
        else:
            count = "" if score.n is None else f"n = {score.n:,}"
            cells.append(Cell(score_text(metric, score.value), interval_text(metric, score.low, score.high), count))
    return TableRow(encoder.name, encoder.role, ROLE_NAMES.get(encoder.role, encoder.role), tuple(cells))


def paired_rows(probe: ProbeResults | None) -> list[dict[str, str]]:
    """Return every paired difference as text, with the verdict that its interval allows."""
    if probe is None:
        return []
    return [
        {
            "a": entry.a,
            "b": entry.b,
            "metric": METRIC_NAMES.get(entry.metric, (entry.metric, ""))[0],
            "scope": entry.scope,
            "difference": difference_text(entry.metric, entry.difference, None, None),
            "interval": interval_text(entry.metric, entry.low, entry.high),
            "n": count_text(entry.n),
            "verdict": honest_verdict(entry),
        }
        for entry in probe.paired
    ]


def tiles(probe: ProbeResults | None, parts: Sequence[Part]) -> list[Tile]:
    """Return the figures of the heading: fidelity, accuracies and size of the first student."""
    found: list[Tile] = []
    if probe is not None and (students := probe.of_role("student")):
        initial, teachers = probe.initial_of(students[0].name), probe.of_role("teacher")
        for metric, label, unit in (
            ("cosine_centred", "Fidelity to the teacher", ""),
            ("linear_top1", "Linear probe, top-1", "\u202f%"),
            ("knn_top1", "kNN, top-1", "\u202f%"),
        ):
            after = students[0].scores[metric].get(OVERALL)
            if after is not None:
                before = None if initial is None else initial.scores[metric].get(OVERALL)
                top = teachers[0].scores[metric].get(OVERALL) if teachers else None
                shown = "" if before is None else score_text(metric, before.value)
                note = f"teacher {score_text(metric, top.value)}{unit}" if top else "a perfect copy would have 1"
                found.append(Tile(label, shown, score_text(metric, after.value) + unit, note))
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


def training_facts(metrics: dict[str, Series]) -> list[str]:
    """Return short facts about training: the last logged step and the median throughput."""
    facts: list[str] = []
    steps = [series.steps[-1] for name, series in metrics.items() if not name.startswith("val/")]
    if steps:
        facts.append(f"last logged step {max(steps):,.0f}")
    rate = metrics.get("throughput/images_per_s")
    if rate is not None:
        ordered = sorted(rate.values)
        facts.append(f"median {ordered[len(ordered) // 2]:,.1f} images/s")
    return facts
