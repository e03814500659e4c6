"""The index of one shard: where each sample's image lies, its size and its labels."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from distill.data.image_header import ImageError, open_image
from distill.data.tar_members import IMAGE_EXTENSIONS, Member, read_members
from distill.errors import DataError

MAX_CLS_BYTES = 32
MAX_JSON_BYTES = 4 << 20
_HEADER_BYTES = 64 << 10
_CLS = re.compile(rb"\s*([0-9]{1,9})\s*")


@dataclass(frozen=True)
class ShardIndex:
    """What is in one shard of n samples, in the order in which their keys first occur.

    Attributes:
        name: file name of the shard.
        num_bytes: its size.
        version: what tells this state of it from another of the same size: the time of change of a file in ns, the
            ETag or time of change of an object.
        sha256: of the whole file, hex.
        keys: n sample keys.
        offsets: int64 `[n]`, where the image's bytes begin.
        sizes: int64 `[n]`, how many there are.
        widths: int32 `[n]` pixels; 0 where the header could not be read or announces too many.
        heights: int32 `[n]` pixels; 0 likewise.
        labels: int32 `[n]`, index into `label_names`, -1 for none.
        label_names: class names that occur.
        groups: int32 `[n]`, index into `group_names`, -1 for none.
        group_names: group names that occur.
    """

    name: str
    num_bytes: int
    version: str
    sha256: str
    keys: list[str]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]
    labels: NDArray[np.int32]
    label_names: list[str]
    groups: NDArray[np.int32]
    group_names: list[str]

    def __len__(self) -> int:
        return len(self.keys)


def scan_shard(shard: Path) -> ShardIndex:
    """Read a whole local shard and return its index.

    Raises:
        DataError: it is empty, damaged, changes meanwhile, or holds something that is not allowed.
        OSError: it cannot be read.
    """
    with shard.open("rb") as file:
        before = os.fstat(file.fileno())
        index = scan_file(file, str(shard), name=shard.name, version=str(before.st_mtime_ns))
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"{shard} changed while it was read; index it when it is complete.")
    return index


def scan_file(file: BufferedReader, shard: str, *, name: str, version: str) -> ShardIndex:
    """Read a whole shard from an open file and return its index.

    Args:
        file: the tar, seekable.
        shard: what messages call it.
        name: its file name.
        version: what tells its present state from another.

    Raises:
        DataError: it is empty, damaged, or holds something that is not allowed.
    """
    samples = _group_by_key(file, shard)
    rows = [_read_sample(file, shard, key, members) for key, members in samples.items()]
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not rows:
        raise DataError(f"{shard} holds no sample; leave it out or write it again.")
    label_codes, label_names = _encode([row.label for row in rows])
    group_codes, group_names = _encode([row.group for row in rows])
    return ShardIndex(
        name=name,
        num_bytes=file.seek(0, os.SEEK_END),
        version=version,
        sha256=digest,
        keys=list(samples),
        offsets=np.array([row.image.offset for row in rows], dtype=np.int64),
        sizes=np.array([row.image.size for row in rows], dtype=np.int64),
        widths=np.array([row.width for row in rows], dtype=np.int32),
        heights=np.array([row.height for row in rows], dtype=np.int32),
        labels=label_codes,
        label_names=label_names,
        groups=group_codes,
        group_names=group_names,
    )


@dataclass(frozen=True, slots=True)
class _Sample:
    image: Member
    width: int
    height: int
    label: str | None
    group: str | None


def _group_by_key(file: BinaryIO, shard: str) -> dict[str, list[Member]]:
    samples: dict[str, list[Member]] = {}
    for member in read_members(file, shard):
        samples.setdefault(member.key, []).append(member)
    return samples


def _read_sample(file: BinaryIO, shard: str, key: str, members: list[Member]) -> _Sample:
    images = [member for member in members if member.extension in IMAGE_EXTENSIONS]
    if len(images) != 1:
        raise DataError(
            f"{shard}: the sample {key!r} has {len(images)} images; it needs exactly one "
            f"({', '.join(IMAGE_EXTENSIONS)})."
        )
    width, height = _image_size(file, images[0])
    others = {member.extension: member for member in members}
    label, group = None, None
    if "cls" in others:
        label = _read_cls(file, shard, others["cls"])
    if "json" in others:
        named, group = _read_json(file, shard, others["json"])
        label = label if named is None else named
    return _Sample(images[0], width, height, label, group)


def _read(file: BinaryIO, member: Member, limit: int | None = None) -> bytes:
    file.seek(member.offset)
    return file.read(member.size if limit is None else min(limit, member.size))


def _image_size(file: BinaryIO, member: Member) -> tuple[int, int]:
    """Return width and height, or zeros: an image that cannot be used is met again, and counted, when it is fetched."""
    for limit in (_HEADER_BYTES, None):
        try:
            with open_image(_read(file, member, limit)) as image:
                return image.size
        except ImageError:
            continue
    return 0, 0


def _read_cls(file: BinaryIO, shard: str, member: Member) -> str:
    found = _CLS.fullmatch(_read(file, member)) if member.size <= MAX_CLS_BYTES else None
    if found is None:
        raise DataError(f"{shard}: {member.key}.cls is no class number; it must hold one integer from 0 on, in ASCII.")
    return str(int(found[1]))


def _read_json(file: BinaryIO, shard: str, member: Member) -> tuple[str | None, str | None]:
    name = f"{shard}: {member.key}.json"
    if member.size > MAX_JSON_BYTES:
        raise DataError(f"{name} has {member.size:,} bytes; {MAX_JSON_BYTES:,} are allowed.")
    try:
        content: Any = json.loads(_read(file, member))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is no valid JSON ({error}); mend it or leave it out.") from error
    if not isinstance(content, dict):
        raise DataError(f"{name} holds a {type(content).__name__}; it must be an object.")
    values = cast(dict[str, Any], content)
    for field in ("label", "group"):
        if not isinstance(values.get(field), str | None):
            raise DataError(f"{name}: {field!r} is {values[field]!r}; it must be text, or be left out.")
    return values.get("label") or None, values.get("group") or None


def _encode(values: list[str | None]) -> tuple[NDArray[np.int32], list[str]]:
    names = sorted({value for value in values if value is not None})
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(names)}
    return np.array([numbers.get(value, -1) for value in values], dtype=np.int32), names
