"""Measure what our training loop costs beside the step itself: `distill fit` against a bare loop of the same step.

    python scripts/bench/lightning_overhead.py                     # the pair of step.py at 224 px, float32: two minutes
    python scripts/bench/lightning_overhead.py --size 112 --steps 4

Both sides read, decode and train the same images with the same optimiser; the bare one has no trainer, callbacks, logs,
metrics or checkpoints. Two processes take turns; figures are CPU seconds an image, medians over the rounds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console
from sides import measure
from step import add_options, draw_images, our_side, recipe_of, write_figures

GOAL = 0.03


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=9, steps=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_images(folder, options.images, options.size)
        recipe = recipe_of(folder, options)
        sides = [our_side(side, recipe, folder, options, kind=side) for side in ("bare", "fit")]
        measure(sides, rounds=options.rounds, steps=options.steps, batch=options.batch)
    bare, fit = sides
    overhead = bare.median / fit.median - 1
    Console(width=110).print(
        f"bare loop {1e3 / bare.median:.1f} ms CPU an image, distill fit {1e3 / fit.median:.1f}: {overhead:+.1%} "
        f"(goal {GOAL:+.0%}). {options.size} px, batch {options.batch}, {options.precision}, {options.threads} "
        f"thread(s), medians of {options.rounds} interleaved rounds of {options.steps} steps."
    )
    write_figures({"overhead": overhead, "rates": {side.name: side.rates for side in sides}}, options)


if __name__ == "__main__":
    main()
