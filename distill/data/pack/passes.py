"""The three passes of a packing: list the source, decide where each image goes, write the shards that are missing."""

from __future__ import annotations

import json
import os
from typing import Any, cast

from rich.progress import Progress

from distill.data.pack.durable import durable_file
from distill.data.pack.engines import Workers
from distill.data.pack.listing import ROWS_PER_SCAN, Listing, first_difference, read_lines, write_listing
from distill.data.pack.plan import PackFolder, PackPlan, PlanWriter, write_plan
from distill.data.pack.rows import Source, json_line, read_row
from distill.data.pack.scan import ScanUnit, scan_rows
from distill.data.pack.shard_writer import ShardUnit, write_shard
from distill.errors import ConfigError, DataError


def list_source(folder: PackFolder, source: Source, plan: PackPlan | None) -> Listing:
    """List the source, and see that it is the one of the plan where there is one.

    Raises:
        ConfigError: the plan was made from another source; the message names the first difference.
        DataError: the source is empty or cannot be read.
    """
    if plan is None:
        listing = write_listing(source, folder.listing)
        if not listing.num_rows:
            raise DataError("The source holds no image; name the folder or list that does.")
        return listing
    again = folder.work / "listing-again.jsonl"
    try:
        listing = write_listing(source, again)
        if listing.fingerprint != plan.fingerprint:
            raise ConfigError(
                f"{folder.out} holds a packing of another source: {first_difference(folder.listing, again)} "
                f"({listing.num_rows:,} images, and there were {plan.counts.planned:,}). Nothing is overwritten; name "
                "another folder."
            )
    finally:
        again.unlink(missing_ok=True)
    return listing


def make_plan(
    folder: PackFolder, listing: Listing, root: str, request: dict[str, Any], workers: Workers, progress: Progress
) -> PackPlan:
    """Hash every image, decide where it goes, and write the plan.

    Raises:
        DataError: no image can be used, or the source cannot be read.
    """
    path = str(listing.path.resolve())
    units = [ScanUnit(root, path, offset, ROWS_PER_SCAN) for offset in listing.scan_offsets]
    task = progress.add_task("hashing images", total=listing.num_rows)
    writer = PlanWriter(folder, domain=request["domain"], images_per_shard=request["images_per_shard"])
    with writer:
        for unit, scanned in zip(units, workers.run(scan_rows, units), strict=True):
            offset = unit.offset
            for line, outcome in zip(read_lines(listing.path, offset, len(scanned)), scanned, strict=True):
                writer.add(read_row(line), offset, outcome)
                offset += len(line)
            progress.update(task, advance=len(scanned))
        plan = PackPlan(request, listing.fingerprint, writer.counts, writer.finish())
    if not plan.shards:
        raise DataError(
            f"None of the {plan.counts.planned:,} images can be used; {folder.quarantine} gives the reason for each."
        )
    write_plan(folder, plan)
    return plan


def write_shards(folder: PackFolder, plan: PackPlan, root: str, workers: Workers, progress: Progress) -> int:
    """Write the shards that are not complete, and return how many there were.

    Raises:
        DataError: an image changed since the plan was made, or a shard cannot be written.
    """
    complete = _read_manifest(folder)
    missing = [shard for shard in plan.shards if shard.name not in complete]
    samples, out = str(folder.samples.resolve()), str(folder.out.resolve())
    units = [ShardUnit(root, samples, out, shard.name, shard.offset, shard.count) for shard in missing]
    task = progress.add_task("writing images", total=plan.counts.packed)
    progress.update(task, advance=plan.counts.packed - sum(shard.count for shard in missing))
    with folder.manifest.open("ab") as manifest:
        for entry in workers.run(write_shard, units):
            complete[entry["name"]] = entry
            manifest.write(json_line(entry))
            manifest.flush()
            os.fsync(manifest.fileno())
            progress.update(task, advance=entry["samples"])
    # In the plan's order and without what a kill cut short: the same bytes however often the command was stopped.
    with durable_file(folder.manifest) as file:
        file.writelines(json_line(complete[shard.name]) for shard in plan.shards)
    return len(units)


def _read_manifest(folder: PackFolder) -> dict[str, dict[str, Any]]:
    """Return the shards that are complete: named in the manifest, and there at full size."""
    complete: dict[str, dict[str, Any]] = {}
    if not folder.manifest.exists():
        return complete
    for line in folder.manifest.read_bytes().splitlines():
        try:
            entry = cast("dict[str, Any]", json.loads(line))
            if (folder.out / entry["name"]).stat().st_size == entry["bytes"]:
                complete[entry["name"]] = entry
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            # The line was cut short, or the shard is gone: it is written again.
            continue
    return complete
