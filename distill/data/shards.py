"""Which tar files belong to which domain."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePosixPath

from distill.data.stores import LISTED_SCHEMES, ObjectStores, is_remote, name_of, scheme_of, shown
from distill.errors import ConfigError, DataError

ShardSpec = str | Path | dict[str, str | list[str]]
"""A directory, file, glob or brace pattern, local or by URL; or domain -> the same, one or several."""

MAX_SHARDS = 1_000_000
"""A brace pattern that names more files than this is a slip of the pen."""

MAX_DOMAINS = 1000

_GLOB = frozenset("*?[")


def find_shards(spec: ShardSpec, *, key: str = "shards", stores: ObjectStores | None = None) -> dict[str, list[str]]:
    """Return the shards of each domain, domains and shards in the order of their names.

    Args:
        spec: a directory (its `*.tar`), a file, a glob (`data/*.tar`) or a brace pattern
            (`data/natural-{000000..000099}.tar`); the domain is then the file name before its last "-". Or a mapping
            from domain to one or several of these, which says the domain whatever the files are called. Each may be a
            URL: s3:// and gs:// like local ones; http:// and https:// by exact names and brace patterns only, since a
            web server has no listing to rely on.
        key: the configuration key that the value came from, for messages.
        stores: access to URLs; None means the usual retries and timeout.

    Returns:
        Domain to its shards, as paths or URLs. Every domain has at least one, and no name occurs twice in a domain: the
        name is what the fingerprint and the order of the samples go by, so that a dataset may move. Whether a URL
        without wildcards exists is seen when its shard is indexed.

    Raises:
        ConfigError: the value is empty, or names something that is neither a local file nor an allowed URL.
        DataError: no shard matches, one is missing or compressed, or has no domain; or a store fails.
    """
    search = _Search(stores or ObjectStores())
    if isinstance(spec, dict):
        found = {domain: _of_domain(domain, patterns, key, search) for domain, patterns in spec.items()}
    else:
        found = _by_name(search.expand(str(spec), key), key)
    if not found:
        raise ConfigError(f"{key} is empty; give a directory or pattern of shards, or a mapping from domain to these.")
    if len(found) > MAX_DOMAINS:
        raise DataError(
            f"{key}: the shards' names tell {len(found):,} domains; the domain is what stands before the last '-'. "
            f"Give {key} as a mapping from domain to pattern."
        )
    for domain, locations in found.items():
        _check_names(domain, locations, key)
    return {domain: sorted(found[domain], key=name_of) for domain in sorted(found)}


def _of_domain(domain: str, patterns: str | list[str], key: str, search: _Search) -> list[str]:
    patterns = [patterns] if isinstance(patterns, str | Path) else patterns
    if not domain or not patterns:
        raise ConfigError(f"{key}.{domain or '<empty name>'} names no shards; give a directory or pattern.")
    found = (location for pattern in patterns for location in search.expand(str(pattern), f"{key}.{domain}"))
    return list(dict.fromkeys(found))


def _by_name(locations: list[str], key: str) -> dict[str, list[str]]:
    domains: dict[str, list[str]] = {}
    for location in locations:
        domain, dash, _ = PurePosixPath(name_of(location)).stem.rpartition("-")
        if not dash or not domain:
            raise DataError(
                f"The name of {shown(location)} does not say its domain: shards are called <domain>-<number>.tar. "
                f"Rename it, or give {key} as a mapping from domain to pattern."
            )
        domains.setdefault(domain, []).append(location)
    return domains


def _check_names(domain: str, locations: list[str], key: str) -> None:
    seen: dict[str, str] = {}
    for location in locations:
        name = name_of(location)
        if name in seen:
            raise DataError(
                f"{key}: the domain {domain!r} has two shards called {name} ({shown(seen[name])} and "
                f"{shown(location)}); shards are told apart by name, so rename one."
            )
        seen[name] = location


class _Search:
    """Finds what a directory, file, glob or brace pattern names, on this machine or in an object store."""

    def __init__(self, stores: ObjectStores) -> None:
        self.stores = stores

    def expand(self, pattern: str, key: str) -> list[str]:
        """Return paths or URLs, each once."""
        if not pattern:
            raise ConfigError(f"{key} is empty; give a directory or pattern of shards.")
        if is_remote(pattern):
            scheme = scheme_of(pattern, key)
            found = [url for name in _names(pattern, key) for url in self._remote(name, scheme, key)]
        elif Path(pattern).is_dir():
            found = [str(path) for path in Path(pattern).iterdir() if path.is_file()]
            return _tars(found, pattern, key)
        else:
            names = [pattern] if Path(pattern).exists() else _names(pattern, key)
            found = [path for name in names for path in _local(name, key)]
        if not found:
            where = "" if is_remote(pattern) else f" (the current folder is {Path.cwd()})"
            raise DataError(f"{key}: no shard matches {shown(pattern)!r}; check the path{where}.")
        return list(dict.fromkeys(found))

    def _remote(self, url: str, scheme: str, key: str) -> list[str]:
        is_listed = scheme in LISTED_SCHEMES
        # In a web address "?" begins the query.
        has_wildcard = bool(_GLOB & set(url if is_listed else url.partition("?")[0]))
        if not has_wildcard and name_of(url).endswith(".tar"):
            return [url]
        if not is_listed:
            raise ConfigError(
                f"{key}: {shown(url)!r} is not the address of one .tar file, and {scheme}:// has no listing: name the "
                "shards exactly or by a brace pattern (https://host/natural-{000000..000099}.tar)."
            )
        if has_wildcard:
            return self.stores.glob(url)
        return _tars(self.stores.list_shards(url), url, key)


def _local(name: str, key: str) -> list[str]:
    if _GLOB & set(name) and not Path(name).exists():
        return sorted(glob.glob(name))  # noqa: PTH207 - takes absolute patterns too
    if not Path(name).is_file():
        raise DataError(f"{key}: the shard {name} does not exist.")
    return [name]


def _names(pattern: str, key: str) -> list[str]:
    names = list(islice(_braces(pattern), MAX_SHARDS + 1))
    if len(names) > MAX_SHARDS:
        raise ConfigError(f"{key}: {shown(pattern)!r} names more than {MAX_SHARDS:,} files; check its braces.")
    return names


def _braces(pattern: str) -> Iterator[str]:
    from braceexpand import braceexpand

    try:
        yield from braceexpand(pattern)
    except ValueError:
        # A lone brace is part of a file's name.
        yield pattern


def _tars(locations: list[str], folder: str, key: str) -> list[str]:
    """Return the plain tars among the files of a folder."""
    found = sorted(location for location in locations if not name_of(location).startswith("."))
    paths = [PurePosixPath(name_of(location)) for location in found]
    for location, path in zip(found, paths, strict=True):
        if path.suffix == ".tgz" or ".tar" in path.suffixes[:-1]:
            raise DataError(
                f"{key}: {shown(location)} looks compressed; shards are plain tars, read at offsets. Unpack it with "
                "`gunzip` or the like, or move it away."
            )
    shards = [location for location, path in zip(found, paths, strict=True) if path.suffix == ".tar"]
    if not shards:
        raise DataError(f"{key}: the folder {shown(folder)} has no *.tar file; name the folder that holds the shards.")
    return shards
