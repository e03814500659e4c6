"""What small VLMs that were built around a run's encoders score, paired question by question."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from distill.errors import DistillError
from distill.probe.compare import Comparison, compare_contenders
from distill.probe.compare_tables import Row, rows_of, titled
from distill.probe.contenders import Contender, read_contenders
from distill.probe.number_text import score_text

FOLDER = "vlm"
"""Where in a run's folder its small VLMs lie: RUN/vlm/NAME, each the run_dir of a `distill vlm fit`."""


@dataclass(frozen=True)
class VLMSection:
    """The comparison of small VLMs that differ in their encoder; empty where a run has fewer than two.

    Attributes:
        comparison: paired differences, or None.
        rows: its table.
        chance: what guessing scores, by the title of the figure.
        absent: why there is no comparison.
    """

    comparison: Comparison | None = None
    rows: list[Row] = field(default_factory=list[Row])
    chance: dict[str, str] = field(default_factory=dict[str, str])
    absent: str = ""


def vlm_section(run: Path) -> VLMSection:
    """Compare the scored VLMs in a run's folder `vlm`; the one around the initial encoder is the baseline."""
    files = sorted((run / FOLDER).glob("*/probe.json"))
    if len(files) < 2:
        return VLMSection()
    try:
        contenders = read_contenders(files, "all")
        found = compare_contenders(contenders, _baseline(contenders))
    except DistillError as error:
        return VLMSection(absent=f"The small VLMs could not be compared. {error}")
    infos = {titled(entry): entry.info for entry in found.figures}
    chance = {title: score_text(info.kind, info.blind) for title, info in infos.items() if info.blind is not None}
    return VLMSection(found, rows_of(found), chance)


def _baseline(contenders: list[Contender]) -> str:
    initial = [entry.label for entry in contenders if entry.scores.role == "initial"]
    return (initial or [contenders[0].label])[0]
