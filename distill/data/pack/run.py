"""`distill pack`: write a source's images as shards, so that it can be killed at any instant and run again."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distill.data.pack.durable import sweep_parts
from distill.data.pack.engines import Engine, Workers
from distill.data.pack.folder import ImageFolder
from distill.data.pack.passes import list_source, make_plan, write_shards
from distill.data.pack.plan import DOMAIN_NAME, PackFolder, read_plan
from distill.data.pack.sources import OpenedSource, open_source, tell_kind
from distill.errors import ConfigError, DataError


def pack(
    source: str,
    out: Path,
    domain: str | None = None,
    root: Path | None = None,
    columns: dict[str, str] | None = None,
    folder_labels: bool = True,
    images_per_shard: int = 1000,
    num_workers: int | None = None,
    engine: Engine = "local",
) -> None:
    """Write images as WebDataset shards, without copies of one image, and list whatever could not be used.

    The files are copied byte for byte, never encoded anew. Run again after whatever stopped it, the command goes on
    where it was, and the result is the same, byte for byte, for any number of workers and either engine.

    Args:
        source: a folder of images (sub-folders are classes), a .csv or .parquet list with the column path or bytes
            (and key, label, group, domain), a Hugging Face image dataset on disk (`save_to_disk`, or Parquet), or
            img2dataset's output.
        out: folder for `<domain>-<number>.tar`, `pack.json`, `quarantine.jsonl` and `duplicates.jsonl`; new, empty, or
            holding this very packing.
        domain: name of the images' domain; not needed where the source names one for each image.
        root: folder that the paths in a list start from, and do not lead out of; the list's own when left out.
        columns: what the source calls path, bytes, image, key, label, group or domain, for example
            `--columns.label=class`.
        folder_labels: false leaves out the labels that sub-folders give.
        images_per_shard: most images of one shard.
        num_workers: worker processes, which change no byte; 1 works in this process; all usable processor cores when
            left out.
        engine: local, or ray for Ray Data: on this machine, or on the cluster that RAY_ADDRESS names, where source and
            out lie on storage that all nodes share.

    Raises:
        ConfigError: an option is out of range, a package is missing, or `out` holds something else.
        DataError: the source cannot be read or changed meanwhile, or a shard cannot be written.

    Example:
        >>> pack("photos", Path("shards"), domain="natural")  # doctest: +SKIP
    """
    num_processes = _usable_cores() if num_workers is None else num_workers
    _check(source, domain, images_per_shard, num_processes)
    path, out, console = Path(source), Path(out), Console()
    kind = tell_kind(path)
    opened = open_source(path, kind, root=root, columns=columns, folder_labels=folder_labels)
    if domain is None and not opened.may_name_domains:
        raise ConfigError(f"{path} does not say its images' domain; name it, for example --domain natural.")
    if path.is_dir() and out.resolve().is_relative_to(opened.root):
        raise ConfigError(f"{out} lies in the source {path}, and would be packed too; name a folder elsewhere.")
    request: dict[str, Any] = {
        "kind": kind,
        "domain": domain,
        "columns": columns,
        "folder_labels": folder_labels,
        "images_per_shard": images_per_shard,
    }
    folder = PackFolder(out)
    try:
        _prepare(folder)
        with _locked(folder), Workers(engine, num_processes) as workers:
            _pack_into(folder, opened, request, workers, console)
    except OSError as error:
        raise DataError(
            f"{source} cannot be packed into {out}: {error}. Nothing half written is left under a final "
            "name; make room, or mend the folder, and repeat the command."
        ) from error


def _pack_into(
    folder: PackFolder,
    source: OpenedSource,
    request: dict[str, Any],
    workers: Workers,
    console: Console,
) -> None:
    plan = read_plan(folder)
    if plan is not None:
        _check_request(folder, plan.request, request)
    with console.status(f"listing {source.root}"):
        listing = list_source(folder, source, plan)
    root = str(source.root)
    with _progress(console) as progress:
        if plan is None:
            plan = make_plan(folder, listing, root, request, workers, progress)
        num_new = write_shards(folder, plan, root, workers, progress)
    counts = plan.counts
    console.print(
        f"planned {counts.planned:,} = packed {counts.packed:,} + duplicates {counts.duplicates:,} + quarantined "
        f"{counts.quarantined:,}",
        highlight=False,
    )
    if isinstance(source, ImageFolder) and source.passed_over:
        console.print(f"{source.passed_over:,} files that are no images were passed over", highlight=False)
    console.print(
        f"{folder.out}: {len(plan.shards):,} shards, {num_new:,} of them new; next: distill index {folder.out}",
        highlight=False,
        soft_wrap=True,
    )


def _check(source: str, domain: str | None, images_per_shard: int, num_workers: int) -> None:
    if "://" in source or source.startswith("pipe:"):
        raise ConfigError(f"source is {source!r}; it must be a local or mounted path. Nothing is fetched here.")
    if domain is not None and DOMAIN_NAME.fullmatch(domain) is None:
        raise ConfigError(f"--domain is {domain!r}; use letters, digits, '_', '.' and '-', such as natural.")
    if images_per_shard < 1:
        raise ConfigError(f"--images_per_shard is {images_per_shard}; it must be at least 1.")
    if num_workers < 1:
        raise ConfigError(f"--num_workers is {num_workers}; it must be at least 1, or left out for one per core.")


def _prepare(folder: PackFolder) -> None:
    """Make the folder, or see that it is ours."""
    if folder.out.exists() and not folder.out.is_dir():
        raise ConfigError(f"{folder.out} is a file; name a folder.")
    if folder.out.is_dir() and not folder.work.is_dir() and any(folder.out.iterdir()):
        raise ConfigError(
            f"{folder.out} is not empty and holds nothing of distill pack. Nothing is overwritten; name a new or empty "
            "folder."
        )
    folder.work.mkdir(parents=True, exist_ok=True)


@contextmanager
def _locked(folder: PackFolder) -> Generator[None]:
    """Refuse a second process on the same folder, and sweep what a killed one left."""
    with (folder.work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"Another distill pack is at work on {folder.out}; wait for it, or name another folder."
            ) from None
        sweep_parts(folder.out)
        sweep_parts(folder.work)
        yield


def _check_request(folder: PackFolder, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    different = [
        f"{name} is {now[name]!r}, and was {before.get(name)!r}" for name in now if now[name] != before.get(name)
    ]
    if different:
        raise ConfigError(
            f"{folder.out} holds a packing with other options: {'; '.join(different)}. Nothing is overwritten; repeat "
            "its options, or name another folder."
        )


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
