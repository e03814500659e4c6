"""The verb `distill ablate`: the same small VLM with one thing changed at a time, at equal budget, with intervals."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from distill.errors import ConfigError, UnfinishedError
from distill.stop_signals import close_stop_signals, stop_signals

if TYPE_CHECKING:
    from distill.vlm.ablation_grid import Grid

Device = Literal["auto", "cpu", "cuda", "mps"]
WIDTH = 110


@dataclass(frozen=True)
class Settings:
    """How the cells of an ablation are run.

    Attributes:
        batch_size: questions at a time.
        device: where the models answer.
        max_hours: no cell is begun after so long; None has no limit.
        seed: of the intervals' resampling.
    """

    batch_size: int
    device: str
    max_hours: float | None
    seed: int


def ablate(
    grid: Path,
    *,
    out: Path,
    max_hours: float | None = None,
    batch_size: int = 32,
    device: Device = "auto",
    seed: int = 0,
) -> None:
    """Train and score a small VLM for every combination of a grid, and print the table with seeds and intervals.

    The grid's file names the recipe, axes such as encoder, resolution, connector, tokens or data mix, the seeds, and
    the budget in steps, which is equal for all. Started again with the same files it goes on where it stands: finished
    cells are kept, a cell that was cut goes on from its last checkpoint.

    Args:
        grid: YAML file with recipe, axes, questions and, if wanted, overrides, steps, seeds and baseline.
        out: folder for the cells' runs, ablation.json, ablation.csv and ablation.md.
        max_hours: begin no further run after so long, and end with status 75; the next start goes on.
        batch_size: questions at a time.
        device: where the models answer; where they train is said by trainer.accelerator of the recipe.
        seed: of the intervals' resampling.

    Raises:
        DistillError: the grid, a cell's recipe, the data, the questions or weights cannot be used.
        UnfinishedError: told to stop, or out of time; the next start goes on.
    """
    if (max_hours is not None and max_hours <= 0) or batch_size < 1 or seed < 0:
        raise ConfigError(f"--max_hours {max_hours}, --batch_size {batch_size} and --seed {seed}: out of range.")
    from distill.vlm.ablation_grid import read_grid
    from distill.vlm.ablation_table import print_ablation, tabulate, write_ablation

    parsed = read_grid(grid)
    console = Console(width=WIDTH)
    runs = run_cells(parsed, out, Settings(batch_size, device, max_hours, seed), console)
    table = tabulate(parsed, runs, seed=seed)
    print_ablation(table, console)
    for file in write_ablation(table, out):
        console.print(f"Written: {file}", highlight=False, markup=False, soft_wrap=True)


def run_cells(grid: Grid, out: Path, settings: Settings, console: Console) -> dict[tuple[str, int], Path]:
    """Run what is left of a grid, and return the scored run of each cell and seed.

    Raises:
        UnfinishedError: out of time, or told to stop.
    """
    from distill.vlm.answers import read_questions
    from distill.vlm.score_files import questions_fingerprint

    asked = questions_fingerprint(read_questions(grid.questions))
    wanted = [(cell, seed) for cell in grid.cells for seed in grid.seeds]
    began = time.monotonic()
    found: dict[tuple[str, int], Path] = {}
    for number, (cell, seed) in enumerate(wanted, start=1):
        folder = out / "cells" / cell.name / f"seed-{seed}"
        found[cell.name, seed] = folder
        title = f"[{number}/{len(wanted)}] {cell.name}, seed {seed}"
        content = {**cell.content, "seed": seed, "run_dir": str(folder)}
        if is_scored(folder, content, asked):
            console.print(f"{title}: done before", highlight=False, markup=False)
            continue
        hours = (time.monotonic() - began) / 3600
        if settings.max_hours is not None and hours >= settings.max_hours:
            raise UnfinishedError(
                f"--max_hours {settings.max_hours:g} is over with {number - 1} of {len(wanted)} runs done; run the "
                "same command again to go on."
            )
        console.print(title, highlight=False, markup=False)
        run_cell(content, grid.questions, settings, console)
    return found


def run_cell(content: dict[str, Any], questions: Path, settings: Settings, console: Console) -> None:
    """Train and score one cell with one seed, going on from its last checkpoint where there is one."""
    from distill.vlm.recipe import build_recipe
    from distill.vlm.scored_run import ScoreOptions, score_run

    recipe = build_recipe(content)
    stop_signals()
    try:
        from distill.vlm.stages.run import run_recipe

        run = run_recipe(recipe, content, resume="auto", console=console)
    finally:
        close_stop_signals()
    options = ScoreOptions(batch_size=settings.batch_size, device=settings.device, seed=settings.seed)
    score_run(run.path, questions, run.path, options, console)


def is_scored(folder: Path, content: dict[str, Any], questions: str) -> bool:
    """Whether a run of this very recipe was scored on the questions of this fingerprint.

    Raises:
        ConfigError: the folder holds a run of another recipe.
    """
    from distill.probe.results_file import read_probe
    from distill.vlm.runs import VLMRun, refuse_other_recipe

    run, file = VLMRun(folder), folder / "probe.json"
    if not file.is_file() or not run.config_file.is_file():
        return False
    refuse_other_recipe(run.content(), content, folder)
    return read_probe(file).data.get("fingerprint") == questions
