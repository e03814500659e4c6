"""Measure what `model.engine.compile: inductor` gains and costs: the same run with it and without, in turns.

    python scripts/bench/compile.py                     # the pair of step.py at 224 px, float32: several minutes
    python scripts/bench/compile.py --size 112 --rounds 3

Both sides are `distill fit`. The first step of the compiled one generates and builds kernels, into an empty cache, and
is told in wall seconds; the others are images per CPU second (user and system), medians over the rounds. The losses of
all steps are compared: kernels round differently, and the difference grows over steps.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console
from sides import Side, measure
from step import add_options, draw_images, our_side, recipe_of, write_figures

BACKENDS = ("off", "inductor")


def sides_of(folder: Path, options: argparse.Namespace) -> list[Side]:
    """Return a run without and a run with compiled blocks; each writes its losses to `BACKEND.losses`."""
    draw_images(folder, options.images, options.size)
    kernels = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "kernels")}
    sides: list[Side] = []
    for backend in BACKENDS:
        recipe = recipe_of(folder, options)
        recipe["model"]["engine"] = {"compile": backend}
        recipe["model"]["teacher_micro_batch"] = options.micro_batch  # measured, it could differ between the sides
        losses = ("--losses", str(folder / f"{backend}.losses"))
        sides.append(our_side(backend, recipe, folder, options, *losses, environment=kernels))
    return sides


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, batch=4, steps=4)
    parser.add_argument("--micro-batch", type=int, default=4, help="images the teacher sees at a time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sides = sides_of(folder, options)
        measure(sides, rounds=options.rounds, steps=options.steps, batch=options.batch)
        losses = [[float(line) for line in (folder / f"{b}.losses").read_text().split()] for b in BACKENDS]
    steps = min(len(values) for values in losses)
    difference = max(abs(one - other) for one, other in zip(*losses, strict=False))
    eager, compiled = sides
    gain = compiled.median / eager.median
    Console(width=110).print(
        f"eager {eager.median:.2f} images per CPU second ({min(eager.rates):.2f} to {max(eager.rates):.2f}), compiled "
        f"{compiled.median:.2f} ({min(compiled.rates):.2f} to {max(compiled.rates):.2f}): {gain:.2f} times; the first "
        f"step took {eager.first_step_s:.0f} and {compiled.first_step_s:.0f} s; the first {steps} losses differ by "
        f"{difference:.1e} at most. "
        f"{options.size} px, batch {options.batch}, {options.precision}, {options.threads} thread(s), medians of "
        f"{options.rounds} interleaved rounds of {options.steps} steps."
    )
    first = {side.name: side.first_step_s for side in sides}
    rates = {side.name: side.rates for side in sides}
    write_figures({"gain": gain, "first_step_s": first, "losses": losses, "rates": rates}, options)


if __name__ == "__main__":
    main()
