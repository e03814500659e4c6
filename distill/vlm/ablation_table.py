"""An ablation's table: each cell's figures over seeds, with intervals over questions and seeds, against a baseline."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from distill.data.pack.durable import durable_file
from distill.errors import DataError
from distill.probe.contenders import PerImageFiles, read_contenders
from distill.probe.number_text import difference_text, interval_text, score_text
from distill.probe.paired_ratio import PairedFigure, paired_figure
from distill.probe.rung import PerImage, RungScore
from distill.probe.score_intervals import figure_interval
from distill.vlm.ablation_grid import Grid
from distill.vlm.runs import VLMRun

FORMAT = "distill-ablation/1"
KIND = "accuracy"


@dataclass(frozen=True)
class AblationFigure:
    """One figure of one cell, over all its seeds.

    Attributes:
        cell: name of the cell.
        metric: name of the figure.
        title: what a reader sees.
        value: mean over questions and seeds.
        low: lower end of the 95 % interval, over questions and seeds; None with too few questions.
        high: its upper end.
        spread: standard deviation between seeds; None with one seed.
        n: questions.
        seeds: how many.
        blind: what the best constant answers score.
        difference: from the baseline, paired by question and seed; None for the baseline itself.
        difference_low: lower end of its interval, over questions and seeds.
        difference_high: its upper end.
        verdict: "better", "worse", "not distinguishable", or "" for the baseline.
    """

    cell: str
    metric: str
    title: str
    value: float
    low: float | None
    high: float | None
    spread: float | None
    n: int
    seeds: int
    blind: float | None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    verdict: str = ""


@dataclass(frozen=True)
class AblationTable:
    """All figures of an ablation.

    Attributes:
        cells: the axes' alternatives of each cell, by its name.
        baseline: name of the cell that the others are compared with.
        figures: by cell, then metric.
        seconds: of training, summed over stages, averaged over seeds, by cell.
        seeds: of the runs.
        seed: of the resampling.
    """

    cells: dict[str, dict[str, str]]
    baseline: str
    figures: list[AblationFigure]
    seconds: dict[str, float]
    seeds: tuple[int, ...]
    seed: int


def tabulate(grid: Grid, runs: Mapping[tuple[str, int], Path], *, seed: int) -> AblationTable:
    """Return the table of scored runs.

    Args:
        grid: cells, seeds and baseline.
        runs: the scored run of each cell and seed.
        seed: of the resampling.

    Raises:
        DataError: a run's scores are damaged or missing.
    """
    scores = {cell.name: _cell_scores([runs[cell.name, own] for own in grid.seeds]) for cell in grid.cells}
    figures = [
        _figure(cell.name, score, None if cell == grid.baseline else scores[grid.baseline.name].get(metric), seed)
        for cell in grid.cells
        for metric, score in scores[cell.name].items()
    ]
    seconds = {cell.name: statistics.mean(_seconds(runs[cell.name, own]) for own in grid.seeds) for cell in grid.cells}
    cells = {cell.name: cell.choice for cell in grid.cells}
    return AblationTable(cells, grid.baseline.name, figures, seconds, grid.seeds, seed)


def _seconds(run: Path) -> float:
    return sum(float(entry["seconds"]) for entry in VLMRun(run).stage_summaries())


def _cell_scores(runs: Sequence[Path]) -> dict[str, RungScore]:
    """Return each figure of a cell that is a mean over questions, its seeds as draws; POPE's F1 is none."""
    reader = PerImageFiles()
    found: dict[str, list[PerImage]] = {}
    about: dict[str, Any] = {}
    for run in runs:
        contender = read_contenders([run / "probe.json"], "all")[0]
        for metric, at in contender.entries:
            part = reader.read(contender, (metric, at))
            if part.denominator.shape[1] == 1 and bool((part.denominator == 1).all()):
                found.setdefault(metric, []).append(part)
                about[metric] = contender.results.info(metric)
    scores: dict[str, RungScore] = {}
    for metric, parts in found.items():
        draws = np.stack([part.numerator[:, 0] for part in parts])
        first = parts[0]
        means = PerImage(first.rows, draws.mean(0)[:, None], first.denominator, first.groups)
        info = about[metric]
        several = draws if len(parts) > 1 else None
        scores[metric] = RungScore(metric, info.title, KIND, means, draws=several, blind=info.blind)
    return scores


def _figure(cell: str, score: RungScore, baseline: RungScore | None, seed: int) -> AblationFigure:
    low, high = figure_interval(score, seed=seed)
    by_seed = None if score.draws is None else score.draws.mean(1)
    figure = AblationFigure(
        cell,
        score.metric,
        score.title,
        float(score.per_image.numerator.mean()),
        low,
        high,
        None if by_seed is None else float(by_seed.std(ddof=1)),
        len(score.per_image.rows),
        1 if score.draws is None else len(score.draws),
        score.blind,
    )
    if baseline is None:
        return figure
    pair = _paired(score, baseline, seed)
    verdict = pair.verdict(lower_is_better=False)
    return replace(
        figure, difference=pair.difference, difference_low=pair.low, difference_high=pair.high, verdict=verdict
    )


