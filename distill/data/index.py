"""Every sample of a dataset: where its bytes are, its domain and its labels; and a fingerprint of the whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.data.index_file import read_shard_index
from distill.data.shard_index import ShardIndex
from distill.data.shards import ShardSpec, find_shards
from distill.errors import DataError

__all__ = ["DatasetIndex", "Shard", "build_index", "find_shards"]


@dataclass(frozen=True)
class Shard:
    """One tar file of a dataset.

    Attributes:
        domain: the domain it belongs to.
        path: where it is.
        num_bytes: its size.
        sha256: of the whole file, hex.
        first_row: row of its first sample.
    """

    domain: str
    path: Path
    num_bytes: int
    sha256: str
    first_row: int


@dataclass(frozen=True)
class DatasetIndex:
    """N samples in a fixed order: by domain, then by shard name, then as they lie in the shard.

    Arrays and flat bytes only, so that it costs some 60 bytes and a key a sample and travels fast to a worker process.

    Attributes:
        domains: names of the domains; a sample's domain id is its place here.
        shards: all shards, in row order.
        shard_ids: int32 `[N]`, index into `shards`.
        domain_ids: int16 `[N]`, index into `domains`.
        offsets: int64 `[N]`, where the image's bytes begin in its shard.
        sizes: int64 `[N]`, how many there are.
        widths: int32 `[N]` pixels, 0 where the image's header cannot be used.
        heights: int32 `[N]` pixels, 0 likewise.
        labels: int32 `[N]`, index into `label_names`, -1 for none.
        label_names: class names over all domains: a sample's JSON `label`, or else the number in its `.cls`.
        group_ids: int32 `[N]`, index into `group_names`, -1 for none.
        group_names: group names over all domains.
        key_bytes: all keys in UTF-8, one after the other.
        key_ends: int64 `[N]`, where each key ends in `key_bytes`.
    """

    domains: tuple[str, ...]
    shards: tuple[Shard, ...]
    shard_ids: NDArray[np.int32]
    domain_ids: NDArray[np.int16]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]
    labels: NDArray[np.int32]
    label_names: tuple[str, ...]
    group_ids: NDArray[np.int32]
    group_names: tuple[str, ...]
    key_bytes: bytes
    key_ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.shard_ids)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, hex, over the sorted (domain, shard name, shard SHA-256): equal data, equal fingerprint."""
        manifest = sorted((shard.domain, shard.path.name, shard.sha256) for shard in self.shards)
        return hashlib.sha256(json.dumps(manifest, separators=(",", ":")).encode()).hexdigest()

    @property
    def keys(self) -> list[str]:
        """The N sample keys, made anew at each call."""
        return [self.key_of(row) for row in range(len(self))]

    @property
    def groups(self) -> list[str]:
        """The N group names, empty for a sample of no group; made anew at each call."""
        names = (*self.group_names, "")
        return [names[number] for number in self.group_ids.tolist()]

    def key_of(self, row: int) -> str:
        """Return one sample's key."""
        start = int(self.key_ends[row - 1]) if row else 0
        return self.key_bytes[start : int(self.key_ends[row])].decode()

    def name_of(self, row: int) -> str:
        """Return "shard path: key", by which a person finds a sample."""
        return f"{self.shards[int(self.shard_ids[row])].path}: {self.key_of(row)}"

    def range_of(self, domain: str) -> range:
        """Return a domain's rows, which stand together.

        Raises:
            DataError: the domain has no samples here.
        """
        rows = [shard.first_row for shard in self.shards if shard.domain == domain]
        if not rows:
            raise DataError(f"The data has no domain {domain!r}; it has {', '.join(self.domains)}.")
        after = [shard.first_row for shard in self.shards if shard.first_row > rows[-1] and shard.domain != domain]
        return range(rows[0], min(after, default=len(self)))

    def rows_of(self, domain: str) -> NDArray[np.int64]:
        """Return a domain's rows, int64 `[n]`.

        Raises:
            DataError: the domain has no samples here.
        """
        rows = self.range_of(domain)
        return np.arange(rows.start, rows.stop, dtype=np.int64)

    def with_domains(self, domains: Sequence[str]) -> DatasetIndex:
        """Return the same samples with domain ids that refer to another list of names.

        Raises:
            DataError: a domain of this index is not in the list.
        """
        missing = [domain for domain in self.domains if domain not in domains]
        if missing:
            raise DataError(f"The domain(s) {', '.join(missing)} are not among {', '.join(domains)}.")
        numbers = np.array([list(domains).index(domain) for domain in self.domains], dtype=np.int16)
        return replace(self, domains=tuple(domains), domain_ids=numbers[self.domain_ids])


