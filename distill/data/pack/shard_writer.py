"""One shard of a plan: the unit of work, of parallelism and of resuming."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any, BinaryIO, cast

from distill.data.pack.durable import durable_file
from distill.data.pack.listing import read_lines
from distill.data.pack.reading import read_places
from distill.data.pack.roots import UnusableError
from distill.data.pack.rows import Place, json_line, place_fields, read_place
from distill.errors import DataError

_CHANGED = "Put the source back as it was and repeat the command, or pack it anew into another folder."


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """A sample of the plan: `key` in the shard, and what its JSON member says."""

    key: str
    extension: str
    sha256: str
    place: Place | None
    label: str | None
    group: str | None
    source: str

    def line(self) -> bytes:
        """Return the sample as one line of JSON."""
        place = place_fields(self.place)
        return json_line([self.key, self.extension, self.sha256, place, self.label, self.group, self.source])

    @classmethod
    def read(cls, line: bytes) -> PlannedSample:
        """Return the sample that `line` wrote."""
        key, extension, sha256, place, label, group, source = json.loads(line)
        return cls(key, extension, sha256, read_place(place), label, group, source)


@dataclass(frozen=True)
class ShardUnit:
    """What a worker needs for one shard: a range of lines of the plan.

    Attributes:
        root: the source's root.
        plan: path of the file of planned samples.
        out: folder of the shards.
        name: file name of the shard.
        offset: where its first sample's line begins in the plan.
        count: number of samples.
    """

    root: str
    plan: str
    out: str
    name: str
    offset: int
    count: int


def write_shard(unit: ShardUnit) -> dict[str, Any]:
    """Write one shard, whole or not at all, and return its line of the manifest.

    The bytes depend on the plan alone: the plan's order, USTAR headers with owner, group and time zero.

    Returns:
        name, samples, bytes and sha256.

    Raises:
        DataError: an image is not what it was when the plan was made, or the shard cannot be written.
    """
    target = Path(unit.out) / unit.name
    samples = [PlannedSample.read(line) for line in read_lines(Path(unit.plan), unit.offset, unit.count)]
    if len(samples) != unit.count:
        raise DataError(f"{unit.plan} is damaged: {unit.name} should have {unit.count} samples; name a new folder.")
    try:
        with durable_file(target) as file:
            _write_members(file, Path(unit.root), samples)
            num_bytes = file.tell()
            file.seek(0)
            digest = hashlib.file_digest(cast(BufferedRandom, file), "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"The shard {target} cannot be written: {error.strerror or error}. Nothing half written is left under its "
            "name; make room and repeat the command: complete shards are kept."
        ) from error
    return {"name": unit.name, "samples": len(samples), "bytes": num_bytes, "sha256": digest}


def _write_members(file: BinaryIO, root: Path, samples: list[PlannedSample]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT, encoding="utf-8") as archive:
        for sample, image in zip(samples, _images(root, samples), strict=True):
            facts = {"label": sample.label, "group": sample.group, "sha256": sample.sha256, "source": sample.source}
            known = {name: value for name, value in facts.items() if value is not None}
            text = json.dumps(known, separators=(",", ":"), ensure_ascii=False, sort_keys=True)
            members = {sample.extension: image, "json": text.encode("utf-8", "backslashreplace")}
            for extension, content in sorted(members.items()):
                # tarfile leaves owner, group and time at zero; only size and mode remain to be set.
                info = tarfile.TarInfo(f"{sample.key}.{extension}")
                info.size, info.mode = len(content), 0o644
                archive.addfile(info, io.BytesIO(content))


def _images(root: Path, samples: list[PlannedSample]) -> Iterator[bytes]:
    places = [sample.place for sample in samples if sample.place is not None]
    for sample, content in zip(samples, read_places(root, places), strict=True):
        if isinstance(content, UnusableError):
            raise DataError(f"{sample.source} could be read when the plan was made, and now {content}. {_CHANGED}")
        if hashlib.sha256(content).hexdigest() != sample.sha256:
            raise DataError(f"{sample.source} changed after the plan was made. {_CHANGED}")
        yield content
