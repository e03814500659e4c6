"""Measure what a second student adds to a run, beside what a student costs by itself.

    python scripts/bench/second_student.py                     # the pair of step.py at 224 px, float32: four minutes
    python scripts/bench/second_student.py --size 112 --steps 4

Three processes take turns: `distill fit` with one student, the same with two of one size, and a loop of the student
alone, its forward pass, head, loss, backward pass and optimiser on one batch and its teacher's states, without teacher
or data. The teacher's forward pass and the images are shared, so that the second should add what the third takes.
Figures are CPU milliseconds an image (user and system), medians over the rounds; the ratio is that of each round.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from sides import Side, measure
from step import HERE, draw_images, recipe_of


def with_two_students(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe with a second student like its first, taught likewise."""
    doubled = copy.deepcopy(recipe)
    model = doubled["model"]
    model["students"]["second"] = copy.deepcopy(model["students"]["student"])
    model["alignments"] += [entry | {"student": "second"} for entry in copy.deepcopy(model["alignments"])]
    return doubled


def sides_of(folder: Path, options: argparse.Namespace) -> list[Side]:
    """Return the runs with one and with two students, and the student alone."""
    draw_images(folder, options.images, options.size)
    one = recipe_of(folder, options)
    recipes = {"one student": one, "two students": with_two_students(one), "the student alone": one}
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    sides: list[Side] = []
    for number, (name, content) in enumerate(recipes.items()):
        content = copy.deepcopy(content)
        content["trainer"]["default_root_dir"] = str(folder / f"run{number}")
        file = folder / f"recipe{number}.yaml"
        file.write_text(yaml.safe_dump(content))
        kind = "alone" if name == "the student alone" else "fit"
        command = [sys.executable, str(HERE / "step_ours.py"), kind, "--recipe", str(file)]
        command += ["--threads", str(options.threads)]
        sides.append(Side(name, command, environment, folder / f"{number}.log"))
    return sides


def summary(milliseconds: dict[str, list[float]]) -> dict[str, float]:
    """Return medians of milliseconds an image, and of what the second student adds in each round.

    Args:
        milliseconds: of one round each, by "one student", "two students", "the student alone".
    """
    one, two, alone = (milliseconds[name] for name in ("one student", "two students", "the student alone"))
    added = [after - before for before, after in zip(one, two, strict=True)]
    figures = {name: statistics.median(values) for name, values in milliseconds.items()}
    ratio = statistics.median(more / own for more, own in zip(added, alone, strict=True))
    return figures | {"added": statistics.median(added), "ratio": ratio}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps a round and side")
    parser.add_argument("--images", type=int, default=64, help="drawn images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        sides = sides_of(Path(name), options)
        measure(sides, rounds=options.rounds, steps=options.steps, batch=options.batch)
    milliseconds = {side.name: [1e3 / rate for rate in side.rates] for side in sides}
    figures = summary(milliseconds)
    one, added, ratio = figures["one student"], figures["added"], figures["ratio"]
    Console(width=110).print(
        f"One student {one:.1f} ms CPU an image, two {figures['two students']:.1f}: the second adds {added:.1f} "
        f"({added / one:.0%}); a student alone takes {figures['the student alone']:.1f}: ratio {ratio:.2f}. "
        f"{options.size} px, batch {options.batch}, {options.precision}, {options.threads} thread(s), medians of "
        f"{options.rounds} interleaved rounds of {options.steps} steps."
    )
    if options.json is not None:
        content = {**figures, "milliseconds": milliseconds, **vars(options)}
        options.json.write_text(json.dumps(content, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
