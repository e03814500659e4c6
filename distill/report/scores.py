"""The page's scores: what the probes of its runs say, what they allow to claim, and the images that went worst."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from distill.checkpoint import RunDir
from distill.errors import DistillError
from distill.probe.compare import compare_contenders
from distill.probe.contenders import read_contenders
from distill.probe.results import ProbeResults
from distill.probe.results_file import read_probe
from distill.report.html import Page, RunFacts
from distill.report.page_files import FigureFiles
from distill.report.score_charts import axis_charts, score_charts
from distill.report.several import merged, of_same_images
from distill.report.thumbnails import SmallPictures
from distill.report.verdict import judge
from distill.report.worst_images import worst_images


def add_scores(page: Page, runs: Mapping[str, RunDir], figures: FigureFiles, data: str | None) -> None:
    """Put the probes' scores on the page; what is missing or cannot be read is told in its place."""
    probes: dict[str, ProbeResults] = {}
    pictures = SmallPictures()
    for number, (facts, run) in enumerate(zip(page.runs, runs.values(), strict=True)):
        results = _read(facts, run)
        if results is not None:
            probes[facts.name] = results
            facts.verdicts = judge(results)
            _add_worst(facts, run, results, data, pictures, prefix=f"r{number}")
            for student in facts.worst:
                figures.add_worst("worst-images", student)
    page.small_css = pictures.css()
    if not probes:
        return
    page.probe = merged(probes)
    if not of_same_images(probes):
        page.probe_notes.append(
            "The runs were probed on different images, so their figures cannot be compared with each other."
        )
    page.score_svgs = figures.draw(score_charts(page.probe))
    page.more_svgs = figures.draw(score_charts(page.probe, secondary=True))
    page.axis_svgs = figures.draw(axis_charts(page.probe))
    if len(runs) > 1:
        _compare(page, runs)


def _read(facts: RunFacts, run: RunDir) -> ProbeResults | None:
    file = run.path / "probe.json"
    if not file.is_file():
        facts.probe_absent = "There are no scores yet: the run has no probe.json. `distill probe` writes it."
        return None
    try:
        return read_probe(file)
    except DistillError as error:
        facts.probe_absent = f"The scores could not be read. {error}"
        return None


def _add_worst(
    facts: RunFacts, run: RunDir, results: ProbeResults, data: str | None, pictures: SmallPictures, prefix: str
) -> None:
    block: Any = run.config.get("data") or {}
    block = cast(dict[str, Any], block.get("init_args") or block) if isinstance(block, dict) else {}
    places = (results.data.get("path"), data, block.get("val"))
    try:
        facts.worst = worst_images(results, run.path / "probe.json", places, pictures, prefix)
    except DistillError as error:
        facts.worst_absent = str(error)


def _compare(page: Page, runs: Mapping[str, RunDir]) -> None:
    paths = [run.path for run in runs.values() if (run.path / "probe.json").is_file()]
    try:
        page.comparison = compare_contenders(read_contenders(paths, "students"))
    except DistillError as error:
        page.comparison_absent = f"The runs could not be compared. {error}"
