"""The views whose states are stored: a pure function of (seed, row, view), so that a student sees exactly them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distill.cache.reader import RecordReader
from distill.data.fetch import PlannedDataset, RowDataset
from distill.data.image_header import ImageError
from distill.data.index import DatasetIndex
from distill.data.plan import SamplePlan
from distill.data.randomness import generator_for
from distill.data.transforms import NO_AUGMENTATION, Augmentation, augment, smallest_source_px, square_view

VIEW_STREAM = 2**32
"""Random streams of views begin here, far from those that a plan uses."""

STATES_KEY = "teacher_states"
"""Name of the records in a sample and in a batch."""


def stored_view(image: Tensor, row: int, view: int, *, seed: int, augmentation: Augmentation, size_px: int) -> Tensor:
    """Return view number `view` of a training image.

    Args:
        image: uint8 `[3, H, W]`, as decoded.
        row: of the image.
        view: from 0.
        seed: of the augmentation.
        augmentation: what happens before the image is resized.
        size_px: S.

    Returns:
        uint8 `[3, S, S]`.
    """
    return square_view(augment(image, augmentation, generator_for(seed, row, VIEW_STREAM + view)), size_px)


class ShardViews(Dataset[dict[str, Any]]):
    """All views of a stretch of rows, in order: V items an image; for filling a cache.

    An item is `{"image": uint8 [3, S, S], "usable": bool}`; the image is black where it could not be decoded.

    Args:
        index: the images.
        rows: the stretch.
        views: V.
        img_size_px: S.
        seed: of the augmentation.
        augmentation: what happens before an image is resized.
        scaled_decoding: decode large JPEGs at a fraction of their size, as training does.
    """

    def __init__(
        self,
        index: DatasetIndex,
        rows: range,
        *,
        views: int,
        img_size_px: int,
        seed: int = 0,
        augmentation: Augmentation = NO_AUGMENTATION,
        scaled_decoding: bool = False,
    ) -> None:
        min_decoded_px = smallest_source_px(augmentation, img_size_px) if scaled_decoding else None
        self.source = RowDataset(index, img_size_px, min_decoded_px)
        self.rows, self.views, self.seed, self.augmentation = rows, views, seed, augmentation

    def __len__(self) -> int:
        return len(self.rows) * self.views

    def __getitem__(self, item: int) -> dict[str, Any]:
        """Return one view.

        Raises:
            DataError: the shard cannot be read.
        """
        row, view, size_px = self.rows[item // self.views], item % self.views, self.source.img_size_px
        try:
            image = self.source.decode(row)
            settings: dict[str, Any] = {"seed": self.seed, "augmentation": self.augmentation, "size_px": size_px}
            return {"image": stored_view(image, row, view, **settings), "usable": True}
        except ImageError:
            return {"image": torch.zeros(3, size_px, size_px, dtype=torch.uint8), "usable": False}


class StoredPlannedDataset(PlannedDataset):
    """A plan's samples in the views that are stored, each with its record.

    The view of a place is the number of its epoch modulo V: a function of the place alone, the same on every rank and
    after a resume. A substitute for a bad image brings its own record.

    Args:
        plan: which row stands where.
        img_size_px: S.
        augmentation: what happens before an image is resized.
        reader: the records.
        epoch_samples: places an epoch has.
        scaled_decoding: as for `PlannedDataset`.
    """

    def __init__(
        self,
        plan: SamplePlan,
        img_size_px: int,
        augmentation: Augmentation,
        *,
        reader: RecordReader,
        epoch_samples: int,
        scaled_decoding: bool,
    ) -> None:
        super().__init__(plan, img_size_px, augmentation, scaled_decoding=scaled_decoding)
        self.reader, self.epoch_samples = reader, epoch_samples

    def view_of(self, index: int) -> int:
        """Return which stored view a place of the plan shows."""
        return index // self.epoch_samples % self.reader.views

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the sample at a place, with its record under `teacher_states`.

        Raises:
            DataError: a shard or unit cannot be read, or the domain's images are bad one after another.
        """
        item = super().__getitem__(index)
        return {**item, STATES_KEY: self.reader.read(item["row"], self.view_of(index))}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return a batch's samples; its records are fetched from the disk while its images are decoded."""
        for index in indices:
            self.reader.will_need(self.plan[index], self.view_of(index))
        return [self[index] for index in indices]

    def _view(self, index: int, row: int) -> Tensor:
        settings: dict[str, Any] = {"seed": self.plan.seed, "augmentation": self.augmentation}
        return stored_view(self.rows.decode(row), row, self.view_of(index), **settings, size_px=self.rows.img_size_px)


class StoredRowDataset(RowDataset):
    """An index's samples in order, each with its record.

    Args:
        index: the samples.
        img_size_px: S.
        min_decoded_px: as for `RowDataset`.
        reader: the records.
    """

    def __init__(self, index: DatasetIndex, img_size_px: int, min_decoded_px: int | None, reader: RecordReader) -> None:
        super().__init__(index, img_size_px, min_decoded_px)
        self.record_reader = reader

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return one sample, with its record under `teacher_states`.

        Raises:
            IndexError: there is no such row.
            DataError: image, shard or unit cannot be read.
        """
        item = super().__getitem__(row)
        return {**item, STATES_KEY: self.record_reader.read(row, 0)}

    def __getitems__(self, rows: list[int]) -> list[dict[str, Any]]:
        """Return a batch's samples; its records are fetched from the disk while its images are decoded."""
        for row in rows:
            self.record_reader.will_need(row, 0)
        return [self[row] for row in rows]
