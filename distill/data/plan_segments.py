"""Stretches of the plan with one mix of the domains each, and how the mix of a run may go on after a resume."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from distill.data.domain_order import import_grain
from distill.data.index import DatasetIndex
from distill.errors import ConfigError, DataError


@dataclass(frozen=True)
class WeightChange:
    """Another mix of the domains, from an optimiser step on.

    Args:
        from_step: the first optimiser step with these weights, counted from 0; at least 1.
        weights: share of each domain, relative to each other; every domain is named.
    """

    from_step: int
    weights: dict[str, float]


class Mix:
    """An endless sequence of domains in proportion to their weights, by Grain's `MapDataset.mix`.

    Any stretch of it holds the domains in proportion, to within a sample or so of each.

    Args:
        weights: share of each domain, above 0.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._domains = tuple(weights)
        self._weights = list(weights.values())

    @cached_property
    def _mixed(self) -> Any:
        dataset = import_grain().MapDataset
        sources = [dataset.source(_Numbers(domain)) for domain in self._domains]
        return dataset.mix(sources, weights=self._weights)

    def __getitem__(self, offset: int) -> tuple[str, int]:
        """Return the domain at a place, and how often it stood at earlier places."""
        return self._mixed[offset]

    def counts(self, offset: int) -> dict[str, int]:
        """Return how often each domain stands at the first `offset` places.

        Read off the next place of each domain, so it takes as many look-ups as the rarest domain is rare.
        """
        found: dict[str, int] = {}
        while len(found) < len(self._domains):
            domain, number = self[offset]
            found.setdefault(domain, number)
            offset += 1
        return {domain: found[domain] for domain in self._domains}


class _Numbers:
    """An endless source of (domain, 0), (domain, 1), ... for Grain."""

    def __init__(self, domain: str) -> None:
        self.domain = domain

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: int) -> tuple[str, int]:
        return self.domain, number


@dataclass(frozen=True)
class Segment:
    """A stretch of the plan with one mix, up to the next one's start.

    Attributes:
        start: its first position.
        from_step: the optimiser step that begins there.
        weights: share of each domain.
        passed: how many samples each domain gave before, on the same data.
        data: for each domain, the SHA-256 (hex) over its shards' SHA-256 in the order of their rows.
    """

    start: int
    from_step: int
    weights: dict[str, float]
    passed: dict[str, int]
    data: dict[str, str]

    def passed_at(self, position: int) -> dict[str, int]:
        """Return how many samples each domain gave before a position of this segment."""
        within = Mix(self.weights).counts(position - self.start)
        return {domain: self.passed[domain] + count for domain, count in within.items()}


def first_segment(index: DatasetIndex, weights: Mapping[str, float]) -> Segment:
    """Return the segment that a new run begins with."""
    return Segment(0, 0, dict(weights), dict.fromkeys(index.domains, 0), digests(index))


def segment_on_new_data(
    index: DatasetIndex, weights: Mapping[str, float], before: Segment, at: tuple[int, int]
) -> Segment:
    """Return a segment on other data than the one before it.

    A domain whose shards are the same goes on in its pass; the other domains begin one.

    Args:
        index: the new data.
        weights: the mix from here on.
        before: the segment that ends here.
        at: the position and the optimiser step it starts at.
    """
    passed, data = before.passed_at(at[0]), digests(index)
    kept = {domain: passed[domain] if before.data.get(domain) == data[domain] else 0 for domain in index.domains}
    return Segment(*at, dict(weights), kept, data)


def digests(index: DatasetIndex) -> dict[str, str]:
    """Return for each domain of the data a SHA-256, hex, that tells whether its rows are still the same."""
    shards: dict[str, list[str]] = {domain: [] for domain in index.domains}
    for shard in index.shards:
        shards[shard.domain].append(shard.sha256)
    return {domain: hashlib.sha256(json.dumps(of_domain).encode()).hexdigest() for domain, of_domain in shards.items()}


class Schedule:
    """The mix of each optimiser step, as the recipe says it.

    Args:
        weights: at step 0; None means equal shares.
        changes: later ones, by ascending step; one that changes nothing is left out.
        domains: those of the data.

    Raises:
        ConfigError: the steps do not ascend, or a weight cannot be used.
    """

    def __init__(
        self, weights: Mapping[str, float] | None, changes: Sequence[WeightChange], domains: tuple[str, ...]
    ) -> None:
        check_steps(changes)
        self.entries = [WeightChange(0, check_weights(weights, domains))]
        for number, change in enumerate(changes):
            checked = check_weights(change.weights, domains, f"data.weight_changes[{number}].weights")
            if checked != self.entries[-1].weights:
                self.entries.append(WeightChange(change.from_step, checked))

    def at(self, step: int) -> dict[str, float]:
        """Return the weights of a step."""
        return [entry.weights for entry in self.entries if entry.from_step <= step][-1]

    def after(self, step: int) -> list[WeightChange]:
        """Return the changes that come after a step."""
        return [entry for entry in self.entries if entry.from_step > step]

    def check_past(self, begun: Sequence[Segment], last_step: int) -> None:
        """Refuse to go on where this schedule would have mixed what was gone through otherwise.

        Args:
            begun: the segments that an earlier run began on the present data, in order; at least one.
            last_step: the last step of which a sample was gone through.

        Raises:
            DataError: naming the first difference.
        """
        origin = begun[0].from_step
        mine = [WeightChange(origin, self.at(origin)), *self.after(origin)]
        mine = [entry for entry in mine if entry.from_step <= last_step]
        theirs = [WeightChange(segment.from_step, segment.weights) for segment in begun]
        for own, saved in zip([*mine, None], [*theirs, None], strict=False):
            if own != saved:
                raise DataError(
                    "The checkpoint's data differs in its weights, in steps that were done: "
                    f"{_told(saved)} there, {_told(own)} here. Set data.weights and data.weight_changes back up to "
                    f"step {last_step}; changes from step {last_step + 1} on may be added or altered."
                )


def _told(entry: WeightChange | None) -> str:
    return "no further change" if entry is None else f"{entry.weights} from step {entry.from_step}"


def check_steps(changes: Sequence[WeightChange]) -> None:
    """Refuse changes whose steps do not ascend from 1.

    Raises:
        ConfigError: naming the entry.
    """
    before = 0
    for number, change in enumerate(changes):
        if change.from_step <= before:
            rule = (
                f"above {before}, the step of the entry before it" if number else "at least 1 (data.weights is step 0)"
            )
            raise ConfigError(f"data.weight_changes[{number}].from_step is {change.from_step}; it must be {rule}.")
        before = change.from_step


def check_weights(
    weights: Mapping[str, float] | None, domains: tuple[str, ...], key: str = "data.weights"
) -> dict[str, float]:
    """Return the weight of every domain, in the order of the domains.

    Raises:
        ConfigError: naming the weight that cannot be used, and the domains there are.
    """
    known = ", ".join(domains)
    if weights is None:
        return dict.fromkeys(domains, 1.0)
    unknown = [name for name in weights if name not in domains]
    if unknown:
        raise ConfigError(f"{key} names the domain(s) {', '.join(unknown)}; the training data has {known}.")
    missing = [name for name in domains if name not in weights]
    if missing:
        raise ConfigError(
            f"{key} does not name {', '.join(missing)}; give every domain a weight ({known}), or leave the shards of "
            "one that is not wanted out of data.train."
        )
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight <= 0:
            raise ConfigError(
                f"{key}.{name} is {weight}; it must be above 0. To leave a domain out, leave its shards out of "
                "data.train."
            )
    return {name: float(weights[name]) for name in domains}
