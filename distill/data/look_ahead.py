"""Shards fetched before their samples are read: the plan tells which come next."""

from __future__ import annotations

import copy
import threading
from collections import Counter, deque
from collections.abc import Callable

from distill.data.plan import SamplePlan
from distill.data.shard_cache import ShardCache
from distill.data.shard_cache_config import ShardCacheConfig

SHARE_OF_CACHE = 0.8
"""The rest is for validation, and for shards whose last samples are still being read."""


class LookAhead:
    """A thread of the training process that keeps the shards of the coming places of a plan in the shard cache.

    Shards are fetched in the order in which the plan needs them, and never more than the cache holds together. One such
    thread a machine is enough: the cache lets no shard be downloaded twice. What it cannot fetch is raised in the
    training process by `advance`. Without shards behind URLs there is no thread.

    Args:
        plan: which sample stands where.
        start: place that training begins at.
        world_size: number of processes over all machines.
        ranks: those of this machine; a rank takes every `world_size`-th place from `start` on.
    """

    def __init__(self, plan: SamplePlan, start: int, *, world_size: int = 1, ranks: range = range(1)) -> None:
        # Its own: the training process reads its plan at the same time.
        self._plan = copy.copy(plan)
        self._start, self._world_size, self._ranks = start, world_size, ranks
        self._config = plan.index.shard_cache or ShardCacheConfig()
        self._position = start
        self._error: Exception | None = None
        self._is_stopped = False
        self._moved = threading.Condition()
        self._thread: threading.Thread | None = None
        self._idle_at = -1
        if self._config.look_ahead_samples and any(shard.is_remote for shard in plan.index.shards):
            self._thread = threading.Thread(target=self._run, name="shard look-ahead", daemon=True)
            self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the thread is alive."""
        return self._thread is not None and self._thread.is_alive()

    def advance(self, position: int) -> None:
        """Tell that training has gone on to a place of the plan.

        Raises:
            DataError: a shard of the coming places cannot be fetched.
            ConfigError: it cannot be fetched as configured.
            Exception: what else ended the thread.
        """
        with self._moved:
            self._position = max(self._position, position)
            self._moved.notify_all()
            if self._error is not None:
                raise self._error

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Wait until all that may be fetched for the present place is there, or has failed; False after the timeout."""
        with self._moved:
            return self._moved.wait_for(
                lambda: not self.is_running or self._error is not None or self._idle_at == self._position, timeout_s
            )

    def stop(self) -> None:
        """End the thread, after the download it is at; without waiting for one that takes longer than the timeout."""
        with self._moved:
            self._is_stopped = True
            self._moved.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(self._config.timeout_s)

    def _run(self) -> None:
        try:
            cache = ShardCache(self._config)
            window = _Window(self._plan, self._start, int(SHARE_OF_CACHE * self._config.limit_bytes), self._is_ours)
            while not self._is_stopped:
                position = self._position
                shard = window.next_shard(position, position + self._config.look_ahead_samples)
                if shard is None:
                    self._wait_beyond(position)
                else:
                    entry = self._plan.index.shards[shard]
                    cache.ensure(entry.location, entry.num_bytes, entry.sha256)
        except Exception as error:  # a thread has nobody to raise it to: `advance` raises it, whatever it is
            with self._moved:
                self._error = error
                self._moved.notify_all()

    def _wait_beyond(self, position: int) -> None:
        with self._moved:
            self._idle_at = position
            self._moved.notify_all()
            self._moved.wait_for(lambda: self._is_stopped or self._position != position)

    def _is_ours(self, position: int) -> bool:
        return (position - self._start) % self._world_size in self._ranks


class _Window:
    """The coming places of a plan, as far as their shards fit into a number of bytes."""

    def __init__(self, plan: SamplePlan, start: int, budget_bytes: int, is_ours: Callable[[int], bool]) -> None:
        self.plan, self.budget_bytes, self.is_ours = plan, budget_bytes, is_ours
        self._next = start
        self._places: deque[tuple[int, int]] = deque()
        self._uses: Counter[int] = Counter()
        self._num_bytes = 0

    def next_shard(self, position: int, end: int) -> int | None:
        """Return the shard that is needed next and is not in the window yet.

        Args:
            position: where training is; what lies before is let go.
            end: first place that is too far ahead.

        Returns:
            The shard's number; None when there is none before the end, or it does not fit.
        """
        self._let_go(position)
        shards, shard_ids = self.plan.index.shards, self.plan.index.shard_ids
        self._next = max(self._next, position)
        while self._next < end:
            if not self.is_ours(self._next):
                self._next += 1
                continue
            shard = int(shard_ids[self.plan[self._next]])
            size = 0 if self._uses[shard] else shards[shard].num_bytes
            if size and self._num_bytes and self._num_bytes + size > self.budget_bytes:
                return None
            self._places.append((self._next, shard))
            self._uses[shard] += 1
            self._num_bytes += size
            self._next += 1
            if size and shards[shard].is_remote:
                return shard
        return None

    def _let_go(self, position: int) -> None:
        while self._places and self._places[0][0] < position:
            shard = self._places.popleft()[1]
            self._uses[shard] -= 1
            if not self._uses[shard]:
                self._num_bytes -= self.plan.index.shards[shard].num_bytes
