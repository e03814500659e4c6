"""First-fit packing: nothing is lost, nothing is cut, and no row overflows."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import DataError
from distill.vlm.packing import pack_first_fit


def test_a_sample_goes_into_the_first_row_that_has_room() -> None:
    assert pack_first_fit([5, 4, 3, 5, 2], 8) == [[0, 2], [1, 4], [3]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 5)), max_size=30))
def test_every_sample_stands_once_and_no_row_overflows(samples: list[tuple[int, int]]) -> None:
    lengths, tiles = [length for length, _ in samples], [count for _, count in samples]
    rows = pack_first_fit(lengths, 20, tiles, 6)
    assert sorted(position for row in rows for position in row) == list(range(len(samples)))
    for row in rows:
        assert row == sorted(row)
        assert sum(lengths[position] for position in row) <= 20
        assert sum(tiles[position] for position in row) <= 6


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=30))
def test_at_most_one_row_is_half_empty(lengths: list[int]) -> None:
    filled = [sum(lengths[position] for position in row) for row in pack_first_fit(lengths, 20)]
    assert sum(length <= 10 for length in filled) <= 1


def test_tiles_limit_a_row_too() -> None:
    assert pack_first_fit([1, 1, 1], 10, [2, 2, 1], 3) == [[0, 2], [1]]


def test_what_does_not_fit_into_an_empty_row_is_refused() -> None:
    with pytest.raises(DataError, match="9 tokens, but a row holds 8"):
        pack_first_fit([9], 8)
    with pytest.raises(DataError, match="4 tiles, but a row holds 3"):
        pack_first_fit([1], 8, [4], 3)