def _paired(score: RungScore, baseline: RungScore, seed: int) -> PairedFigure:
    """Return the difference from the baseline, paired by question and, where there are several, by seed.

    A seed sets initial weights and the order of the data of either side alike. Its interval resamples seeds as well as
    questions: runs that differ in their seed alone can lie further apart than the sides do.
    """
    pair = paired_figure(score.per_image, baseline.per_image, KIND, seed=seed)
    if score.draws is None or baseline.draws is None:
        return pair
    draws = score.draws - baseline.draws
    low, high = figure_interval(
        replace(score, per_image=replace(score.per_image, numerator=draws.mean(0)[:, None]), draws=draws), seed=seed
    )
    return replace(pair, low=low, high=high)


def print_ablation(table: AblationTable, console: Console) -> None:
    """Print one line a cell: value with interval, and the paired difference from the baseline."""
    titles = list(dict.fromkeys(figure.title for figure in table.figures))
    shown = Table(title=legend(table), title_justify="left", title_style="")
    shown.add_column("cell")
    for title in titles:
        chance = next((f.blind for f in table.figures if f.title == title and f.blind is not None), None)
        guess = "" if chance is None else f"\nchance {score_text(KIND, chance)}"
        shown.add_column(title.removeprefix("VLM: ") + guess, justify="right")
    shown.add_column("train s", justify="right")
    for cell in table.cells:
        by_title = {figure.title: figure for figure in table.figures if figure.cell == cell}
        cells = [_cell_text(by_title[title]) if title in by_title else "-" for title in titles]
        shown.add_row(cell.replace("+", "\n"), *cells, f"{table.seconds[cell]:.0f}")
    console.print(shown)


def legend(table: AblationTable) -> str:
    """Return what the numbers are."""
    seeds = ", ".join(map(str, table.seeds))
    return (
        f"Per cent right, mean over seed(s) {seeds}, with the 95 % interval over questions and seeds; below it the "
        f"paired difference from {table.baseline}, with its interval over the same."
    )


def _cell_text(figure: AblationFigure) -> str:
    text = f"{score_text(KIND, figure.value)} {interval_text(KIND, figure.low, figure.high)}"
    if figure.spread is not None:
        text += f" ± {score_text(KIND, figure.spread)}"
    if figure.difference is None:
        return f"{text}\nbaseline"
    change = difference_text(KIND, figure.difference, figure.difference_low, figure.difference_high)
    return f"{text}\n{change.replace(' points', '')} {figure.verdict}"


def write_ablation(table: AblationTable, out: Path) -> list[Path]:
    """Write ablation.json, ablation.csv and ablation.md, each atomically, and return them."""
    rows = [{**table.cells[figure.cell], **asdict(figure)} for figure in table.figures]
    content = {
        "format": FORMAT,
        "baseline": table.baseline,
        "cells": table.cells,
        "seeds": list(table.seeds),
        "resampling_seed": table.seed,
        "train_seconds": table.seconds,
        "figures": [asdict(figure) for figure in table.figures],
    }
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in rows)
    texts = {
        "ablation.json": json.dumps(content, indent=1, allow_nan=False) + "\n",
        "ablation.csv": buffer.getvalue(),
        "ablation.md": markdown(table),
    }
    written: list[Path] = []
    for name, text in texts.items():
        with durable_file(out / name) as file:
            file.write(text.encode())
        written.append(out / name)
    return written


def read_ablation(file: Path) -> AblationTable:
    """Return the table that `write_ablation` wrote as ablation.json.

    Raises:
        DataError: the file cannot be read, or is no such table.
    """
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
        figures = [AblationFigure(**entry) for entry in content["figures"]]
        seeds, resampling_seed = tuple(content["seeds"]), int(content["resampling_seed"])
        return AblationTable(
            content["cells"], content["baseline"], figures, content["train_seconds"], seeds, resampling_seed
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is no table of `distill ablate` ({error}); run the ablation again.") from error


def markdown(table: AblationTable) -> str:
    """Return the table as Markdown, a line for each cell and figure."""
    lines = [legend(table), "", "| cell | figure | n | chance | value | difference |", "|---|---|---:|---:|---:|---|"]
    for figure in table.figures:
        value, _, change = _cell_text(figure).partition("\n")
        title, chance = figure.title.removeprefix("VLM: "), score_text(KIND, figure.blind)
        lines.append(f"| {figure.cell} | {title} | {figure.n} | {chance} | {value} | {change} |")
    return "\n".join(lines) + "\n"
