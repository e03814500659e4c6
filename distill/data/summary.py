"""`distill index`: check shards, and say what is in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from distill.data.index import DatasetIndex, faults_error, find_shards, join_usable
from distill.data.index_file import IndexFiles
from distill.data.indexing import read_indexes
from distill.data.shard_cache_config import ShardCacheConfig
from distill.data.shard_index import ShardIndex
from distill.data.stores import shown
from distill.errors import ConfigError, DataError

COLUMNS = ("domain", "shards", "samples", "bad", "MB", "median px", "labels", "classes")
SIZE_COLUMNS = ("domain", "width px", "height px", "aspect ratio 5 %", "50 %", "95 %")
QUANTILES = (0.05, 0.5, 0.95)


def index(
    shards: dict[str, str | list[str]] | str,
    index_dir: Path | None = None,
    verify: bool = False,
    num_workers: int | None = None,
    json: Path | None = None,
    shard_cache: ShardCacheConfig | None = None,
) -> None:
    """Check every shard, write its index, and print each domain's samples and the dataset's fingerprint.

    A shard that cannot be used does not stop the others from being indexed; all of them are named at the end. When it
    is run again, for instance after it was killed, what is indexed already is not read again.

    Args:
        shards: a directory of <domain>-<number>.tar files, a glob, or a brace pattern; local, or at s3:// or gs://, or
            at http(s):// (exact names and brace patterns only). Or a mapping from domain to one or several of these,
            for shards whose names do not tell a domain: '{web: "part/*.tar"}'.
        index_dir: folder for index files; .distill-index beside local shards, and ~/.cache/encoder-distill/index for
            those behind URLs, when left out.
        verify: read every shard again, even when its index file seems to fit (same size and modification time or ETag).
        num_workers: processes that read shards; as many as there are cores when left out.
        json: file for the same figures in JSON, with the shards that cannot be used.
        shard_cache: where shards behind URLs are kept, up to which size, and how they are fetched.

    Raises:
        ConfigError: the shards are not named rightly, or the index cannot be written.
        DataError: shards are missing, empty, damaged, or hold something that is not allowed.
    """
    cache = shard_cache or ShardCacheConfig()
    found = find_shards(shards, stores=cache.stores)
    pairs = [(domain, location) for domain, of_domain in found.items() for location in of_domain]
    results = _read(pairs, IndexFiles(index_dir, not verify, cache), num_workers)
    faults = {
        location: result for (_, location), result in zip(pairs, results, strict=True) if isinstance(result, DataError)
    }
    dataset = join_usable(pairs, results, cache) if len(faults) < len(pairs) else None
    if dataset is not None:
        print_summary(dataset, is_whole=not faults)
    if json is not None:
        _write_json(json, dataset, faults)
    if faults:
        raise faults_error(list(faults.values()), len(pairs))


def _read(pairs: Sequence[tuple[str, str]], files: IndexFiles, num_workers: int | None) -> list[ShardIndex | DataError]:
    console = Console(stderr=True)
    columns = (TextColumn("indexing"), BarColumn(), MofNCompleteColumn(), TextColumn("shards"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(pairs))
        locations = [location for _, location in pairs]
        return read_indexes(locations, files, num_workers=num_workers, on_shard=lambda: progress.advance(task))


def print_summary(dataset: DatasetIndex, *, is_whole: bool = True) -> None:
    """Print two tables, and the fingerprint if the dataset is whole: that of a part would be of no use."""
    console = Console()
    console.print(summary_table(dataset))
    console.print(size_table(dataset))
    if is_whole:
        console.print(f"fingerprint {dataset.fingerprint}", highlight=False, soft_wrap=True)


def summary_table(dataset: DatasetIndex) -> Table:
    """Return a table with one line a domain, and one for all; bad are images without a usable header."""
    table = _table(COLUMNS, dataset)
    for name, figures in _by_domain(dataset).items():
        if name == "all":
            table.add_section()
        median = figures["median_px"]
        table.add_row(
            name,
            f"{figures['shards']:,}",
            f"{figures['samples']:,}",
            f"{figures['bad_headers']:,}",
            f"{figures['image_bytes'] / 1e6:,.1f}",
            f"{median[0]:.0f} x {median[1]:.0f}" if median else "-",
            f"{figures['labelled']:,}",
            f"{figures['classes']:,}",
        )
    return table


def size_table(dataset: DatasetIndex) -> Table:
    """Return a table of the images' sizes (smallest to largest) and aspect ratios (width / height)."""
    table = _table(SIZE_COLUMNS, dataset)
    for name, figures in _by_domain(dataset).items():
        if name == "all":
            table.add_section()
        ranges = [f"{low:,} to {high:,}" for low, high in (figures["width_px"], figures["height_px"]) if high]
        ratios = [f"{ratio:.2f}" for ratio in figures["aspect_ratio"].values()]
        table.add_row(name, *(ranges or ["-", "-"]), *(ratios or ["-", "-", "-"]))
    return table


def _table(columns: Sequence[str], dataset: DatasetIndex) -> Table:
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    table.columns[0].min_width = max(len(domain) for domain in dataset.domains)
    return table


def _by_domain(dataset: DatasetIndex) -> dict[str, dict[str, Any]]:
    """Return the figures of each domain and, where there are several, of all under the name "all"."""
    figures: dict[str, dict[str, Any]] = {}
    for domain in dataset.domains:
        shards = sum(shard.domain == domain for shard in dataset.shards)
        figures[domain] = _figures(dataset, np.asarray(dataset.rows_of(domain)), shards)
    if len(dataset.domains) > 1:
        figures["all"] = _figures(dataset, np.arange(len(dataset)), len(dataset.shards))
    return figures


def _figures(dataset: DatasetIndex, rows: NDArray[np.int64], shards: int) -> dict[str, Any]:
    widths, heights, labels = dataset.widths[rows], dataset.heights[rows], dataset.labels[rows]
    readable = widths > 0
    bad = int((~readable).sum())
    widths, heights = widths[readable], heights[readable]
    has_any = len(widths) > 0
    ratios = np.quantile(widths / heights, QUANTILES).tolist() if has_any else []
    return {
        "shards": shards,
        "samples": len(rows),
        "bad_headers": bad,
        "image_bytes": int(dataset.sizes[rows].sum()),
        "median_px": [float(np.median(widths)), float(np.median(heights))] if has_any else None,
        "width_px": [int(widths.min()), int(widths.max())] if has_any else [0, 0],
        "height_px": [int(heights.min()), int(heights.max())] if has_any else [0, 0],
        "aspect_ratio": {f"q{round(100 * q):02d}": ratio for q, ratio in zip(QUANTILES, ratios, strict=False)},
        "labelled": int((labels >= 0).sum()),
        "classes": len(np.unique(labels[labels >= 0])),
    }


def _write_json(target: Path, dataset: DatasetIndex | None, faults: dict[str, DataError]) -> None:
    figures = {} if dataset is None else _by_domain(dataset)
    content = {
        "fingerprint": dataset.fingerprint if dataset is not None and not faults else None,
        "all": figures.pop("all", next(iter(figures.values()), None)),
        "domains": figures,
        "bad_shards": [{"shard": shown(location), "reason": str(error)} for location, error in faults.items()],
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--json {target} cannot be written ({error.strerror or error}); name another file."
        ) from error
