"""`distill index`: check shards, and print what is in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from distill.data.index import DatasetIndex, build_index

COLUMNS = ("domain", "shards", "samples", "bad", "MB", "median px", "labels", "classes")


def index(shards: str, index_dir: Path | None = None, verify: bool = False) -> None:
    """Check every shard, write its index, and print each domain's samples and the dataset's fingerprint.

    Args:
        shards: a directory of <domain>-<number>.tar files, a glob, or a brace pattern.
        index_dir: folder for index files; .distill-index beside the shards when left out.
        verify: read every shard again, even when its index file seems to fit (same size and modification time).

    Raises:
        ConfigError: the shards are not named rightly, or the index cannot be written.
        DataError: a shard is missing, empty, damaged, or holds something that is not allowed.
    """
    dataset = build_index(shards, index_dir=index_dir, reuse=not verify)
    console = Console()
    console.print(summary_table(dataset))
    console.print(f"fingerprint {dataset.fingerprint}", highlight=False, soft_wrap=True)


def summary_table(dataset: DatasetIndex) -> Table:
    """Return a table with one line a domain, and one for all; bad are images without a usable header."""
    table = Table(*COLUMNS, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    table.columns[0].min_width = max(len(domain) for domain in dataset.domains)
    for domain in dataset.domains:
        shards = sum(shard.domain == domain for shard in dataset.shards)
        table.add_row(domain, *_cells(dataset, np.asarray(dataset.rows_of(domain)), shards))
    if len(dataset.domains) > 1:
        table.add_section()
        table.add_row("all", *_cells(dataset, np.arange(len(dataset)), len(dataset.shards)))
    return table


def _cells(dataset: DatasetIndex, rows: np.ndarray, shards: int) -> list[str]:
    widths, heights, labels = dataset.widths[rows], dataset.heights[rows], dataset.labels[rows]
    readable = widths > 0
    median = f"{np.median(widths[readable]):.0f} x {np.median(heights[readable]):.0f}" if readable.any() else "-"
    return [
        f"{shards:,}",
        f"{len(rows):,}",
        f"{int((~readable).sum()):,}",
        f"{int(dataset.sizes[rows].sum()) / 1e6:,.1f}",
        median,
        f"{int((labels >= 0).sum()):,}",
        f"{len(np.unique(labels[labels >= 0])):,}",
    ]
