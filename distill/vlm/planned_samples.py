"""A stage's samples in their order; what cannot be read is replaced by another of its source, and counted."""

from __future__ import annotations

import sys

from distill.data.randomness import SUBSTITUTE_STREAM, generator_for
from distill.errors import DataError
from distill.vlm.batch import VLMSample
from distill.vlm.mixture import MixtureDataset
from distill.vlm.samples import SampleBuilder

MAX_SUBSTITUTES = 8
MAX_BAD_FRACTION = 0.05
"""More bad records of a source than this end the run: the data is not what the recipe takes it for."""

MIN_SEEN = 100
"""Records of a source after which the fraction is looked at."""

TOLD_EVERY = 1000


class PlannedSamples:
    """Samples by place: a pure function of sources, weights, seed and place.

    Args:
        mixture: which record stands at which place.
        builder: makes the samples.
        keep: so many samples stay in memory once they are made, a process; of a small set every one.
    """

    def __init__(self, mixture: MixtureDataset, builder: SampleBuilder, keep: int = 0) -> None:
        self.mixture = mixture
        self.builder = builder
        self.keep = keep
        self._kept: dict[tuple[str, int], VLMSample] = {}
        self.seen: dict[str, int] = {}
        self.bad: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, position: int) -> VLMSample:
        """Return the sample at a place, or a substitute of the same source, chosen by hash, for one that is bad.

        Raises:
            DataError: too many of the source are bad.
        """
        name, number = self.mixture.place(position)
        source = self.mixture.sources[name]
        self.seen[name] = self.seen.get(name, 0) + 1
        for attempt in range(MAX_SUBSTITUTES + 1):
            try:
                return self._build(name, number)
            except DataError as error:
                self._count(name, error)
                if attempt == MAX_SUBSTITUTES:
                    raise DataError(
                        f"{attempt + 1} records of the source {name}, one after another, cannot be used; the last: "
                        f"{error}"
                    ) from error
                generator = generator_for(self.mixture.seed, position, SUBSTITUTE_STREAM + attempt)
                number = int(generator.integers(len(source)))
        raise AssertionError("the loop returns or raises")

    def _build(self, name: str, number: int) -> VLMSample:
        if (name, number) in self._kept:
            return self._kept[name, number]
        sample = self.builder.build(self.mixture.sources[name][number])
        if len(self._kept) < self.keep:
            self._kept[name, number] = sample
        return sample

    def _count(self, name: str, error: DataError) -> None:
        self.bad[name] = self.bad.get(name, 0) + 1
        bad, seen = self.bad[name], self.seen[name]
        if bad == 1 or bad % TOLD_EVERY == 0:
            print(f"Bad record ({bad} of {seen} in {name}), replaced by another: {error}", file=sys.stderr)
        if seen >= MIN_SEEN and bad > MAX_BAD_FRACTION * seen:
            raise DataError(
                f"{bad} of {seen} records of the source {name} cannot be used, more than {MAX_BAD_FRACTION:.0%}; the "
                f"last: {error}"
            ) from error
