"""Measure what `model.engine.compile: inductor` gains and costs: the same run with it and without, in turns.

    python scripts/bench/compile.py                     # the pair of step.py at 224 px, float32: several minutes
    python scripts/bench/compile.py --size 112 --rounds 3

Both sides are `distill fit`. The first step of the compiled one generates and builds kernels, into an empty cache, and
is told in wall seconds; the others are images per CPU second (user and system), medians over the rounds. The losses of
all steps are compared: kernels round differently, and the difference grows over steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import yaml
from rich.console import Console
from sides import Side
from step import HERE, draw_images, recipe_of

BACKENDS = ("off", "inductor")


def sides_of(folder: Path, options: argparse.Namespace) -> list[Side]:
    """Return a run without and a run with compiled blocks; each writes its losses to `BACKEND.losses`."""
    draw_images(folder, options.images, options.size)
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "kernels")
    sides: list[Side] = []
    for backend in BACKENDS:
        recipe = copy.deepcopy(recipe_of(folder, options))
        recipe["model"]["engine"] = {"compile": backend}
        recipe["model"]["teacher_micro_batch"] = options.micro_batch  # measured, it could differ between the sides
        recipe["trainer"]["default_root_dir"] = str(folder / backend)
        file = folder / f"{backend}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        command = [sys.executable, str(HERE / "step_ours.py"), "fit", "--recipe", str(file)]
        command += ["--threads", str(options.threads), "--losses", str(folder / f"{backend}.losses")]
        sides.append(Side(backend, command, environment, folder / f"{backend}.log"))
    return sides


def measure(sides: list[Side], options: argparse.Namespace) -> list[float]:
    """Fill every side's rates, in turns; return the wall seconds of each side's first step."""
    first: list[float] = []
    try:
        for side in sides:
            side.start()
            began = time.perf_counter()
            side.run(1)
            first.append(time.perf_counter() - began)
            side.run(1)
        for number in range(options.rounds):
            for side in sides if number % 2 == 0 else sides[::-1]:
                side.rates.append(options.steps * options.batch / side.run(options.steps))
    finally:
        for side in sides:
            side.stop()
    return first


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=4, help="images the teacher sees at a time")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps a round and side")
    parser.add_argument("--images", type=int, default=64, help="drawn images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sides = sides_of(folder, options)
        first = measure(sides, options)
        losses = [[float(line) for line in (folder / f"{b}.losses").read_text().split()] for b in BACKENDS]
    steps = min(len(values) for values in losses)
    difference = max(abs(one - other) for one, other in zip(*losses, strict=False))
    eager, compiled = sides
    gain = compiled.median / eager.median
    Console(width=110).print(
        f"eager {eager.median:.2f} images per CPU second ({min(eager.rates):.2f} to {max(eager.rates):.2f}), compiled "
        f"{compiled.median:.2f} ({min(compiled.rates):.2f} to {max(compiled.rates):.2f}): {gain:.2f} times; the first "
        f"step took {first[0]:.0f} and {first[1]:.0f} s; the first {steps} losses differ by {difference:.1e} at most. "
        f"{options.size} px, batch {options.batch}, {options.precision}, {options.threads} thread(s), medians of "
        f"{options.rounds} interleaved rounds of {options.steps} steps."
    )
    if options.json is not None:
        figures = {"gain": gain, "first_step_s": first, "losses": losses, "rates": {s.name: s.rates for s in sides}}
        options.json.write_text(json.dumps({**figures, **vars(options)}, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
