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

from distill.data.index_file import IndexFiles
from distill.data.indexing import read_indexes
from distill.data.shard_cache_config import ShardCacheConfig
from distill.data.shard_index import ShardIndex
from distill.data.shards import ShardSpec, find_shards
from distill.data.stores import is_remote, name_of, shown
from distill.errors import DataError

__all__ = ["DatasetIndex", "Shard", "build_index", "find_shards"]


@dataclass(frozen=True)
class Shard:
    """One tar file of a dataset.

    Attributes:
        domain: the domain it belongs to.
        location: where it is, a local path or a URL.
        num_bytes: its size.
        sha256: of the whole file, hex.
        first_row: row of its first sample.
    """

    domain: str
    location: str
    num_bytes: int
    sha256: str
    first_row: int

    @property
    def name(self) -> str:
        """Its file name."""
        return name_of(self.location)

    @property
    def is_remote(self) -> bool:
        """Whether it lies behind a URL."""
        return is_remote(self.location)

    @property
    def shown(self) -> str:
        """Where it is, as it may be printed: without user, password and query."""
        return shown(self.location)


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
        shard_cache: how shards behind URLs are fetched; None means the usual folder and limit.
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
    shard_cache: ShardCacheConfig | None = None

    def __len__(self) -> int:
        return len(self.shard_ids)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, hex, over the sorted (domain, shard name, shard SHA-256): equal data, equal fingerprint."""
        manifest = sorted((shard.domain, shard.name, shard.sha256) for shard in self.shards)
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
        """Return "shard: key", by which a person finds a sample."""
        return f"{self.shards[int(self.shard_ids[row])].shown}: {self.key_of(row)}"

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


MAX_LISTED_FAULTS = 20


def build_index(
    shards: ShardSpec,
    *,
    index_dir: Path | None = None,
    reuse: bool = True,
    key: str = "shards",
    shard_cache: ShardCacheConfig | None = None,
    num_workers: int | None = None,
) -> DatasetIndex:
    """Read the index of every shard, making those that are missing or out of date, and join them.

    Args:
        shards: as for `find_shards`.
        index_dir: folder for index files; None means `.distill-index` beside each local shard, and
            ~/.cache/encoder-distill/index for shards behind URLs.
        reuse: False reads every shard again, whatever index files there are.
        key: the configuration key that `shards` came from, for messages.
        shard_cache: where and how shards behind URLs are fetched; None means the usual.
        num_workers: as for `read_indexes`. A program that starts more than one process needs
            `if __name__ == "__main__":` around what it does.

    Raises:
        ConfigError: the shards are not named rightly, or the index cannot be written.
        DataError: shards are missing, empty, damaged, or hold something that is not allowed; all of them are named.
    """
    cache = shard_cache or ShardCacheConfig()
    found = find_shards(shards, key=key, stores=cache.stores)
    pairs = [(domain, location) for domain, of_domain in found.items() for location in of_domain]
    files = IndexFiles(index_dir, reuse, cache)
    results = read_indexes([location for _, location in pairs], files, num_workers=num_workers)
    faults = [result for result in results if isinstance(result, DataError)]
    if faults:
        raise faults_error(faults, len(pairs))
    return join_usable(pairs, results, cache)


def join_usable(
    pairs: Sequence[tuple[str, str]], results: Sequence[ShardIndex | DataError], shard_cache: ShardCacheConfig
) -> DatasetIndex:
    """Join the indexes of those shards that have one.

    Args:
        pairs: domain and location of each shard, in row order.
        results: index of each shard, or what is wrong with it.
        shard_cache: how shards behind URLs are fetched.
    """
    usable = [(pair, part) for pair, part in zip(pairs, results, strict=True) if not isinstance(part, DataError)]
    domains, locations = zip(*(pair for pair, _ in usable), strict=True)
    return replace(join(domains, locations, [part for _, part in usable]), shard_cache=shard_cache)


def faults_error(faults: Sequence[DataError], num_shards: int) -> DataError:
    """Return one error that names all shards that cannot be used."""
    if len(faults) == 1:
        return DataError(str(faults[0]))
    listed = "".join(f"\n  - {fault}" for fault in faults[:MAX_LISTED_FAULTS])
    more = f"\n  and {len(faults) - MAX_LISTED_FAULTS:,} more." if len(faults) > MAX_LISTED_FAULTS else ""
    return DataError(f"{len(faults):,} of {num_shards:,} shards cannot be used:{listed}{more}")


def join(domains: Sequence[str], locations: Sequence[str], parts: Sequence[ShardIndex]) -> DatasetIndex:
    """Join the indexes of shards that stand in row order.

    Args:
        domains: domain of each shard.
        locations: path or URL of each shard.
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
            Shard(domain, location, part.num_bytes, part.sha256, start)
            for domain, location, part, start in zip(domains, locations, parts, starts, strict=True)
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
