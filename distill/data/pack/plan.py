"""The plan of a packing: which image goes into which shard, decided once and kept beside the shards."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from distill.data.pack.durable import durable_file
from distill.data.pack.keys import UniqueKeys, safe_key
from distill.data.pack.listing import read_rows
from distill.data.pack.rows import SourceRow, json_line
from distill.data.pack.shard_writer import PlannedSample
from distill.errors import DataError

FORMAT = "distill-pack/1"
DOMAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""What may stand before the number in a shard's name: no slash, glob or brace."""


@dataclass(frozen=True)
class PlannedShard:
    """A shard of the plan: its name, and which lines of the plan's samples are its own."""

    name: str
    offset: int
    count: int


@dataclass
class Counts:
    """What became of the rows; `planned` is always the sum of the next three.

    Attributes:
        planned: rows of the source.
        packed: images that go into shards.
        duplicates: rows with the bytes of an earlier one.
        quarantined: rows that cannot be used.
        renamed: packed images whose key was taken, or has letters that a key may not have.
    """

    planned: int = 0
    packed: int = 0
    duplicates: int = 0
    quarantined: int = 0
    renamed: int = 0


@dataclass(frozen=True)
class PackPlan:
    """What `pack.json` holds.

    Attributes:
        request: the options that determine the bytes.
        fingerprint: of the source's listing.
        counts: what became of the rows.
        shards: in the order of their names.
    """

    request: dict[str, Any]
    fingerprint: str
    counts: Counts
    shards: Sequence[PlannedShard]


@dataclass(frozen=True)
class PackFolder:
    """Names in a folder that `distill pack` writes."""

    out: Path
    work: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "work", self.out / ".pack")

    @property
    def plan(self) -> Path:
        """The plan: written last of all but the shards, so that it vouches for the other files."""
        return self.out / "pack.json"

    @property
    def manifest(self) -> Path:
        """One line for each complete shard."""
        return self.out / "manifest.jsonl"

    @property
    def quarantine(self) -> Path:
        """One line for each row that cannot be used."""
        return self.out / "quarantine.jsonl"

    @property
    def duplicates(self) -> Path:
        """One line for each row with the bytes of an earlier one."""
        return self.out / "duplicates.jsonl"

    @property
    def listing(self) -> Path:
        """All rows of the source."""
        return self.work / "listing.jsonl"

    @property
    def samples(self) -> Path:
        """All samples, shard after shard."""
        return self.work / "samples.jsonl"


class PlanWriter:
    """Takes the rows with what their scan found, in source order, and decides. Deterministic: no worker is asked.

    Memory: some 300 bytes an image, for the hashes and keys met.

    Args:
        folder: where the plan's files go.
        domain: of rows that name none; None means that a row without one is quarantined.
        images_per_shard: most samples of one shard.
    """

    def __init__(self, folder: PackFolder, *, domain: str | None, images_per_shard: int) -> None:
        self._folder, self._domain, self._images_per_shard = folder, domain, images_per_shard
        self.counts = Counts()
        self._stack = ExitStack()
        self._first: dict[bytes, int] = {}
        self._keys = UniqueKeys()
        self._waiting: dict[str, list[bytes]] = {}
        self._shards: dict[str, list[PlannedShard]] = {}
        self._offset = 0

    def __enter__(self) -> PlanWriter:
        folder = self._folder
        self._samples = self._open(folder.samples)
        self._quarantine = self._open(folder.quarantine)
        self._duplicates = self._open(folder.duplicates)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _open(self, path: Path) -> BinaryIO:
        return self._stack.enter_context(durable_file(path))

    def add(self, row: SourceRow, offset: int, scanned: Sequence[str | None]) -> None:
        """Take one row.

        Args:
            row: the row.
            offset: where its line begins in the listing.
            scanned: what `scan_rows` says of it.
        """
        sha256, extension, reason = scanned
        domain = row.domain or self._domain
        if reason is None and (domain is None or DOMAIN_NAME.fullmatch(domain) is None):
            reason = f"its domain is {domain!r}; name one of letters, digits, '_', '.' and '-', here or by --domain"
        self.counts.planned += 1
        if reason is not None or sha256 is None or extension is None or domain is None:
            self.counts.quarantined += 1
            facts = {"source": row.source, "key": row.key, "domain": domain, "reason": reason}
            self._quarantine.write(json_line(facts))
            return
        first = self._first.setdefault(bytes.fromhex(sha256), offset)
        if first != offset:
            self.counts.duplicates += 1
            original = read_rows(self._folder.listing, first, 1)[0]
            facts = {"source": row.source, "key": row.key, "sha256": sha256, "first": original.source}
            self._duplicates.write(json_line(facts))
            return
        self._pack(row, domain, sha256, extension)

    def _pack(self, row: SourceRow, domain: str, sha256: str, extension: str) -> None:
        key = self._keys.claim(safe_key(row.key), sha256)
        self.counts.packed += 1
        self.counts.renamed += key != row.key
        sample = PlannedSample(key, extension, sha256, row.place, row.label, row.group, row.source)
        waiting = self._waiting.setdefault(domain, [])
        waiting.append(sample.line())
        if len(waiting) == self._images_per_shard:
            self._flush(domain)

    def _flush(self, domain: str) -> None:
        """Write a shard's samples one after the other, so that its worker reads one range."""
        lines = self._waiting.pop(domain)
        shards = self._shards.setdefault(domain, [])
        shards.append(PlannedShard(f"{domain}-{len(shards):06d}.tar", self._offset, len(lines)))
        self._offset += sum(self._samples.write(line) for line in lines)

    def finish(self) -> list[PlannedShard]:
        """Give what is left to last, shorter shards, and return all shards in the order of their names."""
        for domain in sorted(self._waiting):
            self._flush(domain)
        return [shard for domain in sorted(self._shards) for shard in self._shards[domain]]


def write_plan(folder: PackFolder, plan: PackPlan) -> None:
    """Write `pack.json`, whole or not at all."""
    content = {"format": FORMAT, **asdict(plan)}
    with durable_file(folder.plan) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def read_plan(folder: PackFolder) -> PackPlan | None:
    """Return the plan of a folder, None where there is none yet.

    Raises:
        DataError: there is one that cannot be read.
    """
    try:
        content = cast("dict[str, Any]", json.loads(folder.plan.read_bytes()))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, and this version knows {FORMAT!r}")
        shards = [PlannedShard(**shard) for shard in content["shards"]]
        return PackPlan(content["request"], content["fingerprint"], Counts(**content["counts"]), shards)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder.plan} cannot be read ({error}); name a new folder.") from error
