"""Several sources of records as one endless sequence: place i is a pure function of sources, weights and seed.

Built as distill/data/plan.py is: Grain's `MapDataset` shuffles each source anew for every pass over it and mixes them
by weight, with random access in constant time; nothing is drawn while training goes on, so nothing has to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distill.data.domain_order import FullShuffle, seed_of
from distill.data.plan import MAX_SEED
from distill.data.plan_segments import Mix
from distill.errors import ConfigError
from distill.vlm.conversation import Conversation


class MixtureDataset:
    """Sources mixed by weight, each gone through without repetition before it is shuffled anew.

    Any stretch holds the sources in proportion to their weights, to within a sample or so of each. A source of weight 0
    does not occur.

    Args:
        sources: records by name.
        weights: share of each source, relative to each other, every source named; None weighs each by its size, so
            that one pass of the mixture is one pass of each source.
        seed: from 0 to 2**32 - 1.

    Raises:
        ConfigError: a source is empty, a weight is missing, unknown, negative or not finite, all are 0, or the seed is
            out of range.
    """

    def __init__(
        self, sources: Mapping[str, Sequence[Conversation]], weights: Mapping[str, float] | None = None, seed: int = 0
    ) -> None:
        empty = [name for name, source in sources.items() if not len(source)]
        if empty or not sources:
            raise ConfigError(f"The source(s) {', '.join(empty) or 'to mix'} hold no record; leave them out.")
        if not 0 <= seed <= MAX_SEED:
            raise ConfigError(f"seed is {seed}; it must be from 0 to {MAX_SEED}.")
        sizes: dict[str, float] = {name: float(len(source)) for name, source in sources.items()}
        self.weights = _checked_weights(sizes if weights is None else weights, tuple(sources))
        self.sources = {name: sources[name] for name in self.weights}
        self.seed = seed
        self._mix = Mix(self.weights)
        self._orders: dict[str, FullShuffle] = {}

    def __len__(self) -> int:
        """How many records the sources in use have together; the sequence itself goes on without end."""
        return sum(map(len, self.sources.values()))

    def __getitem__(self, position: int) -> Conversation:
        """Return the record at a place of the sequence, counted from 0.

        Raises:
            IndexError: the place is negative.
            DataError: the record cannot be read.
        """
        name, record = self.place(position)
        return self.sources[name][record]

    def place(self, position: int) -> tuple[str, int]:
        """Return the source at a place of the sequence, and which of its records stands there.

        Raises:
            IndexError: the place is negative.
        """
        if position < 0:
            raise IndexError(f"position {position} is not in the mixture, which starts at 0.")
        name, number = self._mix[position]
        if name not in self._orders:
            # Each source has a seed of its own, which other sources do not change.
            self._orders[name] = FullShuffle(range(len(self.sources[name])), seed_of(self.seed, name))
        return name, self._orders[name][number]

    def __getstate__(self) -> dict[str, Any]:
        # Grain's objects are cheap to make and need not travel to a worker process.
        return {**self.__dict__, "_orders": {}, "_mix": Mix(self.weights)}


def _checked_weights(weights: Mapping[str, float], names: tuple[str, ...]) -> dict[str, float]:
    if set(weights) != set(names):
        raise ConfigError(f"Weights are given for {', '.join(weights)}, but the sources are {', '.join(names)}.")
    wrong = {name: weight for name, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)}
    if wrong or not any(weights.values()):
        raise ConfigError(
            f"The weights {wrong or dict(weights)} cannot be: finite, not negative, at least one above 0."
        )
    return {name: float(weights[name]) for name in names if weights[name]}
