"""Where and how shards from object stores are kept: what a recipe says about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distill.data.stores import ObjectStores
from distill.errors import ConfigError

USER_FOLDER = Path(".cache") / "encoder-distill"
"""Below the home folder, not in /tmp: there another user could prepare it."""


@dataclass(frozen=True)
class ShardCacheConfig:
    """Where shards from object stores are kept on this machine, and how they are fetched.

    Args:
        dir: private folder on a fast local disk; null means ~/.cache/encoder-distill/shards.
        limit_gib: most that all shards in it may take together, in GiB, whatever number of processes use it.
        look_ahead_samples: how many samples of the plan ahead of training shards are fetched for; 0 fetches a shard
            only when a sample of it is read.
        retries: further tries after a failure that may pass (timeouts, connection resets, short reads, HTTP 5xx).
        timeout_s: longest wait for a connection or for the next bytes of a shard, in seconds.

    Raises:
        ConfigError: a value is out of its range.
    """

    dir: Path | None = None
    limit_gib: float = 100.0
    look_ahead_samples: int = 4096
    retries: int = 5
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("limit_gib", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"data.shard_cache.{name} is {getattr(self, name)}; it must be above 0.")
        for name in ("look_ahead_samples", "retries"):
            if getattr(self, name) < 0:
                raise ConfigError(f"data.shard_cache.{name} is {getattr(self, name)}; it must be 0 or more.")

    @property
    def limit_bytes(self) -> int:
        """The limit in bytes."""
        return int(self.limit_gib * 2**30)

    @property
    def stores(self) -> ObjectStores:
        """Access to the object stores, with these retries and timeout."""
        return ObjectStores(self.retries, self.timeout_s)
