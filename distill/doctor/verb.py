"""The verb `distill doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distill.doctor.machine import check_device, check_disk, check_precision, check_shared_memory, check_versions
from distill.doctor.recipe_checks import check_shards, check_weights
from distill.doctor.training import check_training
from distill.doctor.verdict import Verdict, run_check
from distill.planner.disk import run_bytes
from distill.planner.recipe import Recipe, read_recipe
from distill.planner.verb import write_json

_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}
_PREFETCHED_BATCHES = 3


def doctor(
    recipe_file: Path | None = None,
    run_dir: Path = Path(),
    hash_weights: bool = False,
    train: bool = True,
    json: Path | None = None,
    overrides: list[str] | None = None,
) -> None:
    """Check this machine, and with a recipe its data, weights and run folder; exit with status 1 if a check failed.

    Args:
        recipe_file: a recipe; flags such as `--data.num_workers 2` win over it, as in `distill fit`.
        run_dir: where runs will be written, if no recipe says so.
        hash_weights: take the checksum of weight files above 4 GiB too.
        train: train a few steps in a temporary folder, and resume.
        json: file for the verdicts as JSON.
        overrides: gathered from the recipe's own flags.

    Raises:
        ConfigError: the recipe does not exist or cannot be built.
        SystemExit: with status 1, if a check failed.
    """
    recipe = None if recipe_file is None else read_recipe(recipe_file, overrides or [])
    console = Console(width=110)
    verdicts: list[Verdict] = []
    with console.status("checking"):
        for verdict in examine(recipe, run_dir, hash_all=hash_weights, should_train=train):
            verdicts.append(verdict)
    print_verdicts(verdicts, console)
    if json is not None:
        write_json(json, {"checks": [asdict(verdict) for verdict in verdicts]})
    if any(verdict.status == "failed" for verdict in verdicts):
        raise SystemExit(1)


def examine(recipe: Recipe | None, run_dir: Path, *, hash_all: bool, should_train: bool) -> Iterator[Verdict]:
    """Yield the verdict of every check, one after the other.

    Args:
        recipe: what is to be trained, if anything.
        run_dir: where, if no recipe says so.
        hash_all: take the checksum of very large weight files too.
        should_train: train a few steps.
    """
    precision = None if recipe is None else recipe.trainer.get("precision")
    needed = 0 if recipe is None else run_bytes(recipe)
    folder = run_dir if recipe is None else Path(recipe.trainer.get("default_root_dir") or ".")
    yield run_check("versions", check_versions)
    yield run_check("device", check_device)
    yield run_check("precision", partial(check_precision, precision))
    yield run_check("disk of the run folder", partial(check_disk, folder, needed))
    yield run_check("shared memory", partial(check_shared_memory, 0 if recipe is None else loader_bytes(recipe)))
    if recipe is not None:
        yield run_check("shards", partial(check_shards, recipe))
        for role, arguments in recipe.encoder_arguments.items():
            yield run_check(f"weights of {role}", partial(check_weights, role, arguments, hash_all=hash_all))
    if should_train:
        yield from check_training()


def loader_bytes(recipe: Recipe) -> int:
    """Return the bytes of images that loader processes hold in shared memory at a time."""
    images = recipe.batch_size_per_device * recipe.data.num_workers * _PREFETCHED_BATCHES
    return images * 3 * recipe.data.img_size_px**2


def print_verdicts(verdicts: list[Verdict], console: Console) -> None:
    """Print the verdicts as a table, and how many of each there are."""
    table = Table("check", "verdict", "found, and the way out")
    for verdict in verdicts:
        text = escape(verdict.found)
        if verdict.way_out:
            text += f"\n[bold]{escape(verdict.way_out)}[/bold]"
        table.add_row(verdict.check, f"[{_COLOURS[verdict.status]}]{verdict.status}[/]", text)
    console.print(table)
    counts = {status: sum(verdict.status == status for verdict in verdicts) for status in _COLOURS}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()))