def build_index(
    shards: ShardSpec, *, index_dir: Path | None = None, reuse: bool = True, key: str = "shards"
) -> DatasetIndex:
    """Read the index of every shard, making those that are missing or out of date, and join them.

    Args:
        shards: as for `find_shards`.
        index_dir: folder for index files; None means `.distill-index` beside each shard.
        reuse: False reads every shard again, whatever index files there are.
        key: the configuration key that `shards` came from, for messages.

    Raises:
        ConfigError: the shards are not named rightly, or the index cannot be written.
        DataError: a shard is missing, empty, damaged, or holds something that is not allowed.
    """
    found = find_shards(shards, key=key)
    domains, paths = zip(*((domain, path) for domain, of_domain in found.items() for path in of_domain), strict=True)
    return join(domains, paths, [read_shard_index(path, index_dir=index_dir, reuse=reuse) for path in paths])


def join(domains: Sequence[str], paths: Sequence[Path], parts: Sequence[ShardIndex]) -> DatasetIndex:
    """Join the indexes of shards that stand in row order.

    Args:
        domains: domain of each shard.
        paths: path of each shard.
        parts: index of each shard.
    """
    names = tuple(dict.fromkeys(domains))
    counts = np.array([len(part) for part in parts])
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).tolist()
    label_names = _sorted_names(parts, "label_names")
    group_names = _sorted_names(parts, "group_names")
    keys = [key.encode() for part in parts for key in part.keys]
    domain_of_shard = np.array([names.index(domain) for domain in domains], dtype=np.int16)
    return DatasetIndex(
        domains=names,
        shards=tuple(
            Shard(domain, path, part.num_bytes, part.sha256, start)
            for domain, path, part, start in zip(domains, paths, parts, starts, strict=True)
        ),
        shard_ids=np.repeat(np.arange(len(parts), dtype=np.int32), counts),
        domain_ids=np.repeat(domain_of_shard, counts),
        offsets=np.concatenate([part.offsets for part in parts]),
        sizes=np.concatenate([part.sizes for part in parts]),
        widths=np.concatenate([part.widths for part in parts]),
        heights=np.concatenate([part.heights for part in parts]),
        labels=_renumber(parts, "labels", "label_names", label_names),
        label_names=label_names,
        group_ids=_renumber(parts, "groups", "group_names", group_names),
        group_names=group_names,
        key_bytes=b"".join(keys),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
    )


def _sorted_names(parts: Sequence[ShardIndex], field: str) -> tuple[str, ...]:
    """Sort names, numbers among them by value: class 2 comes before class 10."""
    names = {name for part in parts for name in getattr(part, field)}
    # Python refuses to read numbers of thousands of digits.
    numbers = {name: int(name) for name in names if name.isdecimal() and len(name) < 19}
    return tuple(sorted(names, key=lambda name: (name not in numbers, numbers.get(name, 0), name)))


def _renumber(parts: Sequence[ShardIndex], field: str, names_field: str, names: tuple[str, ...]) -> NDArray[np.int32]:
    numbers = {name: number for number, name in enumerate(names)}
    renumbered: list[NDArray[np.int32]] = []
    for part in parts:
        # The last entry answers for -1.
        table = np.array([*(numbers[name] for name in getattr(part, names_field)), -1], dtype=np.int32)
        renumbered.append(table[getattr(part, field)])
    return np.concatenate(renumbered)
