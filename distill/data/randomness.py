"""Random numbers that depend on (seed, place in the plan, use) alone: no state, so nothing to save or synchronise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

AUGMENT_STREAM = 0
SUBSTITUTE_STREAM = 1
"""The first substitute for a bad sample; the next ones use the streams after it."""


def generator_for(seed: int, position: int, stream: int) -> np.random.Generator:
    """Return a random generator that depends on its arguments alone, on every machine, process and rank.

    Args:
        seed: the run's seed, at least 0.
        position: place of the sample in the plan, at least 0.
        stream: tells independent uses at one position apart.
    """
    # Philox is a counter-based generator: the key says which sequence, the counter where in it. The lowest counter word
    # is left to the draws themselves.
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, position, 0, 0]))


def permutation(size: int, seed: int) -> NDArray[np.int64]:
    """Return the numbers below `size` in an order that depends on the arguments alone, int64 `[size]`.

    Args:
        size: how many, at least 1.
        seed: at least 0.
    """
    # NumPy promises that a bit generator's raw output stays the same in every release; `Generator.permutation` may not.
    return np.argsort(np.random.Philox(key=seed).random_raw(size), kind="stable")
