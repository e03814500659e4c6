"""Measure training from stored teacher states against training with the teacher, both sides in one run.

    python scripts/bench/cache.py                     # 448 px, float32, one thread: about five minutes
    python scripts/bench/cache.py --size 224 --rounds 7
    python scripts/bench/cache.py --compression int8

An InternViT of width 512 and 12 blocks teaches one of width 192 and 8 blocks, both with random weights, on generated
images. Side A is the task's step with its teacher, side B the same step from what `distill cache` has stored; reading,
decoding, forward, backward and optimiser count on both sides. Figures are images per CPU second (user and system),
medians over interleaved rounds. The limit is what torch's FLOP counter says: operations of a step of A over those of B.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from distill.cache.stored import open_states
from distill.cache_fill.verb import cache
from distill.data.fetch import PlannedDataset, collate
from distill.data.synthetic import synthesize
from distill.heap import keep_freed_memory
from distill.optim import build_optimizer, parameter_groups
from distill.planner.recipe import Recipe, read_recipe

GOAL = 0.85
IMAGES_PER_DOMAIN = 8


def recipe_of(folder: Path, size: int, batch: int) -> dict[str, Any]:
    """Return the pair's recipe."""
    config = {"embed_dim": 512, "depth": 12, "num_heads": 4, "mlp_dim": 2048, "img_size": size}
    flags = {"qkv_bias": False, "qk_norm": True, "norm_type": "rms_norm"}
    teacher = {"architecture": {"class_path": "teachers.internvit_config.InternViTConfig", "init_args": config | flags}}
    student = {"img_size": size, "patch_size": 14, "embed_dim": 192, "depth": 8, "num_heads": 3, "weights": "random"}
    return {
        "trainer": {"accelerator": "cpu", "default_root_dir": str(folder / "run")},
        "model": {
            "teachers": {
                "teacher": {
                    "class_path": "teachers.InternViT",
                    "init_args": teacher | {"weights": "random", "dtype": "float32"},
                }
            },
            "students": {"student": {"class_path": "students.InternViT", "init_args": student}},
            "alignments": [{"student": "student", "teacher": "teacher", "num_layers": 2}],
            "teacher_micro_batch": 1,
        },
        "data": {
            "train": str(folder / "train"),
            "img_size_px": size,
            "global_batch_size": batch,
            "augment": {"reencode": "none"},
        },
    }


def stepper(recipe: Recipe, dataset: Any, batch: int) -> Callable[[], int]:
    """Return a function that takes one step and returns its number of images."""
    task = recipe.task
    groups = parameter_groups(task.students, task.alignments, task.optimizer_config)
    optimizer = build_optimizer(groups, task.optimizer_config)
    place = 0

    def step() -> int:
        nonlocal place
        indices = list(range(place, place + batch))
        place = (place + batch) % (4 * IMAGES_PER_DOMAIN)
        bulk = getattr(dataset, "__getitems__", None)
        images = collate(bulk(indices) if bulk else [dataset[index] for index in indices])
        optimizer.zero_grad()
        task._step(images)["loss/total"].backward()
        optimizer.step()
        return batch

    return step


def rate(step: Callable[[], int], seconds: float) -> float:
    """Return images per CPU second over at least two steps and so many seconds."""
    began, images, steps = time.process_time(), 0, 0
    while steps < 2 or time.process_time() - began < seconds:
        images, steps = images + step(), steps + 1
    return images / (time.process_time() - began)


def flops(step: Callable[[], int]) -> float:
    """Return operations an image of one step."""
    with FlopCounterMode(display=False) as counter:
        images = step()
    return counter.get_total_flops() / images


def prepare(folder: Path, size: int, batch: int, compression: Any) -> dict[str, Callable[[], int]]:
    """Draw images, fill the cache, and return a step of each side."""
    synthesize(folder / "train", images_per_domain=IMAGES_PER_DOMAIN, img_size_px=size, num_workers=1)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_of(folder, size, batch)))
    cache(file, folder / "states", compression=compression, fit_images=4)
    online = read_recipe(file, [])
    online.data.setup("validate")
    online.task.configure_model()
    cached = copy.deepcopy(online)
    teachers = {name: online.task.teachers[name] for name in online.task.teachers.names()}
    layers = online.task.layers_of("teacher")
    stored = open_states(folder / "states", teachers, layers, online.data, checks_weights=True)
    cached.task.stored = stored
    views = (online.data.plan, size, online.data.augment)
    states = stored.training(*views, epoch_samples=4 * IMAGES_PER_DOMAIN, scaled_decoding=False)
    return {
        "with the teacher": stepper(online, PlannedDataset(*views), batch),
        "from stored states": stepper(cached, states, batch),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=448, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="least CPU seconds a round and side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compression", choices=("none", "fp16", "int8", "pca"), default="none")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    keep_freed_memory()  # as every verb does
    with tempfile.TemporaryDirectory() as name:
        sides = prepare(Path(name), arguments.size, arguments.batch, arguments.compression)
        work = {side: flops(step) for side, step in sides.items()}  # the first step warms up, too
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(arguments.rounds):
            for side, step in sides.items():
                rates[side].append(rate(step, arguments.seconds))
    online, cached = (statistics.median(values) for values in rates.values())
    limit = work["with the teacher"] / work["from stored states"]
    share = cached / online / limit
    table = Table("side", "GFLOP an image", "images per CPU second, median", "least and most")
    for side, values in rates.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        table.add_row(side, f"{work[side] / 1e9:.2f}", f"{statistics.median(values):.2f}", spread)
    console = Console(width=110)
    console.print(table)
    console.print(
        f"speed-up {cached / online:.2f}; the FLOPs allow {limit:.2f}; share {share:.3f} (goal {GOAL}). "
        f"{arguments.size} px, batch {arguments.batch}, float32, {arguments.threads} thread(s), "
        f"{arguments.compression}, {arguments.rounds} rounds."
    )
    if arguments.json is not None:
        figures = {"flops_per_image": work, "rates": rates, "speed_up": cached / online, "limit": limit, "share": share}
        arguments.json.write_text(json.dumps({**figures, **vars(arguments)}, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
