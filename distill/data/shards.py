"""Which tar files belong to which domain."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from distill.errors import ConfigError, DataError

ShardSpec = str | Path | dict[str, str | list[str]]
"""A directory, file, glob or brace pattern; or domain -> the same, one or several."""

MAX_SHARDS = 1_000_000
"""A brace pattern that names more files than this is a slip of the pen."""

MAX_DOMAINS = 1000

_GLOB = frozenset("*?[")


def find_shards(spec: ShardSpec, *, key: str = "shards") -> dict[str, list[Path]]:
    """Return the shards of each domain, domains and shards in the order of their names.

    Args:
        spec: a directory (its `*.tar`), a file, a glob (`data/*.tar`) or a brace pattern
            (`data/natural-{000000..000099}.tar`); the domain is then the file name before its last "-". Or a mapping
            from domain to one or several of these, which says the domain whatever the files are called.
        key: the configuration key that the value came from, for messages.

    Returns:
        Domain to its shards. Every domain has at least one, and no name occurs twice in a domain: the name is what the
        fingerprint and the order of the samples go by, so that a dataset may move.

    Raises:
        ConfigError: the value is empty, or names something else than local files.
        DataError: no shard matches, one is missing or compressed, or has no domain.
    """
    if isinstance(spec, dict):
        found = {domain: _of_domain(domain, patterns, key) for domain, patterns in spec.items()}
    else:
        found = _by_name(_expand(str(spec), key), key)
    if not found:
        raise ConfigError(f"{key} is empty; give a directory or pattern of shards, or a mapping from domain to these.")
    if len(found) > MAX_DOMAINS:
        raise DataError(
            f"{key}: the shards' names tell {len(found):,} domains; the domain is what stands before the last '-'. "
            f"Give {key} as a mapping from domain to pattern."
        )
    for domain, paths in found.items():
        _check_names(domain, paths, key)
    return {domain: sorted(found[domain], key=lambda path: path.name) for domain in sorted(found)}


def _of_domain(domain: str, patterns: str | list[str], key: str) -> list[Path]:
    patterns = [patterns] if isinstance(patterns, str | Path) else patterns
    if not domain or not patterns:
        raise ConfigError(f"{key}.{domain or '<empty name>'} names no shards; give a directory or pattern.")
    return list(dict.fromkeys(path for pattern in patterns for path in _expand(str(pattern), f"{key}.{domain}")))


def _by_name(paths: list[Path], key: str) -> dict[str, list[Path]]:
    domains: dict[str, list[Path]] = {}
    for path in paths:
        domain, dash, _ = path.stem.rpartition("-")
        if not dash or not domain:
            raise DataError(
                f"The name of {path} does not say its domain: shards are called <domain>-<number>.tar. Rename it, or "
                f"give {key} as a mapping from domain to pattern."
            )
        domains.setdefault(domain, []).append(path)
    return domains


def _check_names(domain: str, paths: list[Path], key: str) -> None:
    seen: dict[str, Path] = {}
    for path in paths:
        if path.name in seen:
            raise DataError(
                f"{key}: the domain {domain!r} has two shards called {path.name} ({seen[path.name]} and {path}); "
                "shards are told apart by name, so rename one."
            )
        seen[path.name] = path


def _expand(pattern: str, key: str) -> list[Path]:
    """Return the files that a directory, file, glob or brace pattern names."""
    if pattern.startswith("pipe:") or "://" in pattern:
        raise ConfigError(f"{key}: {pattern!r} is no local path; copy the shards to a local or mounted folder first.")
    if not pattern:
        raise ConfigError(f"{key} is empty; give a directory or pattern of shards.")
    if Path(pattern).is_dir():
        return _of_directory(Path(pattern), key)
    names = [pattern] if Path(pattern).exists() else list(islice(_braces(pattern), MAX_SHARDS + 1))
    if len(names) > MAX_SHARDS:
        raise ConfigError(f"{key}: {pattern!r} names more than {MAX_SHARDS:,} files; check its braces.")
    paths: list[Path] = []
    for name in names:
        if _GLOB & set(name) and not Path(name).exists():
            paths += [Path(match) for match in sorted(glob.glob(name))]  # noqa: PTH207 - takes absolute patterns too
        elif Path(name).is_file():
            paths.append(Path(name))
        else:
            raise DataError(f"{key}: the shard {name} does not exist.")
    if not paths:
        raise DataError(f"{key}: no shard matches {pattern!r}; check the path (the current folder is {Path.cwd()}).")
    return list(dict.fromkeys(paths))


def _braces(pattern: str) -> Iterator[str]:
    from braceexpand import braceexpand

    try:
        yield from braceexpand(pattern)
    except ValueError:
        # A lone brace is part of a file's name.
        yield pattern


def _of_directory(directory: Path, key: str) -> list[Path]:
    names = sorted(path for path in directory.iterdir() if path.is_file() and not path.name.startswith("."))
    compressed = [path for path in names if path.suffix == ".tgz" or ".tar" in path.suffixes[:-1]]
    if compressed:
        raise DataError(
            f"{key}: {compressed[0]} looks compressed; shards are plain tars, read at offsets. Unpack it with "
            "`gunzip` or the like, or move it away."
        )
    shards = [path for path in names if path.suffix == ".tar"]
    if not shards:
        raise DataError(f"{key}: the folder {directory} has no *.tar file; name the folder that holds the shards.")
    return shards
