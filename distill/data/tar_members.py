"""The members of a plain tar, or an error: nothing that is damaged, unsafe or hidden passes without a word.

Python's `tarfile` takes a damaged header for the end of the archive, and streaming readers built on it lose the rest of
the shard in silence. Here the archive must end as the format says, with zero blocks only, or it is refused.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from distill.errors import DataError

BLOCK_BYTES = 512
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "json", "txt", "cls")
"""All that a shard may hold: images, labels and text. None of these can carry code."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_MEMBER_BYTES = 256 << 20
MAX_HEADER_BYTES = 1 << 20

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a shard.

    Attributes:
        key: the name up to the first dot of its last part; members of one sample share it.
        extension: the rest, lower case, without the dot.
        offset: where its bytes begin in the tar.
        size: how many there are.
    """

    key: str
    extension: str
    offset: int
    size: int


def read_members(file: BinaryIO, path: str) -> Iterator[Member]:
    """Yield the regular files of a plain tar in their order.

    Args:
        file: the open tar, seekable.
        path: its name, for messages.

    Raises:
        DataError: the file is compressed, truncated, damaged or no tar; a member is a link or device, has a name that
            is unsafe or not UTF-8, an extension that is not allowed, or is too large; or a name occurs twice.
    """
    _check_magic(file, path)
    seen: set[tuple[str, str]] = set()
    try:
        with tarfile.open(
            fileobj=cast(BinaryIO, _HeaderReader(file, path)), mode="r:", encoding="utf-8", errors="surrogateescape"
        ) as archive:
            while (info := archive.next()) is not None:
                # tarfile keeps every header it has read; a shard of a million members would fill memory.
                cast(Any, archive).members.clear()
                if info.isdir():
                    continue
                member = _checked(info, path)
                if (member.key, member.extension) in seen:
                    raise DataError(f"{path}: the member {info.name!r} occurs twice; write the shard again.")
                seen.add((member.key, member.extension))
                yield member
            end = archive.offset
    except (tarfile.TarError, UnicodeError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{path} is truncated or no tar ({error}); write or copy it again.") from error
    _check_end(file, end, path)


class _HeaderReader:
    """Gives tarfile the headers of a file: an extended one may announce any size, and tarfile would read it whole."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.file, self.path = file, path
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise DataError(f"{self.path}: a header of {size:,} bytes; {MAX_HEADER_BYTES:,} are allowed.")
        return self.file.read(size)


def _check_magic(file: BinaryIO, path: str) -> None:
    file.seek(0)
    head = file.read(BLOCK_BYTES)
    file.seek(0)
    if not head:
        raise DataError(f"{path} is empty; write or copy it again.")
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic) and head[257:262] != b"ustar":
            raise DataError(f"{path} is {name}-compressed; shards are plain tars, read at offsets. Decompress it.")
    if len(head) < BLOCK_BYTES:
        raise DataError(f"{path} is truncated: it is shorter than one tar block; write or copy it again.")


def _check_end(file: BinaryIO, end: int, path: str) -> None:
    """Find what lies where the archive should end: two zero blocks at least, and nothing else."""
    file.seek(end)
    found = 0
    while chunk := file.read(1 << 20):
        if chunk.count(0) != len(chunk):
            raise DataError(
                f"{path} is damaged: at byte {end} stands neither a valid header nor the end of the archive, and more "
                "data follows. Every sample behind it would be lost; write or copy the shard again."
            )
        found += len(chunk)
    if found < 2 * BLOCK_BYTES:
        raise DataError(
            f"{path} is truncated: it stops at byte {end + found} without the end-of-archive blocks; write or copy it "
            "again."
        )


def _checked(info: tarfile.TarInfo, path: str) -> Member:
    name = info.name
    if not info.isreg() or info.issparse():
        raise DataError(f"{path}: the member {name!r} is no regular file (a link, device or sparse file); remove it.")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{path}: the member {name!r} has a name that is not UTF-8; rename it.") from None
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or any(ord(letter) < 32 for letter in name):
        raise DataError(f"{path}: the member {name!r} has an unsafe name; use relative names without '..' or '\\'.")
    stem, dot, extension = PurePosixPath(name).name.partition(".")
    extension = extension.lower()
    if not stem or not dot or extension not in EXTENSIONS:
        raise DataError(
            f"{path}: the member {name!r} is not <key>.<extension> with an allowed extension "
            f"({', '.join(EXTENSIONS)}); leave it out of the shard."
        )
    if info.size > MAX_MEMBER_BYTES:
        raise DataError(f"{path}: the member {name!r} has {info.size:,} bytes; {MAX_MEMBER_BYTES:,} are allowed.")
    key = str(PurePosixPath(name).parent / stem)
    return Member(key, extension, info.offset_data, info.size)
