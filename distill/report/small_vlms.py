"""What small VLMs that were built around a run's encoders score, paired question by question, and over seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from distill.errors import DistillError
from distill.probe.compare import Comparison, compare_contenders
from distill.probe.compare_tables import Row, rows_of, titled
from distill.probe.contenders import Contender, read_contenders
from distill.probe.number_text import difference_text, interval_text, score_text
from distill.vlm.ablation_table import KIND, AblationFigure, AblationTable, legend, read_ablation

FOLDER = "vlm"
"""Where in a run's folder its small VLMs lie: RUN/vlm/NAME, each the run_dir of a `distill vlm fit`, or the --out of a
`distill ablate`."""


@dataclass(frozen=True)
class SeedsRow:
    """One figure of an ablation.

    Attributes:
        title: what is measured.
        n: questions.
        chance: what the best constant answers score.
        cells: by name of the cell: value, interval and spread, paired difference, verdict.
    """

    title: str
    n: int
    chance: str
    cells: dict[str, tuple[str, str, str, str]]


@dataclass(frozen=True)
class SeedsTable:
    """An ablation's figures over seeds.

    Attributes:
        name: of its folder.
        legend: what the numbers are.
        labels: of its cells.
        rows: a figure each.
    """

    name: str
    legend: str
    labels: tuple[str, ...]
    rows: list[SeedsRow]


@dataclass(frozen=True)
class VLMSection:
    """The comparison of small VLMs that differ in their encoder; empty where a run has fewer than two.

    Attributes:
        comparison: paired differences, or None.
        rows: its table.
        chance: what guessing scores, by the title of the figure.
        absent: why there is no comparison.
        over_seeds: ablations, a table each.
    """

    comparison: Comparison | None = None
    rows: list[Row] = field(default_factory=list[Row])
    chance: dict[str, str] = field(default_factory=dict[str, str])
    absent: str = ""
    over_seeds: list[SeedsTable] = field(default_factory=list[SeedsTable])


def vlm_section(run: Path) -> VLMSection:
    """Compare the scored VLMs in a run's folder `vlm`; the one around the initial encoder is the baseline."""
    files = sorted((run / FOLDER).glob("*/probe.json"))
    try:
        ablations = [
            seeds_table(file.parent.name, read_ablation(file))
            for file in sorted((run / FOLDER).glob("*/ablation.json"))
        ]
        if len(files) < 2:
            return VLMSection(over_seeds=ablations)
        contenders = read_contenders(files, "all")
        found = compare_contenders(contenders, _baseline(contenders))
    except DistillError as error:
        return VLMSection(absent=f"The small VLMs could not be compared. {error}")
    infos = {titled(entry): entry.info for entry in found.figures}
    chance = {title: score_text(info.kind, info.blind) for title, info in infos.items() if info.blind is not None}
    return VLMSection(found, rows_of(found), chance, over_seeds=ablations)


def seeds_table(name: str, table: AblationTable) -> SeedsTable:
    """Return an ablation's table, a row for each figure and a column for each cell."""
    by_title: dict[str, dict[str, AblationFigure]] = {}
    for figure in table.figures:
        by_title.setdefault(figure.title, {})[figure.cell] = figure
    rows: list[SeedsRow] = []
    for title, figures in by_title.items():
        first = next(iter(figures.values()))
        cells = {cell: _seeds_cell(figure) for cell, figure in figures.items()}
        rows.append(SeedsRow(f"{title} (%)", first.n, score_text(KIND, first.blind), cells))
    return SeedsTable(name, legend(table), tuple(table.cells), rows)


def _seeds_cell(figure: AblationFigure) -> tuple[str, str, str, str]:
    spread = "" if figure.spread is None else f" ± {score_text(KIND, figure.spread)}"
    interval = interval_text(KIND, figure.low, figure.high) + spread
    if figure.difference is None:
        return score_text(KIND, figure.value), interval, "", "baseline"
    change = difference_text(KIND, figure.difference, figure.difference_low, figure.difference_high)
    return score_text(KIND, figure.value), interval, change, figure.verdict


def _baseline(contenders: list[Contender]) -> str:
    initial = [entry.label for entry in contenders if entry.scores.role == "initial"]
    return (initial or [contenders[0].label])[0]
