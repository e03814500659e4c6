"""Pixels of indexed shards by row."""

from __future__ import annotations

from torch import Tensor

from distill.data.decode import decode_image
from distill.data.image_header import ImageError
from distill.data.index import DatasetIndex
from distill.data.shard_reader import ShardReader
from distill.errors import DataError


class ShardImages:
    """The images of an index, as `distill.probe.probe_set.Images`.

    Args:
        index: the samples.
    """

    def __init__(self, index: DatasetIndex) -> None:
        self.index = index
        self.reader = ShardReader(index.shards, shard_cache=index.shard_cache)

    def __len__(self) -> int:
        return len(self.index)

    def pixels(self, row: int) -> Tensor:
        """Return one image, `[3, H, W]` uint8.

        Raises:
            DataError: naming shard and member, when the image or its shard cannot be read.
        """
        index = self.index
        data = self.reader.read(int(index.shard_ids[row]), int(index.offsets[row]), int(index.sizes[row]))
        try:
            return decode_image(data)
        except ImageError as error:
            raise DataError(f"{self.name_of(row)}: {error}; mend the image or leave it out.") from error

    def name_of(self, row: int) -> str:
        """Return "shard: key"."""
        return self.index.name_of(row)
