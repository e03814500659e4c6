"""The endless sequence of one domain's rows: every row once a pass, each pass in another order."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from distill.data.randomness import permutation


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


def import_grain() -> Any:
    """Return the module `grain`, imported when it is first needed and without a word."""
    with _quiet_import():
        import grain
    return grain


def seed_of(*parts: object) -> int:
    """Return a seed from 0 to 2**32 - 1 that depends on all the parts."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:4], "big")


class FullShuffle:
    """A domain's rows, shuffled whole for each pass, in constant time and memory.

    Args:
        rows: the domain's rows.
        seed: from 0 to 2**32 - 1.
    """

    def __init__(self, rows: range, seed: int) -> None:
        self._shuffled = import_grain().MapDataset.source(rows).seed(seed).shuffle().repeat()

    def __getitem__(self, number: int) -> int:
        """Return the row that is the `number`-th the domain gives, counted from 0 over all passes."""
        return int(self._shuffled[number])


class WindowShuffle:
    """A domain's rows in an order that reads its shards nearly one after another, for shards that lie far away.

    A pass puts the shards in random order and joins their rows; each stretch of `window` rows is then shuffled within
    itself. So at most the shards that one stretch touches are needed at a time.

    Args:
        first_rows: each shard's first row, ascending.
        end_row: the row after the last shard's last.
        seed: from 0 to 2**32 - 1.
        window: rows shuffled together, at least 1.
    """

    def __init__(self, first_rows: Sequence[int], end_row: int, seed: int, window: int) -> None:
        self._first_rows = np.asarray(first_rows, dtype=np.int64)
        self._sizes = np.diff(self._first_rows, append=end_row)
        self._seed, self._window = seed, window
        self._count = int(self._sizes.sum())
        # The pass and the window that are being gone through.
        self._layout: tuple[int, np.ndarray, np.ndarray] | None = None
        self._permuted: tuple[int, int, np.ndarray] | None = None

    def __getitem__(self, number: int) -> int:
        """Return the row that is the `number`-th the domain gives, counted from 0 over all passes."""
        pass_number, place = divmod(number, self._count)
        place = self._shuffled_place(pass_number, place)
        order, ends = self._shuffled_shards(pass_number)
        nth = int(np.searchsorted(ends, place, side="right"))
        shard = int(order[nth])
        return int(self._first_rows[shard] + place - (ends[nth] - self._sizes[shard]))

    def _shuffled_place(self, pass_number: int, place: int) -> int:
        """Return the place that is put in another's stead, of the same window."""
        begin = place - place % self._window
        if self._permuted is None or self._permuted[:2] != (pass_number, begin):
            size = min(self._window, self._count - begin)
            self._permuted = pass_number, begin, permutation(size, seed_of(self._seed, pass_number, begin))
        return begin + int(self._permuted[2][place - begin])

    def _shuffled_shards(self, pass_number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of the shards in a pass, and where in the pass each of them ends."""
        if self._layout is None or self._layout[0] != pass_number:
            order = permutation(len(self._sizes), seed_of(self._seed, pass_number, "shards"))
            self._layout = pass_number, order, np.cumsum(self._sizes[order])
        return self._layout[1:]
