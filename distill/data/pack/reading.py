"""The bytes of images, from files, from members of tars and from cells of tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from distill.data.pack.roots import REFUSED, UnusableError, check_file, resolve_inside
from distill.data.pack.rows import FileRange, Place, TableCell, WholeFile
from distill.data.pack.tables import read_cells
from distill.data.tar_members import MAX_MEMBER_BYTES
from distill.errors import DataError


def read_places(root: Path, places: Sequence[Place]) -> Iterator[bytes | UnusableError]:
    """Yield the bytes at each place, or why there are none; one image is in memory at a time.

    Args:
        root: the source's root, resolved.
        places: in the order of the listing: rows of a table must rise.

    Raises:
        DataError: a tar or a table is damaged, or the storage fails.
    """
    for (kind, file), group in groupby(places, key=lambda place: (place.kind, place.file)):
        of_file = list(group)
        if kind == WholeFile.kind:
            yield from (_read_file(root, file) for _ in of_file)
        elif kind == FileRange.kind:
            yield from _read_ranges(root, file, [place for place in of_file if isinstance(place, FileRange)])
        else:
            yield from _read_table(root, file, [place for place in of_file if isinstance(place, TableCell)])


def _read_file(root: Path, file: str) -> bytes | UnusableError:
    try:
        check_file(root, file)
        return resolve_inside(root, file).read_bytes()
    except UnusableError as error:
        return error
    except OSError as error:
        if error.errno in REFUSED:
            return UnusableError(f"the file cannot be read ({error.strerror})")
        raise DataError(f"{root / file} cannot be read: {error.strerror or error}. Try again when it can.") from error


def _read_ranges(root: Path, file: str, places: Sequence[FileRange]) -> Iterator[bytes | UnusableError]:
    try:
        with resolve_inside(root, file).open("rb") as archive:
            for place in places:
                archive.seek(place.offset)
                data = archive.read(place.size)
                yield data if len(data) == place.size else UnusableError("the tar ends before it")
    except (OSError, UnusableError) as error:
        raise DataError(f"The tar {root / file} cannot be read: {error}. Try again when it can.") from error


def _read_table(root: Path, file: str, places: Sequence[TableCell]) -> Iterator[bytes | UnusableError]:
    try:
        path = resolve_inside(root, file)
    except UnusableError as error:
        raise DataError(f"The table {root / file} cannot be read: {error}.") from error
    for data in read_cells(path, places[0].column, [place.row for place in places]):
        if data is None:
            yield UnusableError("the row holds no bytes (a path alone is not followed)")
        elif len(data) > MAX_MEMBER_BYTES:
            yield UnusableError(f"it has {len(data):,} bytes; {MAX_MEMBER_BYTES:,} are allowed")
        else:
            yield data
