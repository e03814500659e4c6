"""Records by row and view, from memory-mapped units."""

from __future__ import annotations

import mmap
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.cache.units import UnitPlan
from distill.data.index import DatasetIndex
from distill.errors import DataError

MAX_OPEN_UNITS = 128
"""Well below the usual limit of 1024 open files a process; a mapping holds one."""


class RecordReader:
    """Reads records; holds a bounded number of units mapped; travels to worker processes without them.

    Args:
        index: the images that the rows are of.
        units: one a shard, in the order of `index.shards`.
    """

    def __init__(self, index: DatasetIndex, units: Sequence[UnitPlan]) -> None:
        self.units = tuple(units)
        self.views = units[0].views
        self._shard_ids = index.shard_ids
        self._first_rows = [shard.first_row for shard in index.shards]
        self._offsets = [len(unit.header) for unit in units]
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()

    def will_need(self, row: int, view: int) -> None:
        """Have the kernel fetch a record's pages while other work goes on."""
        unit, place = self._place(row, view)
        start, size = self._offsets[unit] + place * self.units[unit].record_bytes, self.units[unit].record_bytes
        begin = start // mmap.PAGESIZE * mmap.PAGESIZE
        self._map(unit).madvise(mmap.MADV_WILLNEED, begin, start + size - begin)

    def read(self, row: int, view: int) -> Tensor:
        """Return one record, uint8 `[R]`.

        Raises:
            DataError: the unit cannot be read, the record is damaged, or the image could not be decoded when the
                cache was filled.
        """
        unit, place = self._place(row, view)
        plan, data, start = self.units[unit], self._map(unit), self._offsets[unit]
        count, size = plan.rows * plan.views, plan.record_bytes
        after = start + count * size
        if not data[after + 4 * count + place]:
            raise DataError(
                f"{plan.path} has no states of image {place // plan.views} of {plan.shard}: it could not be decoded "
                "when the cache was filled, and now it can. Fill the cache again in another folder."
            )
        record = torch.empty(size, dtype=torch.uint8)
        target = record.numpy()
        target[:] = np.frombuffer(data, np.uint8, size, start + place * size)
        checksum = after + 4 * place
        if zlib.crc32(target.data) != int.from_bytes(data[checksum : checksum + 4], "little"):
            raise DataError(
                f"{plan.path} is damaged: the states of image {place // plan.views} of {plan.shard} fail their "
                "checksum. Run the same `distill cache` command again: it finds and replaces what is damaged."
            )
        return record

    def _place(self, row: int, view: int) -> tuple[int, int]:
        unit = int(self._shard_ids[row])
        return unit, (row - self._first_rows[unit]) * self.views + view

    def _map(self, unit: int) -> mmap.mmap:
        if unit in self._maps:
            self._maps.move_to_end(unit)
            return self._maps[unit]
        if len(self._maps) >= MAX_OPEN_UNITS:
            self._maps.popitem(last=False)[1].close()
        plan = self.units[unit]
        try:
            with plan.path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"The cache unit {plan.path} cannot be read: {error}.") from error
        if len(data) != plan.num_bytes:
            raise DataError(
                f"{plan.path} is damaged: it has {len(data):,} bytes, {plan.num_bytes:,} belong there. Run the same "
                "`distill cache` command again: it finds and replaces what is damaged."
            )
        self._maps[unit] = data
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict()}
