"""Packing: several short samples share one row of a batch, so that less of it is padding.

First fit over the samples in their order: deterministic, and within a row the order of the samples is theirs.
Ends of samples are never cut. InternVL 2.5 packs its training data so (arXiv 2412.05271), and bounds the tiles of a row
too.
"""

from __future__ import annotations

from collections.abc import Sequence

from distill.errors import DataError


def pack_first_fit(
    lengths: Sequence[int], max_length: int, tile_counts: Sequence[int] | None = None, max_tiles: int | None = None
) -> list[list[int]]:
    """Return which samples share a row: each sample goes into the first row that still has room for it.

    Args:
        lengths: tokens of each sample.
        max_length: most tokens of a row.
        tile_counts: tiles of each sample; needed only with `max_tiles`.
        max_tiles: most tiles of a row; None means no limit.

    Returns:
        One list of positions in `lengths` for each row, ascending within a row; every position occurs exactly once.

    Raises:
        DataError: a sample alone is longer than a row, or has more tiles than a row may have.
    """
    tiles = [0] * len(lengths) if tile_counts is None else list(tile_counts)
    limit = float("inf") if max_tiles is None else max_tiles
    rows: list[list[int]] = []
    room: list[int] = []
    tile_room: list[float] = []
    for position, length in enumerate(lengths):
        _check_fits(position, length, max_length, tiles[position], limit)
        for row in range(len(rows) + 1):
            if row == len(rows):
                rows.append([])
                room.append(max_length)
                tile_room.append(limit)
            if length <= room[row] and tiles[position] <= tile_room[row]:
                rows[row].append(position)
                room[row] -= length
                tile_room[row] -= tiles[position]
                break
    return rows


def _check_fits(position: int, length: int, max_length: int, tiles: int, max_tiles: float) -> None:
    """Raise DataError where a sample does not fit into an empty row."""
    if length > max_length:
        raise DataError(
            f"Sample {position} of the batch has {length} tokens, but a row holds {max_length}: "
            "encode samples with the same max_length, or raise it."
        )
    if tiles > max_tiles:
        raise DataError(
            f"Sample {position} of the batch has {tiles} tiles, but a row holds {max_tiles:.0f}: "
            "lower the tiling's max_tiles, or raise the row's."
        )
