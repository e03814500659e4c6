"""What a domain hands to the writer, and the random numbers it is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
from PIL import Image

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

T = TypeVar("T")


@dataclass(frozen=True)
class Rendered:
    """One finished image with what is known about it.

    Args:
        image: RGB image of the requested side.
        group: samples with an equal group belong on the same side of any split; None means the sample stands alone.
        annotations: JSON-serialisable facts, such as text lines with boxes or the values behind a chart.
    """

    image: Image.Image
    group: str | None = None
    annotations: dict[str, object] = field(default_factory=lambda: {})


def sample_rng(seed: int, split: Split, domain_id: int, index: int) -> np.random.Generator:
    """Returns the generator of one sample: it depends on these four values only, never on who draws the sample."""
    sequence = np.random.SeedSequence([seed, SPLITS.index(split), domain_id, index])
    return np.random.Generator(np.random.Philox(sequence))


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Returns one of the options, each equally likely."""
    return options[int(rng.integers(len(options)))]


def pick_some(rng: np.random.Generator, options: Sequence[T], count: int) -> list[T]:
    """Returns `count` different options in random order."""
    return [options[int(i)] for i in rng.permutation(len(options))[:count]]


def chance(rng: np.random.Generator, probability: float) -> bool:
    """Returns True with the given probability."""
    return bool(rng.random() < probability)


def between(rng: np.random.Generator, low: float, high: float) -> float:
    """Returns a float drawn uniformly from [low, high)."""
    return float(rng.uniform(low, high))


def whole(rng: np.random.Generator, low: int, high: int) -> int:
    """Returns an integer drawn uniformly from low to high, both included."""
    return int(rng.integers(low, high + 1))
