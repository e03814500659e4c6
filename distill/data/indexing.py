"""Many shard indexes at once: those that are kept are read, the others are made in parallel.

Each index is a file of its own that appears whole or not at all, so an indexing that was killed goes on where it was. A
shard that cannot be used does not keep the others from being indexed.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from distill.data.index_file import IndexFiles
from distill.data.shard_index import ShardIndex
from distill.data.stores import is_remote
from distill.errors import ConfigError, DataError

MAX_WORKERS = 32
FEW = 8
"""Fewer local shards than this are read sooner than processes start."""

_STATE_THREADS = 16


def read_indexes(
    locations: Sequence[str],
    files: IndexFiles,
    *,
    num_workers: int | None = None,
    on_shard: Callable[[], None] | None = None,
) -> list[ShardIndex | DataError]:
    """Return the index of each shard, or what is wrong with it.

    Args:
        locations: paths or URLs.
        files: where index files are kept.
        num_workers: processes that read shards; 0 reads them in this process; None means as many as there are cores,
            and none for a few shards.
        on_shard: called in this process after each shard.

    Raises:
        ConfigError: an index cannot be written, shards cannot be fetched as configured, or `num_workers` is below 0.
        DataError: a worker process was killed.
    """
    if num_workers is not None and num_workers < 0:
        raise ConfigError(f"num_workers is {num_workers}; it must be 0 or more.")
    report = on_shard or (lambda: None)
    found = _kept(locations, files)
    missing = [place for place, index in enumerate(found) if index is None]
    for _ in range(len(locations) - len(missing)):
        report()
    if num_workers is None:
        num_workers = 0 if len(missing) < FEW else min(MAX_WORKERS, _cores())
    if min(num_workers, len(missing)) < 2:
        for place in missing:
            found[place] = _make(locations[place], files)
            report()
    else:
        _make_in_parallel(locations, missing, found, files, min(num_workers, len(missing)), report)
    return [index for index in found if index is not None]


def _cores() -> int:
    # macOS cannot tell which cores a process may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _kept(locations: Sequence[str], files: IndexFiles) -> list[ShardIndex | DataError | None]:
    def kept(location: str) -> ShardIndex | DataError | None:
        try:
            return files.kept(location)
        except DataError as error:
            return error

    if not any(map(is_remote, locations)):
        return [kept(location) for location in locations]
    # One request each, in which this machine only waits.
    with ThreadPoolExecutor(_STATE_THREADS) as pool:
        return list(pool.map(kept, locations))


def _make(location: str, files: IndexFiles) -> ShardIndex | DataError:
    try:
        return files.make(location)
    except DataError as error:
        return DataError(str(error))


def _make_in_parallel(
    locations: Sequence[str],
    missing: Sequence[int],
    found: list[ShardIndex | DataError | None],
    files: IndexFiles,
    num_workers: int,
    report: Callable[[], None],
) -> None:
    # Spawned, since this process may have threads that a fork would copy half way.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_end_with_parent) as pool:
        places = {pool.submit(_make, locations[place], files): place for place in missing}
        try:
            for future in as_completed(places):
                found[places[future]] = future.result()
                report()
        except BrokenProcessPool as error:
            raise DataError(
                "A process that indexes shards was killed, perhaps for want of memory; what is indexed is kept. Start "
                "again, with a smaller --num_workers."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Keep a worker from waiting for ever when the process that gives it work was killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
