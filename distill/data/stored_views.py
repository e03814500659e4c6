"""What a source of stored teacher states offers the data module."""

from __future__ import annotations

from typing import Any, Protocol

from torch.utils.data import Dataset

from distill.data.index import DatasetIndex
from distill.data.plan import SamplePlan
from distill.data.transforms import Augmentation


class StoredViews(Protocol):
    """Datasets whose samples are those of `PlannedDataset` and `RowDataset`, with `teacher_states` beside the image.

    Training images come in the views that states were stored of.
    """

    def training(
        self,
        plan: SamplePlan,
        img_size_px: int,
        augmentation: Augmentation,
        *,
        epoch_samples: int,
        scaled_decoding: bool,
    ) -> Dataset[dict[str, Any]]:
        """Return a plan's samples."""
        ...

    def validation(self, index: DatasetIndex, img_size_px: int, min_decoded_px: int | None) -> Dataset[dict[str, Any]]:
        """Return an index's samples in order."""
        ...
