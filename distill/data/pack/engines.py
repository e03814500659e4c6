"""Where the units of work run: worker processes of this machine, or Ray Data on a cluster. The results are the same."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context, parent_process
from typing import Any, Literal, TypeVar

from distill.errors import ConfigError, DataError, DistillError

Engine = Literal["local", "ray"]

MAX_RAY_BLOCKS = 10_000
"""Ray keeps some kilobytes on each block of a data set."""

_Unit = TypeVar("_Unit")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Workers:
    """Who does the work: local processes start with each call of `run`, Ray once, when the `with` block begins.

    Attributes:
        engine: local or ray.
        count: processes at work at a time; 1 on the local engine works in this process.
    """

    engine: Engine
    count: int
    _stack: ExitStack = field(default_factory=ExitStack, repr=False, compare=False)

    def __enter__(self) -> Workers:
        if self.engine == "ray":
            self._stack.enter_context(_ray_session(self.count))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def run(self, function: Callable[[_Unit], _Result], units: Sequence[_Unit]) -> Iterator[_Result]:
        """Call a function for each unit and yield the results in the order of the units.

        Args:
            function: of a module; its result must survive JSON.
            units: small things that can be pickled.

        Raises:
            ConfigError: Ray is not installed.
            DataError: the function raised it, or a worker was killed.
        """
        if not units:
            return
        count = min(self.count, len(units))
        if self.engine == "ray":
            yield from _run_ray(function, units)
        elif count == 1:
            yield from map(function, units)
        else:
            yield from _run_processes(function, units, count)


def _run_processes(function: Callable[[_Unit], _Result], units: Sequence[_Unit], num_workers: int) -> Iterator[_Result]:
    # Spawned, not forked: a parent that has run threads must not be forked.
    context = get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_follow_parent) as pool:
        waiting: deque[Future[_Result]] = deque()
        try:
            for unit in units:
                waiting.append(pool.submit(function, unit))
                # A few are in flight, so that a long list of units takes no memory here.
                if len(waiting) > 4 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                f"One of {num_workers} worker processes ended without a word, most often for lack of memory. Repeat "
                "the command with fewer, for example --num_workers 1: complete shards are kept."
            ) from error
        finally:
            for future in waiting:
                future.cancel()


def _follow_parent() -> None:
    """End this process when its parent is killed: nobody would collect its work, and it would wait for ever."""
    parent = parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _run_ray(function: Callable[[_Unit], _Result], units: Sequence[_Unit]) -> Iterator[_Result]:
    _, data = _import_ray()
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True

    def work(row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["number"])
        # Ray wraps what a task raises; the message that a user can act on must arrive as it is.
        try:
            return {"number": number, "result": json.dumps(function(units[number])), "error": ""}
        except DistillError as error:
            return {"number": number, "result": "", "error": str(error)}

    numbers = [{"number": number} for number in range(len(units))]
    # A block a unit: what Ray repeats after a lost node, and what a kill loses, is one unit.
    blocks = min(len(units), MAX_RAY_BLOCKS)
    for expected, row in enumerate(data.from_items(numbers, override_num_blocks=blocks).map(work).iter_rows()):
        if row["error"]:
            raise DataError(row["error"])
        if row["number"] != expected:
            raise DataError(f"Ray gave unit {row['number']} in place of {expected}; use --engine local.")
        yield json.loads(row["result"])


@contextmanager
def _ray_session(count: int) -> Generator[None]:
    ray, _ = _import_ray()
    if ray.is_initialized():
        # The caller's own session, and the caller's to end.
        yield
        return
    # On a cluster Ray's own RAY_ADDRESS says where it is; a cluster has its own number of cores.
    cores = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": count, "include_dashboard": False}
    ray.init(log_to_driver=False, **cores)
    try:
        yield
    finally:
        ray.shutdown()


def _import_ray() -> tuple[Any, Any]:
    # Ray reports its usage over the network unless this is set before it is imported.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        ray, data = import_module("ray"), import_module("ray.data")
    except ImportError as error:
        raise ConfigError(
            "--engine ray needs Ray Data, which is not installed. Run: pip install 'encoder-distill[ray]', or leave "
            "--engine out."
        ) from error
    # Its plans and timings are not what a packing has to say.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    return ray, data
