"""The listing: a file with one line for each row of the source, so that no process holds them all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path

from distill.data.pack.durable import durable_file
from distill.data.pack.rows import Source, SourceRow, read_row, row_line

ROWS_PER_SCAN = 512
"""Rows a worker hashes at a time: some seconds of work, and few enough that a short source keeps all workers busy."""


@dataclass(frozen=True)
class Listing:
    """A listing on disk.

    Attributes:
        path: the file.
        num_rows: number of lines.
        fingerprint: sha256 of the file, hex: equal names, labels, sizes and times give equal fingerprints.
        scan_offsets: where every `ROWS_PER_SCAN`-th line begins.
    """

    path: Path
    num_rows: int
    fingerprint: str
    scan_offsets: Sequence[int]


def write_listing(source: Source, path: Path) -> Listing:
    """Write a source's rows to a file, whole or not at all.

    Raises:
        OSError: the file cannot be written.
        DataError: the source cannot be read.
    """
    digest, offsets, offset, num_rows = hashlib.sha256(), list[int](), 0, 0
    with durable_file(path) as file:
        for num_rows, row in enumerate(source.rows(), start=1):
            if (num_rows - 1) % ROWS_PER_SCAN == 0:
                offsets.append(offset)
            line = row_line(row)
            digest.update(line)
            offset += file.write(line)
    return Listing(path, num_rows, digest.hexdigest(), offsets)


def read_lines(path: Path, offset: int, count: int) -> Iterator[bytes]:
    """Yield so many lines of a file from an offset on."""
    with path.open("rb") as file:
        file.seek(offset)
        yield from islice(file, count)


def read_rows(path: Path, offset: int, count: int) -> list[SourceRow]:
    """Return so many rows of a listing from an offset on."""
    return [read_row(line) for line in read_lines(path, offset, count)]


def first_difference(before: Path, after: Path) -> str:
    """Return in words where two listings begin to differ."""
    with before.open("rb") as old, after.open("rb") as new:
        for left, right in zip_longest(old, new):
            if left == right:
                continue
            if right is None:
                return f"{read_row(left).source} is no longer there"
            if left is None:
                return f"{read_row(right).source} is new"
            return _row_difference(read_row(left), read_row(right))
    return "nothing"


def _row_difference(old: SourceRow, new: SourceRow) -> str:
    if old.source != new.source:
        return f"{new.source} stands where {old.source} stood"
    for field in SourceRow.__dataclass_fields__:
        if getattr(old, field) != getattr(new, field):
            return f"{new.source} has {field} {getattr(new, field)!r}, and had {getattr(old, field)!r}"
    return "nothing"
