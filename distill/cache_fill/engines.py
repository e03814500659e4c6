"""Ways to go through the units of a cache: in this process, or as Ray actors. Both call `Filler.fill`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from distill.cache.folder import CacheManifest
from distill.cache_fill.filler import Filler, FillJob, Tick
from distill.errors import ConfigError

MAX_RESTARTS = 3
"""A Ray actor that dies is started again so often, and its shard given to it again."""


@dataclass(frozen=True)
class Outcome:
    """What became of one unit.

    Attributes:
        split: "train" or "val".
        number: of the shard.
        rows: images.
        unusable: views that could not be made.
        num_bytes: of the file.
        reason: why it was made; None if it was kept.
    """

    split: str
    number: int
    rows: int
    unusable: int
    num_bytes: int
    reason: str | None


Work = list[tuple[str, int]]
"""Splits and shard numbers."""


def fill_one(filler: Filler, split: str, number: int, tick: Tick = lambda _: None) -> Outcome:
    """Fill one unit and say what became of it."""
    facts, reason = filler.fill(split, number, tick)
    return Outcome(split, number, facts.rows, facts.unusable, facts.bytes, reason)


class LocalEngine:
    """Fills units one after another in this process.

    Args:
        job: what is to be filled.
    """

    def __init__(self, job: FillJob) -> None:
        self._filler = Filler(job)

    def manifest(self) -> CacheManifest:
        """Return the cache's manifest, made where there is none."""
        return self._filler.manifest()

    def fill(self, work: Work, tick: Tick) -> Iterator[Outcome]:
        """Yield what became of each unit; `tick` hears of every batch."""
        for split, number in work:
            yield fill_one(self._filler, split, number, tick)

    @property
    def filler(self) -> Filler:
        """This process's."""
        return self._filler


class RayEngine:
    """Fills units in Ray actors, each with teachers of its own, on one machine or a cluster.

    The folder, the recipe and the shards have to be at the same path on all machines.

    Args:
        job: what is to be filled.
        num_actors: how many at a time; None means one a CPU or GPU of the cluster.
        address: of a running cluster; None starts one on this machine, unless the environment names one.

    Raises:
        ConfigError: Ray is not installed.
    """

    def __init__(self, job: FillJob, num_actors: int | None = None, address: str | None = None) -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise ConfigError("--engine ray needs Ray: pip install 'encoder-distill[ray]'.") from error
        if not self._ray.is_initialized():
            settings: dict[str, Any] = {"include_dashboard": False} if address is None else {}
            if address is None and num_actors is not None:
                settings["num_cpus"] = num_actors
            self._ray.init(address=address, log_to_driver=False, **settings)
        self._resources = {"num_gpus": 1} if job.device.startswith("cuda") else {"num_cpus": 1}
        unit = "GPU" if job.device.startswith("cuda") else "CPU"
        count = num_actors or max(1, int(self._ray.cluster_resources().get(unit, 1)))
        self._driver = Filler(job)
        actor: Any = self._ray.remote(max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS, **self._resources)(
            _Actor
        )
        self._actors = [actor.remote(job) for _ in range(count)]

    @property
    def filler(self) -> Filler:
        """This process's: it knows recipe and data, and its teachers are left without weights."""
        return self._driver

    def manifest(self) -> CacheManifest:
        """Return the cache's manifest, made by an actor where there is none: this process may have no GPU."""
        self._ray.get(self._actors[0].prepare.remote())
        return self._driver.folder.read()

    def fill(self, work: Work, tick: Tick) -> Iterator[Outcome]:
        """Yield what became of each unit, as they come."""
        pool_class: Callable[[Any], Any] = importlib.import_module("ray.util").ActorPool
        pool = pool_class(self._actors)
        for outcome in pool.map_unordered(lambda actor, unit: actor.fill.remote(*unit), work):
            tick(outcome.rows)
            yield outcome


class _Actor:
    """A filler in a Ray process."""

    def __init__(self, job: FillJob) -> None:
        self._filler = Filler(job)

    def prepare(self) -> None:
        """Make the manifest."""
        self._filler.manifest()

    def fill(self, split: str, number: int) -> Outcome:
        """Fill one unit."""
        return fill_one(self._filler, split, number)
