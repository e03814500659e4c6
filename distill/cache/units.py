"""One file of records a shard: written whole or not at all, checked by its manifest, read by row.

A unit is a safetensors file with `records` uint8 `[N, V, R]`, `crc32` uint32 `[N, V]` and `usable` uint8 `[N, V]` (0
where the image could not be decoded), and beside it a JSON manifest with its checksum. It is finished when its manifest
is there.

Legend: N images of the shard, V views of each, R bytes of a record.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from torch import Tensor

from distill.checkpoint_files import HashingFile, sync_folder, temporary_beside
from distill.errors import DataError

HEADER_ALIGNMENT = 64
Verify = Literal["sha256", "size"]


@dataclass(frozen=True)
class UnitFacts:
    """What a unit's manifest says.

    Attributes:
        cache: SHA-256 of the cache's own manifest, hex: a unit of another cache is not taken for one of this.
        shard: "domain/name" of the shard.
        shard_sha256: of the shard, hex.
        rows: N.
        views: V.
        record_bytes: R.
        unusable: views that could not be made.
        data_offset: where the records begin.
        bytes: size of the file.
        sha256: of the file, hex.
    """

    cache: str
    shard: str
    shard_sha256: str
    rows: int
    views: int
    record_bytes: int
    unusable: int
    data_offset: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class UnitPlan:
    """A unit that is to be there.

    Attributes:
        path: of the file.
        cache: as in `UnitFacts`, like all that follow.
        shard: likewise.
        shard_sha256: likewise.
        rows: likewise.
        views: likewise.
        record_bytes: likewise.
    """

    path: Path
    cache: str
    shard: str
    shard_sha256: str
    rows: int
    views: int
    record_bytes: int

    @property
    def manifest(self) -> Path:
        """Its manifest's path."""
        return self.path.with_suffix(".json")

    @property
    def header(self) -> bytes:
        """What stands before the records."""
        count, records = self.rows * self.views, self.rows * self.views * self.record_bytes
        shape = [self.rows, self.views]
        tensors = {
            "__metadata__": {"shard": self.shard, "shard_sha256": self.shard_sha256},
            "records": {"dtype": "U8", "shape": [*shape, self.record_bytes], "data_offsets": [0, records]},
            "crc32": {"dtype": "U32", "shape": shape, "data_offsets": [records, records + 4 * count]},
            "usable": {"dtype": "U8", "shape": shape, "data_offsets": [records + 4 * count, records + 5 * count]},
        }
        text = json.dumps(tensors, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % HEADER_ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + self.rows * self.views * (self.record_bytes + 5)


def write_unit(plan: UnitPlan, batches: Iterable[tuple[Tensor, Tensor]]) -> UnitFacts:
    """Write a unit and then its manifest; what a killed process has left of it goes away.

    Args:
        plan: what it is to be.
        batches: records uint8 `[B, R]` and whether each is usable, bool `[B]`, on the CPU, in the order of the file.

    Raises:
        DataError: the folder cannot be written, or its disk is full.
    """
    try:
        plan.path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in plan.path.parent.glob(f".{plan.path.stem}.*.tmp"):
            leftover.unlink(missing_ok=True)
        plan.manifest.unlink(missing_ok=True)
        with temporary_beside(plan.path) as temporary:
            with temporary.open("wb") as stream:
                hashing = HashingFile(stream)
                unusable = _write(plan, hashing, batches)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(plan.path)
            sync_folder(plan.path.parent)
        facts = _facts(plan, unusable, hashing)
        with temporary_beside(plan.manifest) as temporary:
            with temporary.open("w", encoding="utf-8") as text:
                text.write(json.dumps(asdict(facts), indent=1) + "\n")
                text.flush()
                os.fsync(text.fileno())
            temporary.replace(plan.manifest)
            sync_folder(plan.path.parent)
    except OSError as error:
        raise DataError(f"The cache unit {plan.path} cannot be written: {error.strerror or error}.") from error
    return facts


def _write(plan: UnitPlan, file: HashingFile, batches: Iterable[tuple[Tensor, Tensor]]) -> int:
    file.write(plan.header)
    checksums: list[int] = []
    flags: list[np.ndarray[Any, Any]] = []
    for records, usable in batches:
        for record in records.numpy():
            checksums.append(zlib.crc32(record))
        file.write(cast(bytes, records.numpy().data))  # hashed and written in place, without a copy
        flags.append(usable.numpy().astype(np.uint8))
    present = np.concatenate(flags)
    assert len(present) == plan.rows * plan.views, "every view of every image has a record"
    file.write(np.array(checksums, dtype="<u4").tobytes())
    file.write(present.tobytes())
    return int((present == 0).sum())


def _facts(plan: UnitPlan, unusable: int, file: HashingFile) -> UnitFacts:
    known: dict[str, Any] = {name: value for name, value in asdict(plan).items() if name != "path"}
    return UnitFacts(**known, unusable=unusable, data_offset=len(plan.header), bytes=file.bytes, sha256=file.sha256)


def read_facts(plan: UnitPlan) -> UnitFacts | None:
    """Return what the manifest of a finished unit says; None where there is none that fits the plan."""
    try:
        facts = UnitFacts(**json.loads(plan.manifest.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    names = ("cache", "shard", "shard_sha256", "rows", "views", "record_bytes")
    return facts if all(getattr(facts, name) == getattr(plan, name) for name in names) else None


def fault_of(plan: UnitPlan, verify: Verify) -> str | None:
    """Return what is wrong with a unit, as a phrase; None for a finished one that is as it was written.

    Args:
        plan: what it is to be.
        verify: "sha256" reads all of it, "size" looks at its size alone.
    """
    facts = read_facts(plan)
    if facts is None or not plan.path.is_file():
        return "is not finished"
    size = plan.path.stat().st_size
    if size != facts.bytes:
        return f"is damaged: it has {size:,} bytes, its manifest says {facts.bytes:,}"
    if verify == "sha256":
        with plan.path.open("rb") as stream:
            checksum = hashlib.file_digest(stream, "sha256").hexdigest()
        if checksum != facts.sha256:
            return f"is damaged: its SHA-256 is {checksum}, its manifest says {facts.sha256}"
    return None
