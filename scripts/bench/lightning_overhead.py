"""Measure what our training loop costs beside the step itself: `distill fit` against a bare loop of the same step.

    python scripts/bench/lightning_overhead.py                     # the pair of step.py at 224 px, float32: two minutes
    python scripts/bench/lightning_overhead.py --size 112 --steps 4

Both sides read, decode and train the same images with the same optimiser; the bare one has no trainer, callbacks, logs,
metrics or checkpoints. Two processes take turns; figures are CPU seconds an image, medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import yaml
from rich.console import Console
from sides import Side, measure
from step import HERE, draw_images, recipe_of

GOAL = 0.03


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="steps a round and side")
    parser.add_argument("--images", type=int, default=64, help="drawn images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_images(folder, options.images, options.size)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(recipe_of(folder, options)))
        sides = [
            Side(side, [*command, "--recipe", str(recipe), "--threads", str(options.threads)], environment, log)
            for side in ("bare", "fit")
            for command in [[sys.executable, str(HERE / "step_ours.py"), side]]
            for log in [folder / f"{side}.log"]
        ]
        measure(sides, rounds=options.rounds, steps=options.steps, batch=options.batch)
    bare, fit = sides
    overhead = bare.median / fit.median - 1
    Console(width=110).print(
        f"bare loop {1e3 / bare.median:.1f} ms CPU an image, distill fit {1e3 / fit.median:.1f}: {overhead:+.1%} "
        f"(goal {GOAL:+.0%}). {options.size} px, batch {options.batch}, {options.precision}, {options.threads} "
        f"thread(s), medians of {options.rounds} interleaved rounds of {options.steps} steps."
    )
    if options.json is not None:
        figures = {"overhead": overhead, "rates": {side.name: side.rates for side in sides}}
        options.json.write_text(json.dumps({**figures, **vars(options)}, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
