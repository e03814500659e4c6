"""Bytes of shards, read at offsets: on a local or mounted disk, or behind a URL by way of the shard cache."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from distill.data.index import Shard
from distill.data.shard_cache import ShardCache
from distill.data.shard_cache_config import ShardCacheConfig
from distill.errors import DataError

MAX_OPEN_FILES = 128
"""Well below the usual limit of 1024 open files a process."""

RETRY_DELAYS_S = (0.1, 0.5, 2.0)


class ShardReader:
    """Reads stretches of shards; holds a bounded number of files open; travels to worker processes without them.

    An operating-system error is not taken for a damaged image: network file systems fail for moments. It is tried again
    after a while, and only then raised.

    Args:
        shards: the shards of an index.
        retry_delays_s: seconds to wait before each further try.
        shard_cache: where shards behind URLs are kept; None means the usual folder and limit.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        retry_delays_s: Sequence[float] = RETRY_DELAYS_S,
        shard_cache: ShardCacheConfig | None = None,
    ) -> None:
        self.shards = shards
        self.retry_delays_s = tuple(retry_delays_s)
        self._shard_cache = shard_cache
        self._cache: ShardCache | None = None
        self._files: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Return `size` bytes of shard number `shard`, from `offset` on.

        Raises:
            DataError: the shard is missing, has another size or content than when it was indexed, or cannot be read or
                downloaded after retries.
        """
        for delay_s in (*self.retry_delays_s, None):
            try:
                return self._read(shard, offset, size)
            except OSError as error:
                self._forget(shard)
                if delay_s is None:
                    raise DataError(
                        f"The shard {self.shards[shard].shown} cannot be read ({error.strerror or error}), after "
                        f"{len(self.retry_delays_s)} retries; check the disk or mount it is on."
                    ) from error
                time.sleep(delay_s)
        raise AssertionError("the last try returns or raises")

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        file = self._open(shard)
        chunks: list[bytes] = []
        missing = size
        while missing:
            chunk = os.pread(file, missing, offset + size - missing)
            if not chunk:
                raise OSError(f"it ended {missing} bytes early")
            chunks.append(chunk)
            missing -= len(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _open(self, shard: int) -> int:
        entry = self.shards[shard]
        if shard in self._files:
            self._files.move_to_end(shard)
            if entry.is_remote:
                # The cache removes first what was used longest ago.
                os.utime(self._files[shard])
            return self._files[shard]
        if entry.is_remote:
            self._forget_removed()
            self._cache = self._cache or ShardCache(self._shard_cache)
            file = self._cache.open(entry.location, entry.num_bytes, entry.sha256)
        else:
            file = os.open(entry.location, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._files[shard] = file
        if (found := os.fstat(file).st_size) != entry.num_bytes:
            self._forget(shard)
            raise DataError(
                f"The shard {entry.shown} has {found:,} bytes, but {entry.num_bytes:,} when it was indexed; it changed "
                "under the run. Restore it, or start anew."
            )
        if len(self._files) > MAX_OPEN_FILES:
            self._forget(next(iter(self._files)))
        return file

    def _forget_removed(self) -> None:
        """Close files that the cache has removed: the disk has their room back only then."""
        for shard, file in list(self._files.items()):
            if os.fstat(file).st_nlink == 0:
                self._forget(shard)

    def _forget(self, shard: int) -> None:
        file = self._files.pop(shard, None)
        if file is not None:
            os.close(file)

    def close(self) -> None:
        """Close all files; reading opens them again."""
        while self._files:
            self._forget(next(iter(self._files)))

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict[int, int]()}
