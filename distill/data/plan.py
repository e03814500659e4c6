"""Which sample stands at which place of training: a pure function of the data, the seed, the weights and the place.

Nothing is shuffled in memory and nothing is handed out: place i can be asked for at any time, by any process. So the
state of training's data is one integer beside the list of mixes so far, it is the same on every rank, and any number of
ranks can take it up.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from distill.data.domain_order import FullShuffle, WindowShuffle, seed_of
from distill.data.index import DatasetIndex
from distill.data.plan_segments import Mix, Segment, WeightChange, check_weights, first_segment
from distill.data.randomness import SUBSTITUTE_STREAM, generator_for
from distill.errors import ConfigError

MAX_SEED = 2**32 - 1


class SamplePlan:
    """An endless sequence of rows: each domain shuffled anew every time it has been gone through, mixed by weights.

    Any stretch of a segment holds the domains in proportion to its weights, to within a sample or so of each. A domain
    repeats as soon as its samples are used up, so a small domain of large weight is seen more often. Where the weights
    change, each domain goes on in its own sequence. Built on Grain's `MapDataset` (seed, shuffle, repeat, mix), which
    has random access in constant time.

    Args:
        index: the samples.
        weights: share of each domain in training, relative to each other; every domain of the data must be named. None
            means equal shares.
        seed: from 0 to 2**32 - 1.
        shuffle_window: rows of a domain that are shuffled together, see `WindowShuffle`; None shuffles each domain
            whole.
        segments: those an earlier run began, in order, in place of `weights`; the last one is on the data of `index`.

    Attributes:
        first_position: the first place whose sample is in the present data; above 0 only where a run has gone over to
            new data.

    Raises:
        ConfigError: a weight is for an unknown domain, missing, not finite or not above 0, or the seed or the window is
            out of range.
    """

    def __init__(
        self,
        index: DatasetIndex,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
        *,
        shuffle_window: int | None = None,
        segments: Sequence[Segment] = (),
    ) -> None:
        if not 0 <= seed <= MAX_SEED:
            raise ConfigError(f"data.seed is {seed}; it must be from 0 to {MAX_SEED}.")
        if shuffle_window is not None and shuffle_window < 1:
            raise ConfigError(
                f"data.shuffle_window is {shuffle_window}; it must be at least 1, or null to shuffle each domain whole."
            )
        self.index = index
        self.seed = seed
        self.shuffle_window = shuffle_window
        self.segments = tuple(segments) or (first_segment(index, check_weights(weights, index.domains)),)
        self._ranges = {domain: index.range_of(domain) for domain in index.domains}
        self._starts = [segment.start for segment in self.segments]
        self._mixes = [Mix(segment.weights) for segment in self.segments]
        self._orders: dict[str, FullShuffle | WindowShuffle] = {}
        earlier = [number for number, segment in enumerate(self.segments) if segment.data != self.segments[-1].data]
        self.first_position = self._starts[earlier[-1] + 1] if earlier else 0

    def with_change(self, start: int, change: WeightChange) -> SamplePlan:
        """Return this plan with another mix from a place on, which lies behind the start of the last segment.

        Args:
            start: first position of the new segment.
            change: its weights, and the optimiser step it begins with.
        """
        last = self.segments[-1]
        assert start > last.start, "segments ascend"
        added = Segment(start, change.from_step, dict(change.weights), last.passed_at(start), last.data)
        return SamplePlan(
            self.index, seed=self.seed, shuffle_window=self.shuffle_window, segments=[*self.segments, added]
        )

    def __getitem__(self, position: int) -> int:
        """Return the row at a place of the sequence, counted from 0.

        Raises:
            IndexError: the place is negative, or its sample is in data that the run has left behind.
        """
        if position < self.first_position:
            present = f"; the present data starts at {self.first_position}" if self.first_position else ""
            raise IndexError(f"position {position} is not in the plan, which starts at 0{present}.")
        number = bisect_right(self._starts, position) - 1
        segment = self.segments[number]
        domain, within = self._mixes[number][position - segment.start]
        return self._order(domain)[segment.passed[domain] + within]

    def substitute(self, position: int, row: int, attempt: int) -> int:
        """Return a row of the same domain to put in place of a bad one, chosen by hash.

        Args:
            position: place in the sequence.
            row: the row that stands there and cannot be used.
            attempt: 0 for the first substitute, 1 when that is bad too, and so on.
        """
        rows = self._ranges[self.index.domains[int(self.index.domain_ids[row])]]
        generator = generator_for(self.seed, position, SUBSTITUTE_STREAM + attempt)
        return rows[int(generator.integers(len(rows)))]

    def _order(self, domain: str) -> FullShuffle | WindowShuffle:
        if domain not in self._orders:
            self._orders[domain] = self._build(domain)
        return self._orders[domain]

    def _build(self, domain: str) -> FullShuffle | WindowShuffle:
        # Each domain has a seed of its own, which other domains do not change.
        rows, seed = self._ranges[domain], seed_of(self.seed, domain)
        if self.shuffle_window is None:
            return FullShuffle(rows, seed)
        first_rows = [shard.first_row for shard in self.index.shards if shard.domain == domain]
        return WindowShuffle(first_rows, rows.stop, seed, self.shuffle_window)

    def __getstate__(self) -> dict[str, Any]:
        # Grain's objects are cheap to make and need not travel to a worker process.
        return {**self.__dict__, "_orders": {}, "_mixes": [Mix(segment.weights) for segment in self.segments]}
