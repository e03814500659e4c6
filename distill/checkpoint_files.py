"""Checkpoint files that are whole or not there: atomic writing, a manifest with checksums, verification, sweeping.

Beside `last.ckpt` lies `last.ckpt.manifest.json`. While a save replaces the one before, the manifest lists both: it is
on disk before the new file takes its name, so whichever of the two is there at that instant can be verified.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from distill.errors import WeightsError

LAST_NAME = "last.ckpt"
PREVIOUS_NAME = "previous.ckpt"
MANIFEST_SUFFIX = ".manifest.json"
MANIFEST_MARGIN_BYTES = 2**20
"""Room for manifests and the archive's own tables, beyond the tensors."""
LEFTOVER = re.compile(r"^\..+\.(\d+)\.tmp$")


@dataclass(frozen=True)
class Entry:
    """What a manifest says of one file.

    Attributes:
        sha256: of the whole file, hex.
        bytes: its size.
        global_step: optimiser steps done.
        epoch: epochs done.
        versions: the libraries that wrote it.
        teachers: `weights_fingerprint` of each teacher by name.
    """

    sha256: str
    bytes: int
    global_step: int
    epoch: int
    versions: dict[str, str]
    teachers: dict[str, str]


class HashingFile:
    """A binary file, opened for writing, that takes the checksum of what passes through: no second copy in memory."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        """Write all of `data`."""
        self._hash.update(data)
        count = self._stream.write(data)
        self.bytes += count
        return count

    def flush(self) -> None:
        """Hand on what is buffered."""
        self._stream.flush()

    @property
    def sha256(self) -> str:
        """The checksum of what was written, hex."""
        return self._hash.hexdigest()


def write_checkpoint(
    target: Path, write: Callable[[HashingFile], None], describe: Callable[[str, int], Entry], *, needed_bytes: int
) -> Entry:
    """Write a checkpoint and its manifest; a file of that name that is there is replaced in one instant.

    A file named `last.ckpt` stays as `previous.ckpt`.

    Args:
        target: the file.
        write: puts the content into the file it is given.
        describe: makes the manifest's entry of checksum and size.
        needed_bytes: how much room it takes.

    Raises:
        OSError: the folder cannot be written, or its disk is full. What was there is untouched.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    check_space(target, needed_bytes)
    with temporary_beside(target) as temporary:
        with temporary.open("wb") as stream:
            hashing = HashingFile(stream)
            write(hashing)
            stream.flush()
            os.fsync(stream.fileno())
        entry = describe(hashing.sha256, hashing.bytes)
        present = present_entries(target)
        write_manifest(target, [entry, *present])
        with previous_kept(target, present if target.name == LAST_NAME else []):
            temporary.replace(target)
            sync_folder(target.parent)
    write_manifest(target, [entry])
    _WRITTEN.add(_identity(target))
    return entry


def check_space(target: Path, needed_bytes: int) -> None:
    """Refuse a write that the disk has no room for, before it begins.

    Raises:
        OSError: saying how much is needed and how much there is.
    """
    free = shutil.disk_usage(target.parent).free
    if free < needed_bytes + MANIFEST_MARGIN_BYTES:
        raise OSError(
            f"it needs {needed_bytes + MANIFEST_MARGIN_BYTES:,} bytes, and the disk of {target.parent} has {free:,} "
            "bytes free"
        )


@contextmanager
def previous_kept(target: Path, present: list[Entry]) -> Generator[None]:
    """Give the file that the block replaces the name `previous.ckpt`; nothing happens where `present` is empty.

    A second hard link holds it until the new file has its name, so that two files are complete at every instant. Where
    the file system has no links it is renamed first: then `previous.ckpt` is the one that verifies meanwhile.
    """
    if not target.is_file() or not present:
        yield
        return
    previous = target.with_name(PREVIOUS_NAME)
    with temporary_beside(previous) as link:
        try:
            os.link(target, link)
        except OSError:
            _name_previous(target, previous, present)
            yield
        else:
            yield
            _name_previous(link, previous, present)


def _name_previous(file: Path, previous: Path, present: list[Entry]) -> None:
    write_manifest(previous, [*present, *present_entries(previous)])
    file.replace(previous)
    sync_folder(previous.parent)
    write_manifest(previous, present)


