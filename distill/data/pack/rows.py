"""One row of a source: where an image's bytes lie, and what is known of it before they are read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True, slots=True)
class WholeFile:
    """An image file, relative to the source's root."""

    kind: ClassVar[str] = "file"
    file: str


@dataclass(frozen=True, slots=True)
class FileRange:
    """`size` bytes at `offset` of a file: a member of a plain tar."""

    kind: ClassVar[str] = "range"
    file: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class TableCell:
    """A cell of a Parquet or Arrow file; `row` counts from 0 over the whole file."""

    kind: ClassVar[str] = "cell"
    file: str
    row: int
    column: str


Place = WholeFile | FileRange | TableCell


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One image that a source promises.

    Attributes:
        source: where it comes from, relative to the source's root; for people, and kept in the shard's JSON.
        key: the source's own name for it; any text.
        place: where its bytes are; None when `problem` says why there are none.
        label: class name, None for none.
        group: name of what must stay on one side of a split (a document, a video), None for none.
        domain: None for the one given on the command line.
        size: bytes of the file it lies in, 0 where there is none.
        mtime_ns: modification time of that file.
        problem: why it cannot be packed, where that is known already.
    """

    source: str
    key: str
    place: Place | None
    label: str | None = None
    group: str | None = None
    domain: str | None = None
    size: int = 0
    mtime_ns: int = 0
    problem: str | None = None


class Source(Protocol):
    """Something that holds images.

    Attributes:
        root: folder, resolved, that all places lie in.
        may_name_domains: rows may say their domain themselves.
    """

    root: Path
    may_name_domains: bool

    def rows(self) -> Iterator[SourceRow]:
        """Yield every image's row, in an order that depends on the source alone, without reading images."""
        ...


def place_fields(place: Place | None) -> list[str | int] | None:
    """Return a place as JSON keeps it."""
    if place is None:
        return None
    if isinstance(place, WholeFile):
        return [place.kind, place.file]
    if isinstance(place, FileRange):
        return [place.kind, place.file, place.offset, place.size]
    return [place.kind, place.file, place.row, place.column]


def read_place(fields: list[Any] | None) -> Place | None:
    """Return the place that `place_fields` wrote."""
    if fields is None:
        return None
    kinds: dict[str, type[Place]] = {known.kind: known for known in (WholeFile, FileRange, TableCell)}
    return kinds[fields[0]](*fields[1:])


def row_line(row: SourceRow) -> bytes:
    """Return a row as one line of JSON."""
    values = [row.source, row.key, place_fields(row.place), row.label, row.group, row.domain]
    return json_line([*values, row.size, row.mtime_ns, row.problem])


def read_row(line: bytes) -> SourceRow:
    """Return the row that `row_line` wrote."""
    source, key, place, *others = json.loads(line)
    return SourceRow(source, key, read_place(place), *others)


def json_line(value: object) -> bytes:
    """Return compact JSON in ASCII, so that equal values have equal bytes everywhere, with a line feed."""
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def as_text(value: object) -> str | None:
    """Return a label, group or domain as text: None and empty text are none, numbers are written out."""
    if value is None or value == "":
        return None
    if isinstance(value, float) and value.is_integer():
        # pandas turns a column of whole numbers with gaps into floats; "3.0" is class 3.
        return str(int(value))
    return str(value)
