"""Which sample stands at which place of training: a pure function of the data, the seed, the weights and the place.

Nothing is shuffled in memory and nothing is handed out: place i can be asked for at any time, by any process. So the
state of training's data is one integer, it is the same on every rank, and any number of ranks can take it up.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from distill.data.index import DatasetIndex
from distill.data.randomness import SUBSTITUTE_STREAM, generator_for
from distill.errors import ConfigError

MAX_SEED = 2**32 - 1


class SamplePlan:
    """An endless sequence of rows: each domain shuffled anew every time it has been gone through, mixed by weights.

    Any stretch of the sequence holds the domains in proportion to their weights, to within a sample or so of each. A
    domain repeats as soon as its samples are used up, so a small domain of large weight is seen more often. Built on
    Grain's `MapDataset` (seed, shuffle, repeat, mix), which has random access in constant time.

    Args:
        index: the samples.
        weights: share of each domain in training, relative to each other; every domain of the data must be named. None
            means equal shares.
        seed: from 0 to 2**32 - 1.

    Raises:
        ConfigError: a weight is for an unknown domain, missing, not finite or not above 0, or the seed is out of range.
    """

    def __init__(self, index: DatasetIndex, weights: Mapping[str, float] | None = None, seed: int = 0) -> None:
        if not 0 <= seed <= MAX_SEED:
            raise ConfigError(f"data.seed is {seed}; it must be from 0 to {MAX_SEED}.")
        self.index = index
        self.seed = seed
        self.weights = check_weights(weights, index.domains)
        self._ranges = [index.range_of(domain) for domain in index.domains]
        self._mixed: Any = None

    def __getitem__(self, position: int) -> int:
        """Return the row at a place of the sequence, counted from 0."""
        if position < 0:
            raise IndexError(f"position {position} is negative; the plan starts at 0.")
        if self._mixed is None:
            self._mixed = self._build()
        return int(self._mixed[position])

    def substitute(self, position: int, row: int, attempt: int) -> int:
        """Return a row of the same domain to put in place of a bad one, chosen by hash.

        Args:
            position: place in the sequence.
            row: the row that stands there and cannot be used.
            attempt: 0 for the first substitute, 1 when that is bad too, and so on.
        """
        rows = self._ranges[int(self.index.domain_ids[row])]
        generator = generator_for(self.seed, position, SUBSTITUTE_STREAM + attempt)
        return rows[int(generator.integers(len(rows)))]

    def _build(self) -> Any:
        with _quiet_import():
            import grain

        parts = [
            grain.MapDataset.source(rows).seed(_seed_of(domain, self.seed)).shuffle().repeat()
            for domain, rows in zip(self.index.domains, self._ranges, strict=True)
        ]
        return grain.MapDataset.mix(parts, weights=list(self.weights.values()))

    def __getstate__(self) -> dict[str, Any]:
        # Grain's objects are cheap to make and need not travel to a worker process.
        return {**self.__dict__, "_mixed": None}


def _seed_of(domain: str, seed: int) -> int:
    """Return a seed for one domain, which other domains do not change."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{domain}".encode()).digest()[:4], "big")


@contextmanager
def _quiet_import() -> Generator[None]:
    """Keep Grain from telling at import that JAX, which it does not need here, is absent."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_weights(weights: Mapping[str, float] | None, domains: tuple[str, ...]) -> dict[str, float]:
    """Return the weight of every domain, in the order of the domains.

    Raises:
        ConfigError: naming the weight that cannot be used, and the domains there are.
    """
    known = ", ".join(domains)
    if weights is None:
        return dict.fromkeys(domains, 1.0)
    unknown = [name for name in weights if name not in domains]
    if unknown:
        raise ConfigError(f"data.weights names the domain(s) {', '.join(unknown)}; the training data has {known}.")
    missing = [name for name in domains if name not in weights]
    if missing:
        raise ConfigError(
            f"data.weights does not name {', '.join(missing)}; give every domain a weight ({known}), or leave the "
            "shards of one that is not wanted out of data.train."
        )
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight <= 0:
            raise ConfigError(
                f"data.weights.{name} is {weight}; it must be above 0. To leave a domain out, leave its shards out of "
                "data.train."
            )
    return {name: float(weights[name]) for name in domains}