@contextmanager
def temporary_beside(target: Path) -> Generator[Path]:
    """Name a temporary file in the target's own folder, which goes away if it is still there at the end.

    Its name tells the process, so that `sweep` knows whether anybody still writes it.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def manifest_path(file: Path) -> Path:
    """Return where a checkpoint's manifest lies."""
    return file.with_name(file.name + MANIFEST_SUFFIX)


def write_manifest(file: Path, entries: list[Entry]) -> None:
    """Replace a checkpoint's manifest in one instant.

    Raises:
        OSError: the folder cannot be written, or its disk is full.
    """
    target = manifest_path(file)
    text = json.dumps({"format": 1, "files": [asdict(entry) for entry in entries]}, indent=1)
    with temporary_beside(target) as temporary:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
        sync_folder(target.parent)


def read_manifest(file: Path) -> list[Entry]:
    """Return what a checkpoint's manifest lists.

    Raises:
        WeightsError: it is missing or damaged.
    """
    path = manifest_path(file)
    names = {field.name for field in fields(Entry)}
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        return [Entry(**{name: entry[name] for name in names}) for entry in content["files"]]
    except FileNotFoundError as error:
        raise WeightsError(f"{file} has no manifest ({path.name}): its save was not completed.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} cannot be read as a manifest: {error!r}.") from error


def present_entries(file: Path) -> list[Entry]:
    """Return the manifest's entry of the file that is there now; none where nothing there can be verified."""
    if not file.is_file():
        return []
    with suppress(WeightsError):
        entries = read_manifest(file)
        # What this process wrote was hashed then. A file of another process is read again: a damaged one must not take
        # the place of the one before it.
        if len(entries) == 1 and _identity(file) in _WRITTEN:
            return entries
        return [verify(file)]
    return []


_WRITTEN: set[tuple[int, int, int]] = set()
"""The files that this process wrote, as `_identity` tells them."""


def _identity(file: Path) -> tuple[int, int, int]:
    """Return what changes when a file is replaced or written to."""
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def verify(file: Path) -> Entry:
    """Check a checkpoint against its manifest, byte for byte.

    Raises:
        WeightsError: the file or its manifest is missing or damaged.
    """
    if not file.is_file():
        raise WeightsError(f"{file} is missing.")
    entries = read_manifest(file)
    status = file.stat()
    fitting = [entry for entry in entries if entry.bytes == status.st_size]
    if not fitting:
        sizes = " or ".join(f"{entry.bytes:,}" for entry in entries)
        raise WeightsError(f"{file} is damaged: it has {status.st_size:,} bytes, its manifest says {sizes}.")
    checksum = _checksum(file, status.st_ino, status.st_size, status.st_mtime_ns)
    for entry in fitting:
        if entry.sha256 == checksum:
            return entry
    raise WeightsError(f"{file} is damaged: its SHA-256 is {checksum}, its manifest says {fitting[0].sha256}.")


@lru_cache(maxsize=64)
def _checksum(file: Path, inode: int, size: int, modified_ns: int) -> str:
    """Return a file's checksum; what tells an altered file is part of the key."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def claimed_step(file: Path) -> int:
    """Return the latest step that a checkpoint's manifest speaks of; -1 without a readable one."""
    try:
        return max((entry.global_step for entry in read_manifest(file)), default=-1)
    except WeightsError:
        return -1


def sweep(folder: Path) -> list[Path]:
    """Remove what saves of dead processes have left half-written, and return it."""
    removed: list[Path] = []
    for file in sorted(folder.glob(".*.tmp")):
        match = LEFTOVER.match(file.name)
        if match and not (int(match[1]) != os.getpid() and is_alive(int(match[1]))):
            file.unlink(missing_ok=True)
            removed.append(file)
    return removed


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # A killed process whose parent has not taken note of it is dead as well.
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return True


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_bytes(value: object, seen: set[int] | None = None) -> int:
    """Return how many bytes the tensors in nested dicts, lists and tuples take, shared ones counted once."""
    seen = set[int]() if seen is None else seen
    if isinstance(value, dict):
        return sum(storage_bytes(item, seen) for item in cast(dict[Any, Any], value).values())
    if isinstance(value, list | tuple):
        return sum(storage_bytes(item, seen) for item in cast(list[Any], value))
    storage = getattr(value, "untyped_storage", None)
    if storage is None:
        return 0
    own = storage()
    if own.data_ptr() in seen:
        return 0
    seen.add(own.data_ptr())
    return int(own.nbytes())
