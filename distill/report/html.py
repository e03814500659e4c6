"""The page: one HTML file that reads nothing else, neither from the network nor from the disk."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from distill.export.provenance import Source
from distill.probe.compare import Comparison
from distill.probe.compare_tables import LEGEND, rows_of
from distill.probe.number_text import count_text, score_text
from distill.probe.results import ProbeResults
from distill.report.books import LedgerFacts
from distill.report.feature_maps import ImageSection
from distill.report.recipe import ExportEntry, Part
from distill.report.score_tables import (
    axis_tables,
    data_facts,
    leak_sentence,
    paired_rows,
    score_groups,
    table_scopes,
    tiles,
)
from distill.report.small_vlms import VLMSection
from distill.report.verdict import Verdict
from distill.report.worst_images import WorstImages

_PACKAGE = files("distill.report")


@dataclass
class RunFacts:
    """What the page says of one run. Where content is empty, its `*_absent` sentence says why.

    Attributes:
        name: of the run.
        parts: teachers and students.
        verdicts: one for each student.
        training_facts: short facts about its training.
        cost: (name, value) of throughput, hours and cost.
        vlms: what small VLMs around the run's encoders score.
    """

    name: str
    parts: list[Part]
    verdicts: list[Verdict] = field(default_factory=list[Verdict])
    probe_absent: str = ""
    training_facts: list[str] = field(default_factory=list[str])
    ledger: LedgerFacts = field(default_factory=LedgerFacts)
    cost: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    worst: list[WorstImages] = field(default_factory=list[WorstImages])
    worst_absent: str = ""
    exports: list[ExportEntry] = field(default_factory=list[ExportEntry])
    sources: list[Source] = field(default_factory=list[Source])
    commands: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    config_yaml: str = ""
    vlms: VLMSection = field(default_factory=VLMSection)

    @property
    def has_vlms(self) -> bool:
        """Whether small VLMs were built around the run's encoders."""
        return self.vlms.comparison is not None or bool(self.vlms.absent or self.vlms.over_seeds)


@dataclass
class Page:
    """Everything on the page. Where a section's content is empty, its `*_absent` sentence says why.

    Attributes:
        runs: one or more.
        probe: scores of all runs, or None.
        probe_notes: sentences about the scores.
        comparison: paired differences between runs, or None.
        score_svgs: charts of the main scores, SVG elements.
        more_svgs: charts of the other scores.
        axis_svgs: charts of scores over an axis.
        validation_svgs: charts of validation.
        training_svgs: charts of loss, throughput and the rest.
        images: what encoders make of images, or None.
        small_css: style rules of pictures beside those of `images`.
    """

    runs: list[RunFacts]
    probe: ProbeResults | None = None
    probe_notes: list[str] = field(default_factory=list[str])
    comparison: Comparison | None = None
    comparison_absent: str = ""
    score_svgs: list[str] = field(default_factory=list[str])
    more_svgs: list[str] = field(default_factory=list[str])
    axis_svgs: list[str] = field(default_factory=list[str])
    validation_svgs: list[str] = field(default_factory=list[str])
    validation_absent: str = ""
    training_svgs: list[str] = field(default_factory=list[str])
    training_absent: str = ""
    images: ImageSection | None = None
    images_absent: str = ""
    small_css: str = ""
    versions: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    @property
    def name(self) -> str:
        """The page's title: the names of its runs."""
        return ", ".join(run.name for run in self.runs)


def render(page: Page) -> str:
    """Return the page as HTML; every name and text from outside is escaped."""
    environment = Environment(
        loader=FunctionLoader(_source), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = _source("page.js")
    css = "\n".join(filter(None, (_source("page.css"), page.images.css if page.images else "", page.small_css)))
    return environment.get_template("page.html.j2").render(
        page=page,
        several=len(page.runs) > 1,
        # Not user text: the package's own files, and figures whose texts were escaped when they were drawn.
        css=Markup(css),
        script=Markup(script),
        script_hash=script_hash(script),
        data_json=script_json(page.images.similarity_data if page.images else None),
        score_svgs=_markup(page.score_svgs),
        more_svgs=_markup(page.more_svgs),
        axis_svgs=_markup(page.axis_svgs),
        validation_svgs=_markup(page.validation_svgs),
        training_svgs=_markup(page.training_svgs),
        tiles=tiles(page.probe, page.runs[0].parts) if len(page.runs) == 1 else [],
        scopes=table_scopes(page.probe),
        score_groups=score_groups(page.probe),
        more_groups=score_groups(page.probe, secondary=True),
        axis_tables=axis_tables(page.probe),
        paired=paired_rows(page.probe),
        leaks=leak_sentence(page.probe),
        data_facts=data_facts(page.probe),
        compared=rows_of(page.comparison) if page.comparison else [],
        compared_legend=LEGEND,
        count_text=count_text,
        decimal=lambda value: score_text("cosine", value),
    )


def _source(name: str) -> str:
    return (_PACKAGE / name).read_text(encoding="utf-8")


def script_hash(script: str) -> str:
    """Return the hash by which the page's policy admits its one script and no other."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def script_json(content: object) -> Markup:
    """Return JSON that may stand inside a script element: it holds no "<"."""
    return Markup(json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"))


def _markup(svgs: Sequence[str]) -> list[Markup]:
    return [Markup(svg) for svg in svgs]
