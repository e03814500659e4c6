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
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from sides import Side, measure
from step import add_options, draw_images, our_side, recipe_of, write_figures


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
    return [
        our_side("one student", one, folder, options),
        our_side("two students", with_two_students(one), folder, options),
        our_side("the student alone", one, folder, options, kind="alone"),
    ]


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
    add_options(parser)
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
    write_figures({**figures, "milliseconds": milliseconds}, options)


if __name__ == "__main__":
    main()
