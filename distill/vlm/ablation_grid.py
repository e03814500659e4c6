"""What `distill ablate` reads: axes of alternatives, seeds and a budget, and the recipes that follow."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from distill.errors import ConfigError
from distill.vlm.recipe import build_recipe
from distill.vlm.recipe_files import merge, read_yaml

KEYS = ("recipe", "overrides", "axes", "seeds", "steps", "questions", "baseline")


@dataclass(frozen=True)
class Cell:
    """One combination of the axes' alternatives.

    Attributes:
        choice: the alternative of each axis, by name.
        content: its recipe as a plain mapping, without seed and run_dir.
    """

    choice: dict[str, str]
    content: dict[str, Any]

    @property
    def name(self) -> str:
        """Folder and label: alternatives joined, in the order of the axes."""
        return "+".join(f"{axis}={value}" for axis, value in self.choice.items())


@dataclass(frozen=True)
class Grid:
    """An ablation.

    Attributes:
        cells: every combination, in the order of the axes.
        seeds: of each cell's runs.
        questions: the held-out questions.
        baseline: the cell that the others are compared with.
    """

    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    questions: Path
    baseline: Cell


def read_grid(file: Path) -> Grid:
    """Return the ablation that a YAML file describes.

    `recipe` names one or several recipe files, merged. `overrides` is laid over them. `axes` has, by axis and by
    alternative, what each lays over that. `steps` gives the budget, optimiser steps by stage, equal for every cell;
    `seeds` a list of numbers; `questions` the held-out .jsonl; `baseline` an alternative for each axis, the first of
    each where it is left out.

    Raises:
        ConfigError: a key is unknown or missing, or a cell's recipe cannot be used.
    """
    content = read_yaml(file)
    unknown = [key for key in content if key not in KEYS]
    missing = [key for key in ("recipe", "axes", "questions") if key not in content]
    if unknown or missing:
        raise ConfigError(
            f"{file}: unknown key(s) {', '.join(unknown) or 'none'}, missing {', '.join(missing) or 'none'}; an "
            f"ablation has {', '.join(KEYS)}."
        )
    axes = _axes(content["axes"], file)
    base = _base(content, file)
    cells = tuple(_cell(choice, axes, base) for choice in itertools.product(*axes.values()))
    return Grid(
        cells, _seeds(content.get("seeds", [0]), file), Path(content["questions"]), _baseline(content, cells, file)
    )


def _axes(value: Any, file: Path) -> dict[str, dict[str, dict[str, Any]]]:
    axes = cast(dict[Any, Any], value) if isinstance(value, dict) else {}
    for axis, alternatives in axes.items():
        named = cast(dict[Any, Any], alternatives) if isinstance(alternatives, dict) else {}
        if not named or not all(isinstance(over, dict) for over in named.values()):
            raise ConfigError(
                f"{file}: axes.{axis} must name its alternatives, each with the keys of the recipe it sets."
            )
    if not axes:
        raise ConfigError(f"{file}: axes names no axis, for example encoder, resolution, connector, tokens or data.")
    return {str(a): {str(k): dict(v) for k, v in cast(dict[Any, Any], named).items()} for a, named in axes.items()}


def _base(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    named: Any = content["recipe"]
    files = [Path(name) for name in (cast(list[str], named) if isinstance(named, list) else [str(named)])]
    base: dict[str, Any] = {}
    for recipe in files:
        base = merge(base, read_yaml(recipe))
    base = merge(base, cast(dict[str, Any], content.get("overrides") or {}))
    steps = cast(dict[str, Any], content.get("steps") or {})
    absent = [stage for stage in steps if stage not in (base.get("stages") or {})]
    if absent:
        raise ConfigError(f"{file}: steps.{absent[0]} is for a stage that the recipe lacks.")
    return merge(base, {"stages": {stage: {"steps": count} for stage, count in steps.items()}}) if steps else base


def _cell(choice: tuple[str, ...], axes: Mapping[str, Mapping[str, dict[str, Any]]], base: dict[str, Any]) -> Cell:
    content = base
    for axis, value in zip(axes, choice, strict=True):
        content = merge(content, axes[axis][value])
    cell = Cell(dict(zip(axes, choice, strict=True)), content)
    try:
        build_recipe({**content, "run_dir": "unused"})
    except ConfigError as error:
        raise ConfigError(f"The cell {cell.name} cannot be built. {error}") from error
    return cell


def _seeds(value: Any, file: Path) -> tuple[int, ...]:
    seeds = cast(list[Any], value) if isinstance(value, list) else [value]
    if not seeds or not all(isinstance(seed, int) and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{file}: seeds {value} must be different whole numbers from 0.")
    return tuple(seeds)


def _baseline(content: Mapping[str, Any], cells: tuple[Cell, ...], file: Path) -> Cell:
    wanted = {**cells[0].choice, **cast(dict[str, str], content.get("baseline") or {})}
    wanted = {axis: str(value) for axis, value in wanted.items()}
    for cell in cells:
        if cell.choice == wanted:
            return cell
    raise ConfigError(f"{file}: baseline {wanted} is no cell; the cells are {', '.join(cell.name for cell in cells)}.")
