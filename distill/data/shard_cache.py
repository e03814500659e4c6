"""A bounded folder of shards that were downloaded, shared by all processes of a user on one machine.

A shard's name in the folder is its SHA-256, given by the index and checked before the shard gets that name. What was
used least recently goes first; a reader that has it open keeps it until it closes it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from distill.data.shard_cache_config import USER_FOLDER, ShardCacheConfig
from distill.data.stores import MAX_DELAY_S, shown
from distill.errors import ConfigError, DataError

_KEPT = re.compile(r"[0-9a-f]{64}\.tar")
_PARTIAL = re.compile(r"([0-9a-f]{64})\.([0-9]+)\.partial")
_POLL_S = 0.05

log = logging.getLogger(__name__)


class ShardCache:
    """Opens shards by URL, downloading each once a machine; travels to worker processes.

    Args:
        config: folder, limit and retries.

    Raises:
        ConfigError: the folder cannot be made, or is open to other users.
    """

    def __init__(self, config: ShardCacheConfig | None = None) -> None:
        self.config = config or ShardCacheConfig()
        self.folder = (self.config.dir or Path.home() / USER_FOLDER / "shards").expanduser()
        self.stores = self.config.stores
        _make_private(self.folder)
        (self.folder / "locks").mkdir(mode=0o700, exist_ok=True)

    def open(self, location: str, num_bytes: int, sha256: str) -> int:
        """Return a descriptor of a shard's file, open for reading; download it if it is not here.

        Args:
            location: the shard's URL.
            num_bytes: its size, from the index.
            sha256: of the whole shard, hex, from the index.

        Raises:
            DataError: the shard cannot be downloaded, has other content than when it was indexed, or the disk is full.
            ConfigError: it is larger than the limit, or its scheme needs a package that is not installed.
        """
        try:
            return self._open(location, num_bytes, sha256)
        except OSError as error:
            raise DataError(
                f"The shard {shown(location)} cannot be kept in {self.folder} ({error.strerror or error}); check that "
                "disk, or set data.shard_cache.dir to another."
            ) from error

    def _open(self, location: str, num_bytes: int, sha256: str) -> int:
        target = self.folder / f"{sha256}.tar"
        if (file := _open_kept(target, num_bytes)) is not None:
            return file
        with self._locked(sha256, location):
            # Another process may have brought it while this one waited.
            if (file := _open_kept(target, num_bytes)) is not None:
                return file
            for attempt in (1, 2):
                with self._reserved(location, num_bytes, sha256) as partial:
                    self.stores.download(location, partial, num_bytes)
                    if _digest(partial) == sha256:
                        return self.adopt(partial, sha256)
                log.warning("%s has other bytes than when it was indexed (try %d of 2).", shown(location), attempt)
        raise DataError(
            f"The shard {shown(location)} has another SHA-256 than when it was indexed, twice in a row: it changed, or "
            "something on the way changes it. Restore it; or, for a new run on what is there now, run `distill index`."
        )

    def ensure(self, location: str, num_bytes: int, sha256: str) -> None:
        """Have a shard in the folder, as the one used last. Raises what `open` raises."""
        os.close(self.open(location, num_bytes, sha256))

    @contextmanager
    def incoming(self, location: str, num_bytes: int, name: str) -> Generator[Path]:
        """Give a file to download a shard to; the room for it is reserved, and no other process downloads it meanwhile.

        Args:
            location: the shard's URL.
            num_bytes: its size.
            name: SHA-256, hex, of the shard, or of what else names it.

        Yields:
            The file, in the cache's folder. It is removed in the end unless `adopt` took it.

        Raises:
            DataError: another process holds the shard and does not come forward, or the disk is full.
            ConfigError: the shard is larger than the limit.
        """
        with self._locked(name, location), self._reserved(location, num_bytes, name) as partial:
            yield partial

    def adopt(self, partial: Path, sha256: str) -> int:
        """Keep a checked download under its SHA-256, and return a descriptor of it, open for reading."""
        # Opened first: once it has its name, another process may remove it to make room.
        file = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(file)
            partial.replace(self.folder / f"{sha256}.tar")
        except OSError:
            os.close(file)
            raise
        return file

    @property
    def _patience_s(self) -> float:
        """How long a process that works as it should may be without progress."""
        return (self.config.retries + 1) * (self.config.timeout_s + MAX_DELAY_S)

    @contextmanager
    def _locked(self, name: str, location: str) -> Generator[None]:
        # A fixed number of lock files: a lock file cannot be removed safely.
        lock = FileLock(self.folder / "locks" / f"{name[:2]}.lock")
        progress = -1
        while not lock.is_locked:
            try:
                lock.acquire(timeout=self._patience_s, poll_interval=_POLL_S)
            except Timeout:
                before, progress = progress, self._progress()
                if progress == before:
                    raise DataError(
                        f"Another process holds the download of {shown(location)} in {self.folder} and makes no "
                        "progress; end it, and start again."
                    ) from None
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _reserved(self, location: str, num_bytes: int, name: str) -> Generator[Path]:
        if num_bytes > self.config.limit_bytes:
            raise ConfigError(
                f"The shard {shown(location)} has {num_bytes:,} bytes, more than data.shard_cache.limit_gib = "
                f"{self.config.limit_gib:g} allows; raise it."
            )
        partial = self.folder / f"{name}.{num_bytes}.partial"
        self._reserve(partial, num_bytes, location)
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)

    def _progress(self) -> int:
        """Return how much lies in unfinished downloads and finished ones, which changes as long as one goes on."""
        return sum(status.st_blocks + status.st_mtime_ns for _, status in self._files())

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        found: list[tuple[Path, os.stat_result]] = []
        for path in self.folder.glob("*.*"):
            try:
                found.append((path, path.stat()))
            except FileNotFoundError:
                continue
        return found

    def _reserve(self, partial: Path, num_bytes: int, location: str) -> None:
        """Make room, and let the file's name tell other processes how much of it is taken."""
        # This process holds the shard's lock, so a download that is there was left by one that is gone.
        partial.unlink(missing_ok=True)
        deadline = time.monotonic() + self._patience_s
        while True:
            # Held for moments only; whoever waits longer is told by an error, as for any other trouble with the disk.
            with FileLock(self.folder / "locks" / "room.lock", timeout=self._patience_s):
                if self._make_room(num_bytes):
                    partial.touch(mode=0o600)
                    return
            if time.monotonic() > deadline:
                raise DataError(
                    f"There is no room for {shown(location)} ({num_bytes:,} bytes) in {self.folder}: other downloads "
                    f"and the disk's free space leave less. Free some space, raise data.shard_cache.limit_gib "
                    f"(now {self.config.limit_gib:g}), or set data.shard_cache.dir to another disk."
                )
            time.sleep(_POLL_S)

    def _make_room(self, num_bytes: int) -> bool:
        """Remove what was used least recently until a shard fits; False where unfinished downloads are in the way."""
        files = self._files()
        kept = sorted(
            ((path, status) for path, status in files if _KEPT.fullmatch(path.name)),
            key=lambda entry: entry[1].st_mtime_ns,
        )
        announced, written = 0, 0
        for path, status in files:
            if (found := _PARTIAL.fullmatch(path.name)) and not self._swept(path, found[1]):
                announced += int(found[2])
                written += status.st_blocks * 512
        free = shutil.disk_usage(self.folder).free - max(0, announced - written)
        if announced + num_bytes > self.config.limit_bytes:
            return False
        used = announced + sum(status.st_size for _, status in kept)
        for path, status in kept:
            if used + num_bytes <= self.config.limit_bytes and free >= num_bytes:
                break
            path.unlink(missing_ok=True)
            used, free = used - status.st_size, free + status.st_size
        if free < num_bytes and not announced:
            raise DataError(
                f"The disk of {self.folder} has {max(0, free):,} bytes left, and a shard needs {num_bytes:,}; free "
                "some space, or set data.shard_cache.dir to another disk."
            )
        return free >= num_bytes

    def _swept(self, partial: Path, name: str) -> bool:
        """Remove a download whose process is gone: nobody holds its lock."""
        lock = FileLock(self.folder / "locks" / f"{name[:2]}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        try:
            partial.unlink(missing_ok=True)
        finally:
            lock.release()
        return True


def _make_private(folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise ConfigError(
            f"data.shard_cache.dir {folder} cannot be made ({error.strerror or error}); name a folder that can be "
            "written."
        ) from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ConfigError(
            f"data.shard_cache.dir {folder} is open to other users (mode {status.st_mode & 0o777:o}); name a folder of "
            f"its own, which is made with mode 700, or run `chmod 700 {folder}`."
        )


def _open_kept(target: Path, num_bytes: int) -> int | None:
    """Open a shard that is here and mark it as used; None when it is not, or has another size."""
    try:
        file = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if os.fstat(file).st_size != num_bytes:
        os.close(file)
        target.unlink(missing_ok=True)
        return None
    os.utime(file)
    return file


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
