"""The verb `distill cache`."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from distill.cache.compression import Compression
from distill.cache.folder import CacheManifest
from distill.cache.stored import check_complete
from distill.cache.units import UnitPlan, Verify, fault_of
from distill.cache_fill.engines import LocalEngine, Outcome, RayEngine, Work
from distill.cache_fill.filler import SPLITS, FillJob
from distill.errors import ConfigError, DataError

Engine = Literal["local", "ray"]
FREE_MARGIN_BYTES = 2**26
"""Room that is left for manifests and for what else writes to the disk."""
TOKENS_A_DIRECTION = 20
"""With fewer tokens a direction, principal directions are far from those of all tokens."""


@dataclass(frozen=True)
class Share:
    """Which part of the shards a process takes: every `world`-th from `rank` on."""

    rank: int
    world: int


def cache(
    recipe_file: Path,
    out: Path | None = None,
    compression: Compression = "none",
    dims: int = 256,
    views: int = 1,
    batch_size: int = 8,
    fit_images: int = 32,
    num_workers: int = 0,
    device: str = "auto",
    rank: int | None = None,
    world: int | None = None,
    engine: Engine = "local",
    num_actors: int | None = None,
    address: str | None = None,
    verify: Verify = "sha256",
    dry_run: bool = False,
    overrides: list[str] | None = None,
) -> None:
    """Store the teachers' last hidden states of a recipe's images; `model.teacher_states: OUT` then trains from them.

    Each shard has a unit of its own, which is there whole or not at all: the same command goes on where it was stopped.

    Args:
        recipe_file: the recipe; further `--config FILE` and flags such as `--data.train DIR` win over it.
        out: the folder to fill; it has to be named.
        compression: none keeps the teacher's dtype, bit for bit; fp16; int8 has a scale a token; pca keeps `dims`
            directions of largest variance, rotated to equal variances, as int8.
        dims: channels that pca keeps.
        views: of each training image, where data.augment changes images; epochs go through them in turn.
        batch_size: images a teacher sees at a time, unless the recipe sets model.teacher_micro_batch, or the folder was
            begun with another number. States are bit for bit those of training for an equal number only.
        fit_images: images on which the directions of pca are fitted; errors are measured on as many others.
        num_workers: processes that read and decode images; 0 does it in this one.
        device: where the teachers run; auto is a GPU if there is one.
        rank: this process takes the shards number rank, rank + world, ...; null takes RANK of torchrun's environment.
        world: processes over all machines; null takes WORLD_SIZE of torchrun's environment, or 1.
        engine: local fills in this process; ray in actors over a machine or cluster.
        num_actors: of Ray at a time; null means one a CPU or GPU.
        address: of a running Ray cluster; null starts one here unless RAY_ADDRESS names one.
        verify: how finished units are checked, by all their bytes or by size alone.
        dry_run: print what would be needed, and stop.
        overrides: gathered from the recipe's own flags.

    Raises:
        ConfigError: a flag cannot work, or the folder holds states of something else.
        DataError: a shard cannot be read, the disk has too little room, or the folder cannot be written.
        WeightsError: a teacher's weights are missing or damaged.
    """
    if out is None:
        raise ConfigError("--out is not given; name the folder to fill.")
    check_flags({"dims": dims, "views": views, "batch_size": batch_size, "fit_images": fit_images})
    share = find_share(rank, world, engine)
    threads = torch.get_num_threads() if engine == "ray" else 0
    place = find_device(device)
    job = FillJob(
        str(recipe_file.absolute()), tuple(overrides or ()), str(out.absolute()), compression, dims, views, batch_size,
        fit_images, num_workers, place, threads, verify,
    )  # fmt: skip
    console = Console(width=110)
    with console.status("reading recipe, shards and teachers"):
        runner = LocalEngine(job) if engine == "local" else RayEngine(job, num_actors, address)
        manifest = runner.manifest()
    filler = runner.filler
    units: dict[str, list[UnitPlan]] = {}
    for split in SPLITS:
        index = filler.index_of(split)
        units[split] = [] if index is None else filler.folder.units(manifest, split, index)
    print_manifest(manifest, units, console)
    check_room(filler.folder.path, units, console)
    if dry_run:
        return
    everything: Work = [(split, number) for split in SPLITS for number in range(len(units[split]))]
    outcomes = run(runner, everything[share.rank :: share.world], units, console)
    summarise(outcomes, units, share, out, console)


def check_flags(values: dict[str, int]) -> None:
    """Refuse numbers below 1.

    Raises:
        ConfigError: naming the flag.
    """
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"--{name} is {value}; it must be at least 1.")


def find_share(rank: int | None, world: int | None, engine: Engine) -> Share:
    """Return this process's part, by its flags or else by torchrun's environment.

    Raises:
        ConfigError: one flag was given without the other, they do not fit, or Ray shares out the shards itself.
    """
    if (rank is None) != (world is None):
        raise ConfigError("--rank and --world belong together; give both or none.")
    if rank is None or world is None:
        if engine == "ray":
            return Share(0, 1)
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    elif engine == "ray":
        raise ConfigError("--engine ray shares out the shards itself; leave --rank and --world away.")
    if not 0 <= rank < world:
        raise ConfigError(f"--rank is {rank} and --world {world}; ranks run from 0 to world - 1.")
    return Share(rank, world)


def find_device(device: str) -> str:
    """Return where the teachers run; on machines with several GPUs a process of torchrun takes its own."""
    if device != "auto":
        return device
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def print_manifest(manifest: CacheManifest, units: dict[str, list[UnitPlan]], console: Console) -> None:
    """Print bytes an image, the disk that is needed, and what the compression loses."""
    images = {split: sum(unit.rows for unit in of_split) for split, of_split in units.items()}
    total = sum(unit.num_bytes for of_split in units.values() for unit in of_split)
    per_image = manifest.layout.num_bytes
    console.print(
        f"{images['train']:,} training images x {manifest.views} view(s), {images['val']:,} validation images; "
        f"{per_image:,} bytes an image and view ({manifest.layout.compression}), {total:,} bytes in all."
    )
    table = Table("teacher", "layer", "cosine error, mean", "worst percentile", "centred, mean", "worst percentile")
    for entry in manifest.errors:
        names = ("mean", "worst_percentile", "centred_mean", "centred_worst_percentile")
        table.add_row(entry["teacher"], str(entry["layer"]), *(f"{entry[name]:.2e}" for name in names))
    console.print(table)
    few = [entry for entry in manifest.errors if entry["tokens"] < TOKENS_A_DIRECTION * manifest.dims]
    if manifest.layout.compression == "pca" and few:
        console.print(
            f"note: the basis of pca was fitted on about {few[0]['tokens']:,} tokens, which is few for {manifest.dims} "
            "directions; a larger --fit_images, in another folder, loses less."
        )


def check_room(folder: Path, units: dict[str, list[UnitPlan]], console: Console) -> None:
    """Refuse to begin what the disk has no room for, all ranks together.

    Raises:
        DataError: saying how much is needed and how much there is.
    """
    missing = [unit for of_split in units.values() for unit in of_split if fault_of(unit, "size") is not None]
    needed = sum(unit.num_bytes for unit in missing) + FREE_MARGIN_BYTES
    free = shutil.disk_usage(folder).free
    console.print(f"{len(missing):,} units to fill: {needed:,} bytes of {free:,} free.")
    if missing and free < needed:
        raise DataError(
            f"The cache in {folder} still needs {needed:,} bytes, and its disk has {free:,} bytes free. Choose another "
            "--out, a smaller --compression (int8, or pca with fewer --dims), fewer --views, or free the disk."
        )


def run(
    runner: LocalEngine | RayEngine, work: Work, units: dict[str, list[UnitPlan]], console: Console
) -> list[Outcome]:
    """Fill units, with a progress bar in images."""
    total = sum(units[split][number].rows * units[split][number].views for split, number in work)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    outcomes: list[Outcome] = []
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("views", total=total)
        for outcome in runner.fill(work, lambda count: progress.advance(bar, count)):
            outcomes.append(outcome)
            if outcome.reason and "damaged" in outcome.reason:
                name = units[outcome.split][outcome.number].path.name
                progress.console.print(f"made anew: {name} {outcome.reason}")
    return outcomes


def summarise(
    outcomes: list[Outcome], units: dict[str, list[UnitPlan]], share: Share, out: Path, console: Console
) -> None:
    """Print what was made, what was kept, and whether the cache is complete.

    Raises:
        DataError: one process filled everything, and a unit is missing all the same.
    """
    made = [outcome for outcome in outcomes if outcome.reason is not None]
    unusable = sum(outcome.unusable for outcome in outcomes)
    console.print(
        f"{len(made)} units made, {len(outcomes) - len(made)} kept after their check; "
        f"{sum(outcome.num_bytes for outcome in outcomes):,} bytes; {unusable} view(s) of images that do not decode."
    )
    everything = [unit for of_split in units.values() for unit in of_split]
    missing = sum(fault_of(unit, "size") is not None for unit in everything)
    if share.world == 1:
        check_complete(out, everything)
    if missing:
        console.print(f"{missing} of {len(everything)} units are still missing: other ranks have them to fill.")
    else:
        console.print(f"Complete. Train from it: distill fit --config RECIPE --model.teacher_states={out}")
