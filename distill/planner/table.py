"""A plan as a person reads it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

_TERA = 1e12
_GIB = 2**30


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Print a plan's tables.

    Args:
        plan: as `distill plan --json` writes it.
        console: where to.
    """
    console.print(_work(plan))
    console.print(_memory(plan["memory"]))
    console.print(_time(plan))
    console.print(_disk(plan["disk"]))


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", min_width=80)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _work(plan: dict[str, Any]) -> Table:
    table = _table("Work", "part", "parameters", "forward", "backward", "done twice", "TFLOP an image")
    counts, flops = plan["parameters"], plan["flops_per_image"]
    names = {"heads and loss": "heads"}
    for part in [*(name for name in counts if name != "heads"), "heads and loss"]:
        directions = flops.get(part, {})
        cells = [_tera(directions.get(name, 0.0)) for name in ("forward", "backward", "recompute")]
        table.add_row(part, f"{counts[names.get(part, part)]:,}", *cells, _tera(sum(directions.values())))
    total = sum(value for directions in flops.values() for value in directions.values())
    table.add_section()
    table.add_row("all", f"{sum(counts.values()):,}", "", "", "", _tera(total))
    return table


def _memory(memory: dict[str, Any]) -> Table:
    title = f"Memory of one device, batch {memory['batch_size']}, at its highest ({memory['phase']})"
    table = _table(title, "what", "GiB")
    for purpose, size in memory["parts"].items():
        if size >= 0.0005 * _GIB:
            table.add_row(purpose, _gib(size, 3))
    table.add_section()
    table.add_row("all", _gib(memory["peak_bytes"], 3))
    if memory["available_bytes"] is None:
        table.add_row("largest batch", "name --accelerator or --memory_gib")
    else:
        table.add_row("to be had, less a reserve", _gib(memory["available_bytes"], 3))
        table.add_row("largest batch that fits", f"{memory['largest_batch']:,}")
    return table


def _time(plan: dict[str, Any]) -> Table:
    count = plan["device"]["count"]
    table = _table(f"Time, {count} device{'s' if count > 1 else ''}, {plan['precision']}", "what", "")
    speed = plan["speed"]
    if speed is None:
        table.add_row("images a second", "unknown: name --accelerator, or --measure true")
        return table
    table.add_row("images a second, one device", f"{speed['images_per_s']:.3g}")
    if count > 1:
        table.add_row("images a second, all, if they scale evenly", f"{speed['total_images_per_s']:.4g}")
    table.add_row("that figure is", speed["source"])
    if plan["images"] is None:
        table.add_row("images in all", "unknown: name --samples")
        return table
    table.add_row("images in all", f"{plan['images']:,}")
    table.add_row("hours of training, without validation", f"{plan['hours']:,.3g}")
    table.add_row("device-hours", f"{plan['device_hours']:,.3g}")
    table.add_row("cost", "name --price_per_hour" if plan["cost"] is None else f"{plan['cost']:,.2f}")
    return table


def _disk(disk: dict[str, Any]) -> Table:
    table = _table("Disk", "what", "GiB")
    shards = disk["shards"]
    held = shards["note"] if shards["num_bytes"] is None else _gib(shards["num_bytes"])
    table.add_row("shards", held)
    table.add_row("one checkpoint", _gib(disk["checkpoint_bytes"]))
    kept = disk["checkpoints_kept"]
    table.add_row(
        "checkpoints kept" if kept is None else f"checkpoints, {kept} at most",
        "as many as are written: a callback keeps all" if kept is None else _gib(disk["checkpoints_bytes"]),
    )
    known = disk["cache_bytes"]
    count = shards["images"] if known is not None else 1_000_000
    for name, size in disk["cache_bytes_per_image"].items():
        table.add_row(
            f"teacher cache, {name}, {count:,} images", f"{_gib(size * count)}  ({size / 1e6:.3g} MB an image)"
        )
    return table


def _tera(flops: float) -> str:
    return f"{flops / _TERA:.4g}" if flops else ""


def _gib(size: int, digits: int = 2) -> str:
    return f"{size / _GIB:,.{digits}f}"
